"""Contexts that episodes are drawn from: a fixed number of them, or a fresh one each time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from regimen.functions.categorical import row_uniform

Contexts = dict[str, Tensor]


class TaskPool:
    """Draws a context (a maze, a goal) per episode; the environments of a contextual decision process.

    Attributes:
        make: seeds (int64 `[R]`) to contexts, a table of tensors `[R, ...]`.
        size: how many contexts are made once, of which every episode draws one, uniformly; `None` makes a fresh one
            for every episode.
    """

    def __init__(self, make: Callable[[Tensor], Contexts], size: int | None = None, seed: int = 0) -> None:
        """`seed` decides which contexts are made; `ValueError` for a size below 1."""
        if size is not None and size < 1:
            raise ValueError(f"TaskPool: size is {size}, expected at least 1, or None for a fresh context per episode")
        self.make, self.size = make, size
        self._made: Contexts = {}
        if size is not None:
            self._made = make(torch.randint(2**31, (size,), generator=torch.Generator().manual_seed(seed)))

    def draw(self, seeds: Tensor) -> Contexts:
        """The contexts `[R, ...]` of episodes with these seeds (int64 `[R]`), on the seeds' device."""
        if self.size is None:
            return self.make(seeds)
        index = (row_uniform(seeds, -1) * self.size).long()
        self._made = {name: value.to(seeds.device) for name, value in self._made.items()}
        return {name: value[index] for name, value in self._made.items()}
