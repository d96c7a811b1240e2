"""Health: a few cheap facts of every iteration, and a warning that names the knob to turn when one goes bad."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from regimen.rewards.base import SCORED
from regimen.rollout import Rollout

RATIO_TOLERANCE = 1e-3
SILENT_AFTER = 20


class HealthMonitor:
    """Watches a stage: `observe` returns an iteration's facts; `warnings` counts what was found wrong."""

    def __init__(self) -> None:
        self.warnings: dict[str, int] = {}
        self._silent: dict[str, int] = {}
        self.fresh: list[str] = []

    def observe(
        self,
        rollout: Rollout,
        metrics: Mapping[str, float],
        *,
        expected_tasks: tuple[str, ...] = (),
        first_ratio_deviation: float | None = None,
        skipped: int = 0,
    ) -> dict[str, float]:
        """Facts of this iteration; `fresh` then holds the warnings to show (each at counts 1, 10, 100, ...)."""
        self.fresh = []
        self._tasks(rollout, expected_tasks)
        facts = self._facts(rollout)
        self._components(rollout)
        for name, value in metrics.items():
            if name.endswith("/grad_norm") and value == 0:
                self._warn(f"{name} is 0: nothing was learned in this iteration; look at health/flat_groups")
        if first_ratio_deviation is not None and first_ratio_deviation > RATIO_TOLERANCE:
            self._warn(
                "the ratio before the first update is not 1; the policy is not scored as it was sampled (dropout, "
                "another guidance scale, half precision)",
                f"off by {first_ratio_deviation:.2g}",
            )
        if skipped:
            self._warn(
                "a gradient step was skipped because its loss or gradient was not finite; lower the learning rate"
            )
        return facts

    def _tasks(self, rollout: Rollout, expected: tuple[str, ...]) -> None:
        outcome = 2 * rollout.task + rollout.loss_mask.any(1)
        counts = torch.bincount(outcome, minlength=2 * len(rollout.task_names)).view(-1, 2).tolist()
        found = dict(zip(rollout.task_names, counts, strict=True))
        for task in expected:
            left_out, learned = found.get(task, (0, 0))
            if left_out + learned == 0:
                self._warn(f"task '{task}' has no sample in the batch; raise batch_size or the knob mixture/{task}")
            elif learned == 0 and rollout.reward is not None:
                self._warn(
                    f"no sample of task '{task}' is left to learn from: no reward that trains applies to it, all "
                    "failed, or a credit selected none; look at the counts of its components, and at the names given "
                    "to .on(...)"
                )

    def _facts(self, rollout: Rollout) -> dict[str, float]:
        facts: dict[str, float] = {}
        if rollout.reward is not None:
            facts["health/flat_groups"] = flat_groups(rollout)
            if rollout.advantages is not None and facts["health/flat_groups"] > 0.9:
                self._warn(
                    "over 90 % of the groups have no spread of reward, so they teach nothing; raise the knob "
                    "temperature or noise_level, the group size, or the spread of difficulty"
                )
        if "truncated" in rollout.columns.keys():  # noqa: SIM118
            facts["health/truncated"] = float(rollout["truncated"].float().mean())
            if facts["health/truncated"] > 0.5:
                self._warn("over half of the samples were cut off at the length limit; raise the limit")
        return facts

    def _components(self, rollout: Rollout) -> None:
        for name, status in rollout.status.items() if rollout.status is not None else ():
            value = rollout.rewards[name]
            scored = status == SCORED
            earned = (value != 0 if value.ndim == 1 else (value != 0).any(1)) & scored
            fired = bool(earned.any() | ~scored.any())
            self._silent[name] = 0 if fired else self._silent.get(name, 0) + 1
            if self._silent[name] == SILENT_AFTER:
                self._warn(f"reward component '{name}' has been 0 for {SILENT_AFTER} iterations; is it ever earned?")

    def _warn(self, text: str, detail: str = "") -> None:
        """Count a warning; `detail` is shown, and told apart from no other."""
        count = self.warnings[text] = self.warnings.get(text, 0) + 1
        if str(count).rstrip("0") == "1":
            notes = [note for note in (detail, f"{count} times" if count > 1 else "") if note]
            self.fresh.append(f"{text} ({', '.join(notes)})" if notes else text)

    def state_dict(self) -> dict[str, Any]:
        """Counts so far."""
        return {"warnings": dict(self.warnings), "silent": dict(self._silent)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counts."""
        self.warnings, self._silent = dict(state["warnings"]), dict(state["silent"])


def flat_groups(rollout: Rollout) -> float:
    """Share of groups (of two samples or more) that teach nothing.

    With advantages, those are the groups in which all of them are 0, as group-relative credit makes them for equal
    rewards; a credit that compares with something else may learn from equal ones. Without advantages, they are the
    groups whose members all have the same total reward. Samples that left the loss count nowhere.
    """
    judged = rollout.loss_mask.any(1)
    group = rollout.group[judged]
    if not len(group):
        return 0.0
    _, index, size = group.unique(return_inverse=True, return_counts=True)
    if len(size) == len(group):
        return 0.0
    if rollout.advantages is not None:
        mask = rollout.loss_mask.view(*rollout.loss_mask.shape, *[1] * (rollout.advantages.ndim - 2))
        teaching = ((rollout.advantages != 0) & mask).flatten(1).any(1)
        flat = size == torch.bincount(index[~teaching[judged]], minlength=len(size))
    else:
        total = rollout.reward if rollout.reward.ndim == 1 else (rollout.reward * rollout.mask).sum(1)
        start = torch.full((len(size),), torch.inf, device=total.device)
        low = start.scatter_reduce(0, index, total[judged], "amin")
        flat = (-start).scatter_reduce(0, index, total[judged], "amax") == low
    several = size > 1
    return float((flat & several).sum() / several.sum().clamp(min=1))
