"""Checks of rewards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from regimen.checkers.findings import Findings, close, copied, declared_knobs, differing, storable
from regimen.checkers.setting import Setting
from regimen.rewards.base import FAILED, SCORED, Expression, Reward, Scene, Score
from regimen.rewards.expression import Composition, TaskReward
from regimen.rewards.judge import judge
from regimen.rollout import Rollout


def check_reward(reward: Expression, setting: Setting, findings: Findings) -> None:
    """Every component, then the whole expression."""
    before = len(findings.messages)
    for leaf, shown in _components(reward, setting.rollout):
        _check_component(leaf, replace(setting, given=shown), findings)
    if isinstance(reward, Reward) or len(findings.messages) > before:
        return
    states = {part.name: part.save_state() for part in reward.remembering()}
    knobs = declared_knobs({type(reward).__name__: reward}, setting.values)
    scene = Scene(setting.cast, knobs)
    _, report = findings.attempt("judging the whole expression", lambda: judge(reward, setting.rollout, scene))
    findings.need(not report.failed, f"{report.failed} samples failed to be judged: {'; '.join(report.errors)}")
    for part in reward.remembering():
        part.load_state(states[part.name])


def _components(reward: Expression, rollout: Rollout) -> Iterator[tuple[Reward, Rollout]]:
    """Every component with the samples that it is shown; those that are shown none are left out."""
    if isinstance(reward, TaskReward):
        wanted = torch.tensor([name in reward.tasks for name in rollout.task_names], device=rollout.task.device)
        rollout = rollout[wanted[rollout.task]]
    if isinstance(reward, Reward) and len(rollout):
        yield reward, rollout
    for part in reward.parts if isinstance(reward, Composition) else ():
        yield from _components(part, rollout)


def _check_component(reward: Reward, setting: Setting, findings: Findings) -> None:
    label = f"component '{reward.name}'"
    findings.need(
        isinstance(reward.name, str) and reward.name != "" and "/" not in reward.name and " " not in reward.name,
        f"{label}: its name becomes part of metrics and knobs; expected a text without blanks and '/'",
    )
    start = findings.attempt(f"{label}: save_state()", reward.save_state)
    if why := storable(start):
        findings.insist(False, f"{label}: save_state() cannot be stored ({why}); return tensors, numbers, texts, dicts")
    rollout = setting.rollout
    shown = copied(rollout)
    first = _ask(reward, shown, setting, findings)
    _check_values(label, first, rollout, findings)
    changed = differing(rollout, shown)
    findings.need(
        not changed, f"{label}: score changed the rollout in place ({', '.join(changed)}); work on a copy (.clone())"
    )
    findings.attempt(f"{label}: load_state(save_state())", lambda: reward.load_state(start))
    second = _ask(reward, copied(rollout), setting, findings)
    if reward.stateful:
        findings.need(
            _same(first, second),
            f"{label}: after load_state the same rollout is scored differently, so a resumed run would differ; "
            "save_state must return all that score remembers, and load_state restore it",
        )
    elif findings.need(
        _same(first, second),
        f"{label}: the same rollout is scored differently the second time; set `stateful = True` and write save_state "
        "and load_state if it remembers, or draw its random numbers from a generator seeded by what it scores",
    ):
        _check_rows(label, reward, first, setting, findings)
    reward.load_state(start)


def _ask(reward: Reward, rollout: Rollout, setting: Setting, findings: Findings) -> Score:
    scene = Scene(setting.cast, declared_knobs({reward.name: reward}, setting.values))
    what = f"component '{reward.name}': score(rollout, scene)"
    with torch.no_grad():
        result: Any = findings.attempt(what, lambda: reward.score(rollout, scene))
    if isinstance(result, Score):
        return result
    try:
        return Score.of(torch.as_tensor(result))
    except Exception:
        findings.insist(False, f"{what} returned {result!r:.60}, expected a tensor [B] or [B, T], or a Score")
        raise


def _check_values(label: str, score: Score, rollout: Rollout, findings: Findings) -> None:
    batch, steps, shape = len(rollout), rollout.steps, list(score.value.shape)
    findings.insist(
        shape in ([batch], [batch, steps]),
        f"{label}: score returned shape {shape}, expected [{batch}] (one number per sample) or [{batch}, {steps}] "
        "(one per step)",
    )
    findings.insist(
        list(score.status.shape) == [batch],
        f"{label}: status has shape {list(score.status.shape)}, expected [{batch}]; make it with Score.of",
    )
    findings.insist(
        not score.value.is_complex(), f"{label}: score returned {score.value.dtype}, expected real numbers or booleans"
    )
    value = score.value if score.value.ndim == 1 else torch.where(rollout.mask, score.value, 0).sum(1)
    bad = (~value.isfinite() & (score.status == SCORED)).nonzero().flatten().tolist()
    findings.need(
        not bad,
        f"{label}: samples {bad} got a value that is not finite, so they count as failed; guard divisions and "
        "logarithms, or say where the component does not apply with Score.of(value, applicable)",
    )
    failed = (score.status == FAILED).nonzero().flatten().tolist()
    findings.insist(not failed, f"{label}: samples {failed} failed: {'; '.join(score.errors) or 'no reason given'}")


def _check_rows(label: str, reward: Reward, whole: Score, setting: Setting, findings: Findings) -> None:
    """A sample's score depends on its group at most, wherever it stands in the batch."""
    rollout = setting.rollout
    order = torch.randperm(len(rollout), generator=torch.Generator().manual_seed(3)).to(rollout.mask.device)
    shuffled = _ask(reward, rollout[order], setting, findings)
    if not findings.need(
        _same(_rows(whole, order), shuffled),
        f"{label}: with the samples in another order they get other scores; read rollout.group to find siblings, never "
        "the position in the batch",
    ):
        return
    groups = rollout.group.unique()
    if len(groups) < 2:
        return
    some = torch.isin(rollout.group, groups[: len(groups) // 2])
    findings.need(
        _same(_rows(whole, some), _ask(reward, rollout[some], setting, findings)),
        f"{label}: scores change when other groups leave the batch; compare a sample with its own group only, or set "
        "`stateful = True` if it must compare across the batch",
    )


def _rows(score: Score, index: Tensor) -> Score:
    return Score(score.value[index], score.status[index])


def _same(a: Score, b: Score) -> bool:
    if a.value.shape != b.value.shape or not torch.equal(a.status, b.status):
        return False
    return close(torch.where(a.scored, a.value, 0), torch.where(b.scored, b.value, 0))
