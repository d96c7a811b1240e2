"""Rollouts of known visits, and a small corridor, that tests of exploration bonuses share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium.spaces as spaces
import torch
from torch import Tensor

from regimen.knobs import Knob
from regimen.rewards import Expression, Scene, judge
from regimen.rollout import Rollout
from regimen.storage import pack_tree, unpack_tree
from regimen.tasks.environments import Change


def walked(*copies: Sequence[str], task: str = "walk", goes_on: str = "") -> Rollout:
    """What each copy went through, as episodes of letters ("ABAC" starts in A and takes three steps).

    States are the letters' numbers. The first episode of every copy named in `goes_on` ("0", "01") began before.
    """
    rows = []
    for number, episodes in enumerate(copies):
        before, after, start = [], [], []
        for index, episode in enumerate(episodes):
            letters = [ord(letter) - ord("A") for letter in episode]
            before += letters[:-1]
            after += letters[1:]
            start += [not (index == 0 and str(number) in goes_on)] + [False] * (len(letters) - 2)
        rows.append((before, after, start))
    steps = max(len(before) for before, _, _ in rows)

    def padded(column: int, fill: Any) -> Tensor:
        return torch.tensor([row[column] + [fill] * (steps - len(row[column])) for row in rows])

    lengths = torch.tensor([len(before) for before, _, _ in rows])
    return Rollout.create(
        task=task,
        group=torch.zeros(len(rows), dtype=torch.int64),
        mask=torch.arange(steps) < lengths[:, None],
        observations=padded(0, 25),
        columns={"copy": torch.arange(len(rows))},
        step_columns={"next_observations": padded(1, 25), "start": padded(2, True)},
    )


def wandering(
    copies: int, steps: int, pieces: int, states: int = 4, seed: int = 0, task: str = "walk"
) -> list[Rollout]:
    """Stretches of copies that wander among states at random, and whose episodes end at random."""
    rng = torch.Generator().manual_seed(seed)
    total = steps * pieces
    before, after = torch.randint(states, (2, copies, total), generator=rng)
    start = torch.rand(copies, total, generator=rng) < 0.2
    start[:, 0] = True
    before[:, 1:] = torch.where(start[:, 1:], before[:, 1:], after[:, :-1])

    def piece(first: int) -> Rollout:
        window = slice(first, first + steps)
        return Rollout.create(
            task=task,
            group=torch.zeros(copies, dtype=torch.int64),
            mask=torch.ones(copies, steps, dtype=torch.bool),
            observations=before[:, window],
            columns={"copy": torch.arange(copies)},
            step_columns={"next_observations": after[:, window], "start": start[:, window]},
        )

    return [piece(first) for first in range(0, total, steps)]


def scored(reward: Expression, rollout: Rollout, cast: Mapping[str, Any] | None = None, **knobs: float) -> Tensor:
    """The total of a reward, which nothing failed; weights have their defaults."""
    values = {knob.name: knob.default for knob in reward.knobs} | knobs
    judged, report = judge(reward, rollout, Scene(cast or {}, values))
    assert report.errors == ()
    total: Tensor = judged.reward
    return total


def restored(old: Expression, new: Expression) -> Expression:
    """`new` with the state of `old`, after a way through a checkpoint's bytes."""
    new.load_state_dict(unpack_tree(pack_tree(old.state_dict())))
    return new


class Corridor:
    """Cells in a row; one of two actions goes right, in every other cell the other. The right end pays 1 and ends."""

    def __init__(self, count: int, length: int = 6, limit: int = 20) -> None:
        self.count, self.length, self.limit, self.device = count, length, limit, torch.device("cpu")
        self.observation_space, self.action_space = spaces.Discrete(length), spaces.Discrete(2)
        self.knobs: tuple[Knob, ...] = ()
        self.cell, self.clock = torch.zeros(2, count, dtype=torch.int64)

    def reset(self, rows: Tensor, seeds: Tensor, knobs: Mapping[str, float]) -> Tensor:
        """Start at the left end, or one cell further."""
        self.cell = torch.where(rows, seeds % 2, self.cell)
        self.clock = torch.where(rows, 0, self.clock)
        return self.cell.clone()

    def step(self, actions: Tensor) -> Change:
        """Move, within the walls."""
        self.cell = (self.cell + 2 * ((actions + self.cell) % 2) - 1).clamp(0, self.length - 1)
        self.clock = self.clock + 1
        there = self.cell == self.length - 1
        return Change(self.cell.clone(), there.float(), there, self.clock >= self.limit)

    def state_dict(self) -> dict[str, Any]:
        """Where every copy is."""
        return {"cell": self.cell.clone(), "clock": self.clock.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put them back there."""
        self.cell, self.clock = state["cell"], state["clock"]

    def close(self) -> None:
        """Nothing is held."""
