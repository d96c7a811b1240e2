"""Grids with walls and goals, drawn as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from regimen.functions.categorical import row_uniform
from regimen.knobs import Knob
from regimen.tasks.environments.tensor.mazes import MOVES
from regimen.tasks.environments.tensor.pool import Contexts, TaskPool
from regimen.tasks.environments.tensor.walk import Walk


class GridWorld(Walk):
    """A grid drawn as lines of text: `#` a wall, `.` a free cell, `S` a start, `G` a goal.

    Cells are numbered row by row, walls included, and the number is seen. The actions are up, right, down and left;
    walls and the border leave one where one is. Every episode begins at one of the starts, drawn uniformly. The knob
    `slip`, read at a reset, is the probability that a step goes in a direction drawn at random instead.
    """

    def __init__(
        self,
        count: int,
        lines: Sequence[str],
        *,
        limit: int = 100,
        limit_terminates: bool = False,
        slip: float = 0.0,
        device: torch.device | str = "cpu",
    ) -> None:
        """Make the copies.

        Args:
            count: how many.
            lines: the drawing, all lines equally long.
            limit, limit_terminates, device: see `TensorEnv`.
            slip: default of the knob.

        Raises:
            ValueError: lines of unequal length, another letter, no start or no goal.
        """
        text = "".join(lines)
        if {len(line) for line in lines} != {len(lines[0])} or set(text) - set("#.SG") or not {"S", "G"} <= set(text):
            raise ValueError(
                f"GridWorld: the drawing is {list(lines)}; expected lines of one length, of the letters #.SG, with a "
                "start S and a goal G"
            )
        self.lines, self._text = tuple(lines), text
        self._onward = _onward(lines).to(device)
        super().__init__(
            count, TaskPool(self._contexts), len(text), len(MOVES),
            limit=limit, limit_terminates=limit_terminates, device=device,
        )  # fmt: skip
        self.knobs = (Knob("slip", slip, 0.0, 1.0, doc="probability that a step goes in a random direction"),)

    def _cells(self, letter: str) -> Tensor:
        return torch.tensor([letter == here for here in self._text], device=self.device)

    def _contexts(self, seeds: Tensor) -> Contexts:
        starts = self._cells("S").nonzero().flatten()
        return {
            "onward": self._onward.expand(len(seeds), -1, -1),
            "start": starts[(row_uniform(seeds, -2) * len(starts)).long()],
            "goal": self._cells("G").expand(len(seeds), -1),
        }

    def start(self, seeds: Tensor, knobs: Mapping[str, float]) -> dict[str, Tensor]:
        """One of the starts, and the knob."""
        slip = torch.full(seeds.shape, knobs["slip"], dtype=torch.float64, device=seeds.device)
        return {**super().start(seeds, knobs), "slip": slip}

    def move(self, actions: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor, dict[str, Tensor]]:
        """Go where the action leads, or slip."""
        slips = self.uniform(0, 2) < self.state["slip"]
        return super().move(torch.where(slips, (self.uniform(1, 2) * len(MOVES)).long(), actions))


def _onward(lines: Sequence[str]) -> Tensor:
    """`[C, 4]`, where the moves lead from every cell."""
    rows, columns = len(lines), len(lines[0])
    onward = torch.arange(rows * columns)[:, None].repeat(1, len(MOVES))
    for cell in range(rows * columns):
        for move, (down, right) in enumerate(MOVES):
            row, column = cell // columns + down, cell % columns + right
            if 0 <= row < rows and 0 <= column < columns and lines[row][column] != "#":
                onward[cell, move] = row * columns + column
    return onward
