"""Replay: learning from the last samples that were collected, whichever policy collected them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from regimen.memory.base import EMPTY, NewestRollout
from regimen.memory.trajectories import Trajectories
from regimen.memory.transitions import Transitions
from regimen.rollout import Rollout

Unit = Literal["trajectory", "transition"]


class ReplayMemory:
    """The last `capacity` samples, in a preallocated ring; each is drawn as likely as the others.

    Rewards are kept as they were judged, and discounts as they were recorded: whoever looks ahead (`TDObjective`,
    `NStepReturn`) forms its sums when a sample is drawn, so that a discount that has moved since holds for all. Groups
    of different rollouts stay different. Samples without any step to learn from are not kept.

    A drawn rollout has the further column `age` int64 `[B]`: how many samples came after.
    """

    def __init__(
        self,
        capacity: int,
        unit: Unit = "trajectory",
        *,
        ahead: int = 0,
        per_task: bool | Mapping[str, float] = False,
        device: torch.device | str | None = None,
    ) -> None:
        """Make an empty memory.

        Args:
            capacity: samples that are kept; of each task, if they are kept apart.
            unit: what a sample is: a `"trajectory"` as it was collected, padded to the longest; or a `"transition"`, a
                single step (not for a policy with memory, which is replayed from a trajectory's start). A reward `[B]`
                is then that of the last step. `next_observations` that the step after shows are not kept twice.
            ahead: of transitions, how many of the steps that came next are drawn with each, for sums of `ahead + 1`
                rewards. They are not learned from, and masked where the trajectory ended.
            per_task: keep a ring for each task, and draw equally from those there are, or in the proportions given.
            device: where samples are kept; by default where they were collected.

        Raises:
            ValueError: a capacity below 1, an unknown unit, steps ahead of trajectories, or a share that is not above
                0.
        """
        if capacity < 1 or unit not in get_args(Unit) or ahead < 0 or (ahead and unit == "trajectory"):
            raise ValueError(
                f"ReplayMemory: capacity is {capacity}, expected at least 1; unit is '{unit}', expected one of "
                f"{', '.join(get_args(Unit))}; ahead is {ahead}, expected 0, or more if the unit is 'transition'"
            )
        if isinstance(per_task, Mapping) and not all(share > 0 for share in per_task.values()):
            raise ValueError(f"ReplayMemory: per_task is {dict(per_task)}; expected shares above 0")
        self.capacity, self.unit, self.ahead, self.per_task, self.device = capacity, unit, ahead, per_task, device
        self._newest = NewestRollout()
        self._clear()

    def _clear(self) -> None:
        # Of each task, or of all under the name "".
        self._kept: dict[str, Trajectories | Transitions] = {}
        self._names: tuple[str, ...] = ()
        self._groups = 0

    def _store(self) -> Trajectories | Transitions:
        return Trajectories(self.capacity) if self.unit == "trajectory" else Transitions(self.capacity, self.ahead)

    def __len__(self) -> int:
        return sum(len(store) for store in self._kept.values())

    def add(self, rollout: Rollout) -> None:
        """Store a rollout's samples over the oldest ones.

        Raises:
            ValueError: it has other fields than those kept; a task without a share; transitions of a policy with
                memory.
        """
        alive = rollout.loss_mask.any(1)
        kept = rollout if bool(alive.all()) else rollout[alive]
        if len(kept):
            self._keep(kept.to(self.device) if self.device is not None else kept)
        self._newest.add(rollout)

    def _keep(self, rollout: Rollout) -> None:
        names = tuple(dict.fromkeys([*self._names, *rollout.task_names]))
        index = torch.tensor([names.index(name) for name in rollout.task_names], device=rollout.task.device)
        numbered = rollout.replace(task=index[rollout.task], group=rollout.group + self._groups)
        whole = Rollout(numbered.data, names)
        parts = {name: whole.of_task(name) for name in rollout.task_names} if self.per_task else {"": whole}
        for name, part in parts.items():
            self._check_share(name)
            if len(part):
                store = self._kept[name] if name in self._kept else self._store()
                store.add(part)
                self._kept[name] = store
        self._names, self._groups = names, int(numbered.group.max()) + 1

    def _check_share(self, task: str) -> None:
        if isinstance(self.per_task, Mapping) and task not in self.per_task:
            raise ValueError(
                f"ReplayMemory was given samples of task '{task}', which has no share in per_task="
                f"{dict(self.per_task)}; name every task of the stage"
            )

    def newest(self) -> Rollout:
        """The rollout that came last, as it came."""
        return self._newest.newest()

    def sample(self, size: int, rng: torch.Generator) -> Rollout:
        """`size` samples, drawn with replacement; on the generator's device."""
        if not len(self):
            raise ValueError(EMPTY)
        counts = self._counts(size, rng) if len(self._kept) > 1 else [size]
        stores = zip(self._kept.values(), counts, strict=True)
        return Rollout.cat([Rollout(store.draw(n, rng), self._names) for store, n in stores if n]).to(rng.device)

    def last(self, size: int | None = None) -> Rollout:
        """The newest `size` samples of each ring, the oldest of them first; by default all that is kept.

        Raises:
            ValueError: the memory is empty.
        """
        if not len(self):
            raise ValueError(EMPTY)
        return Rollout.cat([Rollout(store.last(size), self._names) for store in self._kept.values()])

    def _counts(self, size: int, rng: torch.Generator) -> list[int]:
        """How many samples of each task: within 1 of its share of `size`, and its share in the mean."""
        shares = self.per_task if isinstance(self.per_task, Mapping) else dict.fromkeys(self._kept, 1.0)
        share = torch.tensor([shares[name] for name in self._kept], dtype=torch.float64)
        start: Tensor = torch.rand((), generator=rng, device=rng.device, dtype=torch.float64).cpu()
        edges = (share.cumsum(0) / share.sum() * size + start).floor().long()
        edges[-1] = size
        return edges.diff(prepend=edges.new_zeros(1)).tolist()

    def state_dict(self) -> dict[str, Any]:
        """What is kept; slots that have never been filled are left out."""
        kept = {name: store.state_dict() for name, store in self._kept.items()}
        settings = {"capacity": self.capacity, "unit": self.unit}
        return {"kept": kept, "names": list(self._names), "groups": self._groups, **settings}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it; `ValueError` if it was of another capacity or unit, where the oldest would be another."""
        if (state["capacity"], state["unit"]) != (self.capacity, self.unit):
            raise ValueError(
                f"ReplayMemory: capacity is {self.capacity} and the checkpoint's {state['capacity']}, unit is "
                f"'{self.unit}' and the checkpoint's '{state['unit']}'; resume with the settings of the run that "
                "saved it"
            )
        self._clear()
        self._names, self._groups = tuple(state["names"]), int(state["groups"])
        for name, saved in state["kept"].items():
            self._kept[name] = self._store()
            self._kept[name].load_state_dict(saved)
