"""Measures of forecast trajectories, and the straight lines that forecasts are compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def min_ade(paths: Tensor, truth: Tensor) -> Tensor:
    """Mean over samples of the smallest mean displacement among `K` forecasts (minADE), `[]`, in the paths' unit.

    Args:
        paths: `[B, K, T, 2]`.
        truth: `[B, T, 2]`.

    Raises:
        ValueError: the shapes do not fit.
    """
    return _displacement("min_ade", paths, truth).mean(2).amin(1).mean()


def min_fde(paths: Tensor, truth: Tensor) -> Tensor:
    """Mean over samples of the smallest displacement at the last step among `K` forecasts (minFDE), `[]`.

    The best forecast is chosen for this measure alone: it need not be the one of `min_ade`. Arguments are the same.
    """
    return _displacement("min_fde", paths, truth)[..., -1].amin(1).mean()


def _displacement(owner: str, paths: Tensor, truth: Tensor) -> Tensor:
    if paths.ndim != 4 or not paths.shape[1] or truth.shape != paths[:, 0].shape:
        raise ValueError(
            f"{owner}: paths {list(paths.shape)} and truth {list(truth.shape)}; expected [B, K, T, 2] with K at least "
            "1, and [B, T, 2]"
        )
    return (paths - truth[:, None]).norm(dim=-1)


def central(points: Tensor) -> Tensor:
    """Index int64 `[B]` of the point of each row that is nearest to the others in the mean, of points `[B, K, D]`."""
    return torch.cdist(points, points).sum(2).argmin(1)


def straight_on(past: Tensor, steps: int, over: int = 2) -> Tensor:
    """Positions `[B, steps, D]` on the line that fits the last positions best in the least squares.

    Args:
        past: `[B, P, D]`, equally spaced in time.
        steps: how far to go on.
        over: the number of last positions that the line is fitted to; 2 is constant velocity.

    Raises:
        ValueError: `over` is not between 2 and `P`.
    """
    if not 2 <= over <= past.shape[1]:
        raise ValueError(f"straight_on: over={over}, expected from 2 to the {past.shape[1]} positions that there are")
    fitted = past[:, -over:]
    time = torch.arange(over, dtype=past.dtype, device=past.device) - (over - 1) / 2
    slope = (time[:, None] * fitted).sum(1) / time.square().sum()
    ahead = torch.arange(1, steps + 1, dtype=past.dtype, device=past.device) + (over - 1) / 2
    return fitted.mean(1, keepdim=True) + ahead[:, None] * slope[:, None]
