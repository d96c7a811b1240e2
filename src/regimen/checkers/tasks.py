"""Checks of tasks."""

from __future__ import annotations

import copy
import math

import torch

from regimen.checkers.findings import Findings, declared_knobs, differing, moved, storable, weights
from regimen.checkers.setting import Setting
from regimen.knobs import Knobs
from regimen.rollout import Rollout
from regimen.tasks.base import Evaluation, Task

TIMES = ("started_at", "finished_at")


def check_task(task: Task, setting: Setting, findings: Findings) -> None:
    """Whole groups of the size asked for, the same from the same generator, and an evaluation that moves nothing."""
    findings.insist(
        isinstance(task.name, str) and task.name != "" and "/" not in task.name,
        f"name is {task.name!r}, expected a text without '/': it becomes part of metrics and knobs",
    )
    findings.insist(
        isinstance(task.group_size, int) and task.group_size >= 1,
        f"group_size is {task.group_size!r}, expected a whole number of at least 1",
    )
    start = findings.attempt("state_dict()", lambda: copy.deepcopy(task.state_dict()))
    if why := storable(start):
        findings.insist(False, f"state_dict() cannot be stored ({why}); return tensors, numbers, texts, lists, dicts")
    # Pass twice, so that a table read in order starts anew in between.
    size = 2 * task.group_size
    first = _collect(task, size, setting, findings)
    _check_rollout(task, first, size, setting, findings)
    middle = findings.attempt("state_dict()", lambda: copy.deepcopy(task.state_dict()))
    second = _collect(task, size, setting, findings, seed=1)
    findings.attempt("load_state_dict(state_dict())", lambda: task.load_state_dict(copy.deepcopy(start)))
    _same_again(task, first, 0, setting, findings, "from the same state and generator")
    findings.attempt("load_state_dict(state_dict())", lambda: task.load_state_dict(copy.deepcopy(middle)))
    _same_again(task, second, 1, setting, findings, "after load_state_dict, as a resumed run would,")
    findings.attempt("load_state_dict(state_dict())", lambda: task.load_state_dict(copy.deepcopy(middle)))
    _check_evaluation(task, second, setting, findings)
    task.load_state_dict(start)


def _knobs(task: Task, setting: Setting) -> Knobs:
    members = {name: member for name, member in setting.cast.items() if hasattr(member, "knobs")}
    return declared_knobs({task.name: task, **members}, setting.values)


def _collect(task: Task, size: int, setting: Setting, findings: Findings, seed: int = 0) -> Rollout:
    rng = torch.Generator(setting.device).manual_seed(seed)
    what = f"collect(cast, knobs, rng, size={size})"
    rollout = findings.attempt(what, lambda: task.collect(setting.cast, _knobs(task, setting), rng, size))
    findings.insist(isinstance(rollout, Rollout), f"collect returned a {type(rollout).__name__}, expected a Rollout")
    return rollout


def _check_rollout(task: Task, rollout: Rollout, size: int, setting: Setting, findings: Findings) -> None:
    findings.insist(len(rollout) == size, f"collect was asked for {size} samples and returned {len(rollout)}")
    names = getattr(task, "collects", (task.name,))
    findings.need(
        rollout.task_names == names,
        f"the rollout is of task {rollout.task_names}, expected {names}; use Rollout.create(task=self.name)",
    )
    sizes = getattr(task, "group_sizes", (task.group_size // len(names),) * len(names))
    for name, siblings in zip(names, sizes, strict=True):
        counts = rollout.group[rollout.task == rollout.task_names.index(name)].unique(return_counts=True)[1].tolist()
        findings.need(
            set(counts) == {siblings},
            f"groups have sizes {counts}, expected {siblings} each (group_size); give siblings the same group",
        )
    findings.need(
        not bool((rollout.loss_mask & ~rollout.mask).any()),
        "loss_mask is True at steps that do not exist (mask False); make it loss_mask & mask",
    )
    findings.need(bool(rollout.mask.any(1).all()), "some samples have no step at all (mask is False everywhere)")
    missing = sorted(set(_knobs(task, setting)) - set(rollout.knobs.keys())) if task.generates else []
    findings.need(
        not missing,
        f"the rollout does not record the knobs {', '.join(missing)} that were in force; pass knobs=knobs to "
        "Rollout.create, so that it is judged and learned from under the values it was sampled under",
    )


def _same_again(task: Task, before: Rollout, seed: int, setting: Setting, findings: Findings, when: str) -> None:
    changed = differing(before, _collect(task, len(before), setting, findings, seed), ignore=TIMES)
    findings.need(
        not changed,
        f"{when} it collects something else ({', '.join(changed[:4])}); draw from rng only, and keep the position in "
        "the data in state_dict",
    )


def _check_evaluation(task: Task, expected: Rollout, setting: Setting, findings: Findings) -> None:
    """An evaluation moves neither the weights, nor the random streams, nor the position in the data."""
    before, state = weights(setting.cast), torch.get_rng_state()
    knobs = _knobs(task, setting).for_evaluation()

    def evaluate() -> Evaluation:
        return task.evaluate(setting.cast, knobs, torch.Generator(setting.device).manual_seed(2))

    evaluation = findings.attempt("evaluate(cast, knobs, rng)", evaluate)
    findings.insist(
        isinstance(evaluation, Evaluation), f"evaluate returned a {type(evaluation).__name__}, expected an Evaluation"
    )
    bad = {name: value for name, value in evaluation.metrics.items() if not _number(value)}
    findings.need(not bad, f"evaluate returned metrics that are no finite numbers: {bad}")
    findings.need(torch.equal(state, torch.get_rng_state()), "evaluate draws from torch's global generator; use rng")
    touched = moved(before, setting.cast)
    findings.need(not touched, f"evaluate changed weights or buffers ({', '.join(touched[:3])})")
    again = findings.attempt("evaluate(cast, knobs, rng)", evaluate)
    findings.need(
        again.metrics == evaluation.metrics,
        f"the same generator gives other metrics: {evaluation.metrics}, then {again.metrics}; draw from rng only",
    )
    _same_again(task, expected, 1, setting, findings, "after evaluate, which must not move the position in the data,")


def _number(value: object) -> bool:
    return isinstance(value, float | int) and math.isfinite(value)
