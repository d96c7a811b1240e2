"""Checks of credit."""

from __future__ import annotations

import torch

from regimen.checkers.findings import Findings, close, copied, declared_knobs, differing
from regimen.checkers.setting import Setting
from regimen.credit.base import Credit
from regimen.rollout import Rollout


def check_credit(credit: Credit, setting: Setting, findings: Findings) -> None:
    """Advantages of the right shape, 0 where nothing is learned, from rewards that stay as they are."""
    rollout = setting.judged
    shown = copied(rollout)
    result = _apply(credit, shown, setting, findings)
    changed = differing(rollout, shown)
    findings.need(
        not changed, f"it changed the rollout it was given ({', '.join(changed)}); return rollout.replace(...) instead"
    )
    if result.advantages is None:
        findings.need(
            len(result) < len(rollout) or bool(differing(rollout, result)),
            "it returned the rollout unchanged; expected rollout.replace(advantages=...), a selection or pairs",
        )
        return
    _check_advantages(result, findings)
    _check_left_alone(rollout, result, findings)
    _check_same_again(credit, rollout, result, setting, findings)
    _check_special_cases(credit, rollout, setting, findings)


def _apply(credit: Credit, rollout: Rollout, setting: Setting, findings: Findings) -> Rollout:
    knobs = declared_knobs({type(credit).__name__: credit}, setting.values)
    result = findings.attempt("credit(rollout, knobs, cast)", lambda: credit(rollout, knobs, setting.cast))
    findings.insist(isinstance(result, Rollout), f"it returned a {type(result).__name__}, expected a Rollout")
    return result


def _check_advantages(result: Rollout, findings: Findings) -> None:
    shape, expected = list(result.advantages.shape), list(result.mask.shape)
    findings.insist(shape[:2] == expected, f"advantages have shape {shape}, expected {expected}")
    learned = result.loss_mask.view(*expected, *[1] * (len(shape) - 2)).expand(shape)
    bad = (~result.advantages.isfinite() & learned).flatten(1).any(1).nonzero().flatten().tolist()
    findings.need(not bad, f"advantages of samples {bad} are not finite; guard divisions by a deviation or a count")
    outside = ((result.advantages != 0) & ~learned).flatten(1).any(1).nonzero().flatten().tolist()
    findings.need(
        not outside,
        f"advantages of samples {outside} are not 0 at steps that are not learned from; multiply by rollout.loss_mask",
    )


def _check_left_alone(rollout: Rollout, result: Rollout, findings: Findings) -> None:
    if len(result) != len(rollout):
        return
    changed = [name for name in differing(rollout, result, ignore=("advantages",)) if name.split("/")[0] in _JUDGED]
    findings.need(
        not changed,
        f"it changed what was judged ({', '.join(changed)}), so that the log would disagree with what is learned; put "
        "what credit computes into advantages or columns",
    )


def _check_same_again(credit: Credit, rollout: Rollout, result: Rollout, setting: Setting, findings: Findings) -> None:
    again = _apply(credit, copied(rollout), setting, findings)
    findings.need(
        again.advantages is not None and close(result.advantages, again.advantages),
        "the same rollout is credited differently the second time; draw from no random generator of its own",
    )
    order = torch.randperm(len(rollout), generator=torch.Generator().manual_seed(3)).to(rollout.mask.device)
    shuffled = _apply(credit, rollout[order], setting, findings)
    if len(result) == len(rollout) and len(shuffled) == len(rollout):
        findings.need(
            close(result.advantages[order], shuffled.advantages),
            "with the samples in another order they get other advantages; read rollout.group to find siblings, never "
            "the position in the batch",
        )


def _check_special_cases(credit: Credit, rollout: Rollout, setting: Setting, findings: Findings) -> None:
    """Identical rewards, a reward per step, a sample that could not be judged."""
    if rollout.reward is None:
        return
    for value in (0.0, 0.3):  # The mean of equal numbers is rounded, and a deviation then not quite 0; that of 0 is.
        flat = _apply(credit, rollout.replace(reward=torch.full_like(rollout.reward, value)), setting, findings)
        findings.need(
            flat.advantages is None or bool(flat.advantages[flat.loss_mask].isfinite().all()),
            "identical rewards give advantages that are not finite; add a small number to the deviation",
        )
    wide = rollout.reward if rollout.reward.ndim == 2 else rollout.reward[:, None] * rollout.mask
    per_step = _apply(credit, rollout.replace(reward=wide), setting, findings)
    if per_step.advantages is not None:
        _check_advantages(per_step, findings)
    left = rollout.loss_mask.clone()
    left[0] = False
    unjudged = _apply(credit, rollout.replace(loss_mask=left), setting, findings)
    if unjudged.advantages is not None:
        _check_advantages(unjudged, findings)


_JUDGED = ("reward", "rewards", "status", "mask", "logprobs", "actions", "observations", "group", "task")
