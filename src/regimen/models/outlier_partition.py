"""Two heads that tasks mix, each in its own proportion, so that outlier tasks do not spoil what the others share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class OutlierPartition(nn.Module):
    """`(1 - s_t) non(h) + s_t out(h)` of hidden states, `s_t = sigmoid(theta_t)` being learned for each task `t`.

    The second block of R-MTGB (arXiv 2507.11411) with networks in the place of trees. This is our extension: the paper
    has boosting only. `theta` is trained with the heads, by the same gradient, `-sum g s (1 - s) (out - non)`.
    """

    def __init__(self, head: Callable[[], nn.Module], tasks: int) -> None:
        """Make both heads.

        Args:
            head: makes one, hidden states `[B, ...]` to outputs `[B, ...]`; called twice.
            tasks: how many.

        Raises:
            ValueError: there is no task.
        """
        super().__init__()
        if tasks < 1:
            raise ValueError(f"OutlierPartition: tasks is {tasks}, expected at least 1")
        self.non_outlier, self.outlier = head(), head()
        self.theta = nn.Parameter(0.1 * torch.randn(tasks))

    def forward(self, hidden: Tensor, task: Tensor) -> Tensor:
        """Outputs `[B, ...]` of hidden states and their tasks, int64 `[B]`."""
        other, odd = self.non_outlier(hidden), self.outlier(hidden)
        share = self.theta.sigmoid()[task].view(-1, *[1] * (odd.ndim - 1))
        mixed: Tensor = other + share * (odd - other)
        return mixed

    @property
    def outlier_score(self) -> Tensor:
        """`sigmoid(theta) [tasks]`, turned around if more than half of them are above 0.5: outliers are the fewer."""
        share = self.theta.detach().sigmoid()
        return 1 - share if (share > 0.5).float().mean() > 0.5 else share
