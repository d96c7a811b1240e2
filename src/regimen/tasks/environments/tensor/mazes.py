"""Mazes that are random spanning trees, seen from within."""

from __future__ import annotations

from random import Random
from typing import Any

import gymnasium.spaces as spaces
import torch
from tensordict import TensorDict
from torch import Tensor

from regimen.tasks.environments.base import Observations
from regimen.tasks.environments.tensor.pool import Contexts, TaskPool
from regimen.tasks.environments.tensor.walk import Walk

MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))
"""Rows and columns of the actions: up, right, down, left."""


class Mazes(Walk):
    """Mazes of `size x size` cells without loops, from the first cell to the last (Henaff et al. 2023, contextual).

    The actions are up, right, down and left; a wall leaves one where one is. What is seen are the four walls of the
    cell and the last action, one of `16 * 5` numbers: `5 w + l` with `w` the walls as bits (up 8, right 4, down 2,
    left 1) and `l` the last action's number from 1, or 0. So what can be learned is a way to follow walls, the same in
    every maze. An episode is over for good at the limit.

    With `shows_cell` the observations are a table of that number, `sight`, and of the `cell`, for a judge that counts
    visits; the policy is to read `sight` alone.
    """

    def __init__(
        self,
        count: int,
        *,
        size: int = 6,
        limit: int = 60,
        limit_terminates: bool = True,
        pool: int | None = None,
        seed: int = 0,
        shows_cell: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        """Make the copies.

        Args:
            count: how many.
            size: of a side, in cells.
            limit, limit_terminates, device: see `TensorEnv`.
            pool: how many mazes are made, once, of which every episode draws one; by default each has a fresh one.
            seed: which mazes.
            shows_cell: see above.

        Raises:
            ValueError: a side of fewer than two cells.
        """
        if size < 2:
            raise ValueError(f"Mazes: size is {size}, expected at least 2")
        self.size, self.shows_cell = size, shows_cell
        contexts = TaskPool(self._contexts, pool, seed)
        super().__init__(
            count, contexts, size * size, len(MOVES), limit=limit, limit_terminates=limit_terminates, device=device
        )
        sight: Any = spaces.Discrete(2 ** len(MOVES) * (len(MOVES) + 1))
        self.observation_space = spaces.Dict({"sight": sight, "cell": self.observation_space}) if shows_cell else sight
        self._bits = torch.tensor([8, 4, 2, 1], device=self.device)

    def _contexts(self, seeds: Tensor) -> Contexts:
        cells = self.size**2
        passages = torch.stack([spanning_tree(self.size, self.size, seed) for seed in seeds.tolist()]).to(seeds.device)
        cell = torch.arange(cells, device=seeds.device)[:, None]
        steps = torch.tensor([row * self.size + column for row, column in MOVES], device=seeds.device)
        goal = torch.zeros(len(seeds), cells, dtype=torch.bool, device=seeds.device)
        goal[:, -1] = True
        return {"onward": torch.where(passages, cell + steps, cell), "start": torch.zeros_like(seeds), "goal": goal}

    def observe(self) -> Observations:
        """The walls and the last action."""
        cell = self.state["cell"]
        walls = self.state["onward"][self._copies, cell] == cell[:, None]
        sight = (walls * self._bits).sum(1) * (len(MOVES) + 1) + self.state["last"]
        return TensorDict({"sight": sight, "cell": cell}, [self.count]) if self.shows_cell else sight


def spanning_tree(rows: int, columns: int, seed: int) -> Tensor:
    """A random spanning tree of a grid, by depth-first search from the first cell.

    Returns:
        bool `[rows * columns, 4]`: whether one can go up, right, down and left from each cell.
    """
    random, passages = Random(seed), torch.zeros(rows * columns, len(MOVES), dtype=torch.bool)
    seen, path = {(0, 0)}, [(0, 0)]
    while path:
        row, column = path[-1]
        ways = [
            (move, there)
            for move, (down, right) in enumerate(MOVES)
            if (there := (row + down, column + right)) not in seen and 0 <= there[0] < rows and 0 <= there[1] < columns
        ]
        if not ways:
            path.pop()
            continue
        move, there = random.choice(ways)
        passages[row * columns + column, move] = True
        passages[there[0] * columns + there[1], (move + 2) % len(MOVES)] = True
        seen.add(there)
        path.append(there)
    return passages
