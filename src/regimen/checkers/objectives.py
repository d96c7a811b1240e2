"""Checks of objectives."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regimen.checkers.findings import Findings, copied, declared_knobs, differing, moved, weights
from regimen.checkers.setting import Setting
from regimen.objectives.base import Batch, Loss, Objective
from regimen.rollout import Rollout

DRAWS = 64


def check_objective(objective: Objective, setting: Setting, findings: Findings) -> None:
    """One number with a gradient, the same however the minibatch is cut, that changes nothing."""
    rollout = setting.credited
    shown, before = copied(rollout), weights(setting.cast)
    loss = _ask(objective, shown, setting, findings)
    findings.insist(
        bool(loss.total.isfinite()),
        f"the loss is {_shown(loss.total)}, expected a finite number; guard log and division",
    )
    _check_gradient(loss, setting, findings)
    changed = differing(rollout, shown)
    findings.need(
        not changed, f"it changed the rollout in place ({', '.join(changed)}); other objectives read the same one"
    )
    touched = moved(before, setting.cast)
    findings.need(
        not touched, f"it changed weights ({', '.join(touched[:3])}); an objective gives a loss, the update steps"
    )
    again = _ask(objective, rollout, setting, findings)
    findings.need(
        torch.allclose(loss.total, again.total, rtol=1e-4, atol=1e-6),
        f"the same batch and generator give {_shown(loss.total)}, then {_shown(again.total)}; draw from batch.rng only",
    )
    _check_slices(objective, rollout, setting, findings)
    _check_blind(objective, rollout, setting, findings)


def _ask(
    objective: Objective,
    rollout: Rollout,
    setting: Setting,
    findings: Findings,
    seed: int = 0,
    rng: torch.Generator | None = None,
    whole: Rollout | None = None,
    rows: slice = slice(None),
) -> Loss:
    knobs = declared_knobs({objective.term_name: objective, **setting.cast}, setting.values)
    rng = torch.Generator(rollout.mask.device).manual_seed(seed) if rng is None else rng
    batch = Batch(rollout, setting.cast, knobs, rng, whole=whole, rows=rows)
    with torch.enable_grad():
        return findings.attempt(f"objective '{objective.term_name}'", lambda: objective(batch))


def _shown(loss: Tensor) -> str:
    return f"{float(loss.detach()):g}"


def _check_gradient(loss: Loss, setting: Setting, findings: Findings) -> None:
    modules = [member for member in setting.cast.values() if isinstance(member, nn.Module)]
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    findings.insist(
        loss.total.requires_grad,
        "the loss has no gradient: it depends on no trainable weight of the cast; compute it from "
        "batch.distribution(member) or batch.member(name), without detach or no_grad",
    )
    gradients = torch.autograd.grad(loss.total, parameters, allow_unused=True, retain_graph=True)
    reached = [gradient for gradient in gradients if gradient is not None]
    findings.need(bool(reached), f"the loss reaches no weight of the cast's members {', '.join(setting.cast)}")
    findings.need(
        all(bool(gradient.isfinite().all()) for gradient in reached),
        "the gradient is not finite although the loss is; a masked branch may hold a NaN, so mask its inputs instead",
    )


def _check_slices(objective: Objective, rollout: Rollout, setting: Setting, findings: Findings) -> None:
    """The losses of micro-batches sum to the loss of the minibatch; in the mean over draws if it draws."""
    if len(rollout) < 2:
        return

    def whole(seed: int) -> float:
        return float(_ask(objective, rollout, setting, findings, seed).total.detach())

    def in_slices(seed: int) -> float:
        rng = torch.Generator(rollout.mask.device).manual_seed(10_000 + seed)
        cut = max(1, len(rollout) // 3)
        parts = [slice(0, cut), slice(cut, len(rollout))]
        losses = [
            _ask(objective, rollout[rows], setting, findings, rng=rng, whole=rollout, rows=rows) for rows in parts
        ]
        return sum(float(loss.total.detach()) for loss in losses)

    draws = 1 if whole(0) == whole(1) else DRAWS
    a = torch.tensor([whole(seed) for seed in range(draws)], dtype=torch.float64)
    b = torch.tensor([in_slices(seed) for seed in range(draws)], dtype=torch.float64)
    error = float(((a.var() + b.var()) / draws).sqrt()) if draws > 1 else 0.0
    difference = float((a.mean() - b.mean()).abs())
    findings.need(
        difference <= 5 * error + 1e-4 * float(a.abs().mean()) + 1e-6,
        f"cut into micro-batches the loss is {float(b.mean()):g}, whole it is {float(a.mean()):g}; weight steps with "
        "batch.weights(...), or multiply a mean over samples by batch.share",
    )


def _check_blind(objective: Objective, rollout: Rollout, setting: Setting, findings: Findings) -> None:
    """What stands at steps that are not learned from does not matter."""
    spoilt = {
        name: torch.where(rollout.loss_mask, getattr(rollout, name), torch.nan)
        for name in ("logprobs", "advantages")
        if getattr(rollout, name) is not None and getattr(rollout, name).ndim == 2
    }
    if bool(rollout.loss_mask.all()) or not spoilt:
        return
    loss = _ask(objective, rollout.replace(**spoilt), setting, findings).total
    expected = _ask(objective, rollout, setting, findings).total
    findings.need(
        torch.allclose(loss, expected, rtol=1e-4, atol=1e-6),
        f"it reads {' or '.join(spoilt)} at steps that are not learned from (NaN there makes it {_shown(loss)}); "
        "use torch.where(batch.rollout.loss_mask, ..., 0)",
    )
