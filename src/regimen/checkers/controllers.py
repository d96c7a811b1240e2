"""Checks of controllers."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, get_args

import torch
from torch import Tensor

from regimen.checkers.findings import Findings, storable
from regimen.checkers.setting import Setting
from regimen.controllers.base import Controller, Moment, Situation, needs_of
from regimen.rollout import Rollout

STEPS, TOTAL = 5, 100


def check_controller(controller: Controller, setting: Setting, findings: Findings) -> None:
    """It moves what it says, to finite values, and continues from a checkpoint."""
    moves = findings.attempt("moves", lambda: controller.moves)
    findings.insist(
        isinstance(moves, tuple | list) and len(moves) > 0 and all(isinstance(name, str) and name for name in moves),
        f"moves is {moves!r}, expected the names of the knobs that it moves, such as ('kl_weight',)",
    )
    findings.need(
        controller.moment in get_args(Moment),
        f"moment is {controller.moment!r}, expected one of {', '.join(get_args(Moment))}",
    )
    # A copy: what is checked may be trained with later.
    trial = findings.attempt("copying the controller", lambda: copy.deepcopy(controller))
    for step in range(STEPS):
        _act(trial, step, setting, findings)
    state = findings.attempt("state_dict()", trial.state_dict)
    if why := storable(state):
        findings.insist(False, f"state_dict() cannot be stored ({why}); return tensors, numbers, texts, lists, dicts")
    state = copy.deepcopy(state)
    expected = [_act(trial, step, setting, findings) for step in range(STEPS, 2 * STEPS)]
    resumed = copy.deepcopy(controller)
    findings.attempt("load_state_dict(state_dict())", lambda: resumed.load_state_dict(state))
    after = [_act(resumed, step, setting, findings) for step in range(STEPS, 2 * STEPS)]
    findings.need(
        expected == after,
        f"after load_state_dict its next values are {after[0]}, without the interruption {expected[0]}; return from "
        "state_dict all that it remembers",
    )


def _act(controller: Controller, step: int, setting: Setting, findings: Findings) -> dict[str, float]:
    metrics = dict(setting.metrics)
    knobs = {name: setting.values.get(name, 1.0) for name in controller.moves} | dict(setting.values)
    insight = None if needs_of(controller) is None else _StandInInsight(step, setting)
    situation = Situation(step, TOTAL, metrics, knobs, insight)
    moved: Any = findings.attempt(
        f"controller(situation) at step {step} (metrics: {', '.join(metrics) or 'none'})", lambda: controller(situation)
    )
    findings.insist(
        isinstance(moved, Mapping), f"it returned {moved!r:.60}, expected a mapping of knob names to new values"
    )
    others = sorted(set(moved) - set(controller.moves))
    findings.insist(not others, f"it moved {', '.join(others)}, which its moves {tuple(controller.moves)} do not name")
    for name, value in moved.items():
        findings.insist(
            isinstance(value, float | int) and math.isfinite(value),
            f"it gave knob '{name}' the value {value!r} at step {step}, expected a finite number",
        )
    findings.need(metrics == dict(setting.metrics), "it changed the metrics that it was shown; they are the log's")
    return {name: float(value) for name, value in moved.items()}


class _StandInInsight:
    """Losses and gradients that differ by name and step, for a controller that needs some."""

    def __init__(self, step: int, setting: Setting) -> None:
        self.step, self.setting = step, setting

    def losses(self, *names: str) -> dict[str, float]:
        return {name: float(self._drawn(name, 1)) for name in names}

    def gradients(self, *names: str) -> dict[str, Tensor]:
        return {name: self._drawn(name, 8) for name in names}

    def probe(self) -> Rollout:
        return self.setting.credited

    def probe_gradient(self, rollout: Rollout) -> Tensor:
        return self._drawn("probe", 8)

    def moved(self, by: Tensor) -> AbstractContextManager[None]:
        return nullcontext()

    def _drawn(self, name: str, size: int) -> Tensor:
        seed = self.step + 1000 * sum(name.encode())
        return torch.rand(size, generator=torch.Generator().manual_seed(seed))
