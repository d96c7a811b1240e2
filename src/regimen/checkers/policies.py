"""Checks of policies."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from regimen.checkers.findings import Findings, copied, declared_knobs, differing, moved, weights
from regimen.checkers.setting import Setting
from regimen.policies.base import Policy, StepDistribution
from regimen.rollout import Rollout

TOLERANCE = 1e-5


def check_policy(policy: Policy, setting: Setting, findings: Findings) -> None:
    """It samples what it is asked, the same from the same generator, and scores its samples as it drew them."""
    contexts = setting.rollout.context
    before = weights({"policy": policy})
    state = torch.get_rng_state()
    rollout = _sample(policy, contexts, setting, findings)
    findings.need(
        torch.equal(state, torch.get_rng_state()),
        "sample draws from torch's global generator; draw from the rng that it is given, so that runs can be repeated",
    )
    _check_sample(rollout, contexts, findings)
    again = _sample(policy, contexts, setting, findings)
    changed = differing(rollout, again, ignore=("started_at", "finished_at"))
    findings.need(
        not changed,
        f"the same generator gives another sample ({', '.join(changed[:4])}); draw from rng only, with dropout off",
    )
    if rollout.logprobs is not None:
        _check_likelihood(policy, rollout, findings)
    touched = moved(before, {"policy": policy})
    findings.need(not touched, f"sampling or scoring changed weights or buffers ({', '.join(touched[:3])})")


def _sample(policy: Policy, contexts: TensorDict, setting: Setting, findings: Findings) -> Rollout:
    knobs = declared_knobs({type(policy).__name__: policy}, setting.values)
    rng = torch.Generator(setting.device).manual_seed(0)
    rollout = findings.attempt("sample(contexts, knobs, rng)", lambda: policy.sample(contexts, knobs, rng))
    findings.insist(isinstance(rollout, Rollout), f"sample returned a {type(rollout).__name__}, expected a Rollout")
    missing = sorted(set(knobs) - set(rollout.knobs.keys()))
    findings.need(
        not missing, f"sample does not record the knobs {', '.join(missing)}; pass knobs=knobs to Rollout.create"
    )
    return rollout


def _check_sample(rollout: Rollout, contexts: TensorDict, findings: Findings) -> None:
    findings.insist(
        len(rollout) == len(contexts), f"sample returned {len(rollout)} samples for {len(contexts)} contexts"
    )
    findings.need(bool(rollout.mask.any(1).all()), "some samples have no step at all (mask is False everywhere)")
    findings.need(
        not bool((rollout.loss_mask & ~rollout.mask).any()),
        "loss_mask is True at steps that do not exist (mask False); make it loss_mask & mask",
    )
    tensors = [value for value in rollout.data.values(True, True) if isinstance(value, Tensor)]
    findings.need(
        not any(value.requires_grad for value in tensors),
        "the rollout carries gradients, which would keep every iteration's graph; sample under torch.no_grad()",
    )
    if rollout.logprobs is not None:
        findings.need(
            bool(rollout.logprobs[rollout.mask].isfinite().all()), "logprobs are not finite at steps that exist"
        )


def _check_likelihood(policy: Policy, rollout: Rollout, findings: Findings) -> None:
    distribution = findings.attempt("distribution(rollout)", lambda: _distribution(policy, rollout))
    if isinstance(distribution, NotImplementedError):
        why = str(distribution)
        findings.need(why != "", "distribution raises NotImplementedError without a sentence that says why")
        return
    logprob = findings.attempt("distribution(rollout).logprob", lambda: distribution.logprob)
    shape = list(logprob.shape)
    findings.insist(
        shape == list(rollout.mask.shape), f"logprob has shape {shape}, expected {list(rollout.mask.shape)}"
    )
    off = float(torch.where(rollout.mask, (logprob - rollout.logprobs).exp() - 1, 0).abs().max().detach())
    findings.need(
        off <= TOLERANCE,
        f"before any update the ratio to its own samples is off by {off:.2g}, expected at most {TOLERANCE:g}; score "
        "under what was sampled under: temperature, guidance, noise level (rollout.knobs), dropout off",
    )
    findings.need(
        bool((torch.where(rollout.mask, 0, logprob) == 0).all()), "logprob is not 0 at steps that do not exist"
    )
    _check_gradient(policy, logprob, findings)
    _check_selection(policy, rollout, logprob, findings)
    entropy = findings.attempt("distribution(rollout).entropy()", distribution.entropy)
    findings.need(list(entropy.shape) == shape, f"entropy has shape {list(entropy.shape)}, expected {shape}")
    divergence = findings.attempt("distribution(rollout).kl(itself)", lambda: distribution.kl(distribution)).detach()
    findings.need(
        list(divergence.shape) == shape and bool((divergence.abs() <= TOLERANCE).all()),
        f"its KL from itself is up to {float(divergence.abs().max()):.2g} (shape {list(divergence.shape)}), expected 0 "
        f"everywhere (shape {shape})",
    )


def _distribution(policy: Policy, rollout: Rollout) -> StepDistribution | NotImplementedError:
    try:
        return policy.distribution(rollout)
    except NotImplementedError as error:
        return error


def _check_gradient(policy: Policy, logprob: Tensor, findings: Findings) -> None:
    if not isinstance(policy, nn.Module) or not any(p.requires_grad for p in policy.parameters()):
        return
    if not findings.need(
        logprob.requires_grad, "logprob has no gradient; compute it without no_grad, detach or recorded values"
    ):
        return
    parameters = [p for p in policy.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(logprob.sum(), parameters, allow_unused=True, retain_graph=True)
    reached = [gradient for gradient in gradients if gradient is not None]
    findings.need(bool(reached), "logprob reaches no weight of the policy")
    findings.need(all(bool(g.isfinite().all()) for g in reached), "the gradient of logprob is not finite")


def _check_selection(policy: Policy, rollout: Rollout, logprob: Tensor, findings: Findings) -> None:
    """Asked for some steps only, it gives those, the same, and 0 elsewhere."""
    where = rollout.mask.clone()
    where[::2] = False
    if not bool(where.any()):
        return
    shown = copied(rollout)
    some = findings.attempt("distribution(rollout, where)", lambda: policy.distribution(shown, where)).logprob
    findings.need(
        torch.allclose(some, torch.where(where, logprob, 0), rtol=1e-4, atol=1e-5),
        "distribution(rollout, where) gives other log-probabilities than distribution(rollout) at the steps asked for, "
        "or not 0 at the others",
    )
