"""Checks of whole regimens: every part, with what the regimen itself would give it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from regimen.cast import Cast
from regimen.checkers.controllers import check_controller
from regimen.checkers.credit import check_credit
from regimen.checkers.findings import Abandoned, Findings
from regimen.checkers.objectives import check_objective
from regimen.checkers.rewards import check_reward
from regimen.checkers.setting import Setting
from regimen.checkers.tasks import check_task
from regimen.controllers.base import Controller, needs_of
from regimen.regimen import Regimen, Stage
from regimen.rewards.base import Expression, Scene
from regimen.rewards.expression import Composition, TaskReward
from regimen.rewards.judge import judge
from regimen.rollout import Rollout


def check_regimen(regimen: Regimen, setting: Setting, findings: Findings) -> None:
    """Stage by stage: its tasks; a rollout of theirs judged, credited and learned from; its controllers.

    Nothing is trained, and `prepare` steps are not taken. Metrics for controllers come from the setting.
    """
    known = {task.name for task in (*regimen.evaluated(), *(t for stage in regimen.stages for t in stage.tasks))}
    for stage in regimen.stages:
        for task in _names_in(stage.reward):
            findings.need(
                task in known,
                f"stage '{stage.name}': a reward is given .on('{task}'), and the regimen has no such task; there are: "
                f"{', '.join(sorted(known))}",
            )
        cast = Cast(**dict(regimen.cast))
        for rule in stage.rules:
            what = f"stage '{stage.name}', the start of rule {type(rule).__name__}"
            findings.attempt(what, partial(rule.start, cast))
        values = stage.board(cast, regimen.knobs).snapshot()
        _check_stage(stage, replace(setting, given=None, cast=cast, values=values), findings)


def _check_stage(stage: Stage, setting: Setting, findings: Findings) -> None:
    def run(name: str, check: Callable[[Any, Setting, Findings], None], part: Any, rollout: Rollout | None) -> None:
        own = Findings(name)
        with suppress(Abandoned):
            check(part, replace(setting, given=rollout, exact=True), own)
        findings.messages += [f"stage '{stage.name}', {name}: {message}" for message in own.messages]

    for task in stage.tasks:
        run(f"task '{task.name}'", check_task, task, None)
    for controller in stage.controllers:
        name = f"controller {type(controller).__name__}"
        what = f"stage '{stage.name}', the probe of {name}"
        run(name, check_controller, controller, findings.attempt(what, partial(_probed, controller, stage, setting)))
    rollout = findings.attempt(f"stage '{stage.name}', collecting from its tasks", lambda: _collected(stage, setting))
    if (reward := stage.reward) is not None:
        run("reward", check_reward, reward, rollout)
        rollout = _judged(reward, rollout, setting, stage.reward_timeout_s)
    if (credit := stage.credit) is not None:
        run("credit", check_credit, credit, rollout)
        judged, values, cast = rollout, setting.values, setting.cast
        rollout = findings.attempt(f"stage '{stage.name}', credit", lambda: credit(judged, values, cast))
    for update in stage.updates:
        run(f"update '{update.name}'", check_objective, update.objective, rollout)


def _judged(reward: Expression, rollout: Rollout, setting: Setting, timeout_s: float | None) -> Rollout:
    """The rollout as the stage would judge it; what the reward remembers stays as it was."""
    state = copy.deepcopy(reward.state_dict())
    judged, _ = judge(reward, rollout, Scene(setting.cast, setting.values, timeout_s))
    reward.load_state_dict(state)
    return judged


def _probed(controller: Controller, stage: Stage, setting: Setting) -> Rollout | None:
    """What a controller's probe gives, if it needs one; the task's place in its data stays where it was."""
    needs = needs_of(controller)
    if needs is None or (probe := needs.probe) is None:
        return None
    state = copy.deepcopy(probe.task.state_dict())
    rng = torch.Generator(setting.device).manual_seed(0)
    rollout: Rollout = probe.task.collect(setting.cast, setting.values, rng, probe.size)
    probe.task.load_state_dict(state)
    if probe.reward is not None:
        rollout = _judged(probe.reward, rollout, setting, stage.reward_timeout_s)
    return rollout if probe.credit is None else probe.credit(rollout, setting.values, setting.cast)


def _collected(stage: Stage, setting: Setting) -> Rollout:
    """Two groups or four samples of every task, whose position in the data stays where it was."""
    rng, parts = torch.Generator(setting.device).manual_seed(0), []
    for task in stage.tasks:
        state = copy.deepcopy(task.state_dict())
        parts.append(task.collect(setting.cast, setting.values, rng, max(2, 4 // task.group_size) * task.group_size))
        task.load_state_dict(state)
    return Rollout.cat(parts)


def _names_in(reward: Any) -> Iterator[str]:
    """The names given to `.on(...)` in a reward."""
    if isinstance(reward, TaskReward):
        yield from reward.tasks
    if isinstance(reward, Composition):
        for part in reward.parts:
            yield from _names_in(part)
