"""A centre with corridors, one of which ends at a goal."""

from __future__ import annotations

import torch
from torch import Tensor

from regimen.tasks.environments.tensor.pool import Contexts, TaskPool
from regimen.tasks.environments.tensor.walk import Walk


class Corridors(Walk):
    """A centre (cell 0) and corridors that lead away from it; a goal is at the end of one of them.

    Corridor `i` has the cells `1 + i length` (beside the centre) to `(i + 1) length`. There are as many actions as
    corridors: in the centre, action `i` enters corridor `i`; in a corridor 0 goes forward, 1 goes back, and the others
    stay. The cell is seen. An episode is over for good at the limit. After Henaff et al. (2023), where every episode
    offers the same places in the same roles.
    """

    def __init__(
        self,
        count: int,
        *,
        corridors: int = 5,
        length: int = 8,
        limit: int = 10,
        limit_terminates: bool = True,
        pool: int | None = 1,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        """Make the copies.

        Args:
            count: how many.
            corridors, length: how many corridors, and cells in each.
            limit, limit_terminates, device: see `TensorEnv`.
            pool: how many goals are drawn, once; by default one, for all episodes. `None` draws one per episode.
            seed: which goals.

        Raises:
            ValueError: fewer than two corridors, or no cells in them.
        """
        if corridors < 2 or length < 1:
            raise ValueError(f"Corridors: corridors={corridors}, length={length}; expected at least 2 and 1")
        self.corridors, self.length = corridors, length
        contexts = TaskPool(self._contexts, pool, seed)
        super().__init__(
            count, contexts, 1 + corridors * length, corridors,
            limit=limit, limit_terminates=limit_terminates, device=device,
        )  # fmt: skip

    def _contexts(self, seeds: Tensor) -> Contexts:
        ends = 1 + torch.arange(self.corridors, device=seeds.device) * self.length + self.length - 1
        goal = torch.zeros(len(seeds), 1 + self.corridors * self.length, dtype=torch.bool, device=seeds.device)
        goal.scatter_(1, ends[seeds % self.corridors][:, None], True)
        onward = self._onward().to(seeds.device).expand(len(seeds), -1, -1)
        return {"onward": onward, "start": torch.zeros_like(seeds), "goal": goal}

    def _onward(self) -> Tensor:
        """`[C, A]`, where the actions lead."""
        cell = torch.arange(1 + self.corridors * self.length)
        depth = torch.where(cell > 0, (cell - 1) % self.length + 1, 0)
        onward = cell[:, None].repeat(1, self.corridors)
        onward[:, 0] = torch.where(depth < self.length, cell + 1, cell)
        onward[:, 1] = torch.where(depth > 1, cell - 1, 0)
        onward[0] = 1 + torch.arange(self.corridors) * self.length
        return onward
