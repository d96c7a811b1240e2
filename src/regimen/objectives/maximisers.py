"""Implicit maximisers: losses of `Q - V` that draw a value to nearly the best that data do in a state.

They see only actions in the data. What they are drawn to, and how far above the mean, is the f of a regularised
dual: Sikchi et al. 2024 ("Dual RL", eq. 10), where expectiles (IQL) and Gumbel regression (XQL) are cases of it.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Maximiser(Protocol):
    """A loss per step of `x = Q - V`."""

    def __call__(self, difference: Tensor) -> Tensor:
        """The loss of differences of any shape, in the same shape, with a gradient."""
        ...


def expectile_loss(difference: Tensor, expectile: float) -> Tensor:
    """`|expectile - 1[x < 0]| x^2`, any shape: least where the value is that expectile of its targets.

    Args:
        difference: target minus value.
        expectile: in (0, 1); 0.5 is half of the squared error, whose minimum is the mean, and near 1 it is the maximum.

    Raises:
        ValueError: an expectile outside (0, 1).
    """
    if not 0 < expectile < 1:
        raise ValueError(f"expectile_loss: expectile is {expectile}, expected between 0 and 1")
    return (expectile - (difference < 0).to(difference.dtype)).abs() * difference.square()


def chi_square_conjugate(slope: Tensor) -> Tensor:
    """`y + y^2 / 4`, the convex conjugate of `f(x) = (x - 1)^2`, any shape (Sikchi et al. 2024, table 4)."""
    return slope + slope.square() / 4


def surrogate_loss(conjugate: Tensor, difference: Tensor, level: float) -> Tensor:
    """`level f(x) - (1 - level) x`, with `f` 0 for `x <= 0` (Sikchi et al. 2024, eq. 10, less the constant in V).

    Args:
        conjugate: f*(x), any shape; what it is for `x <= 0` does not matter.
        difference: `x = Q - V`.
        level: weight of what lies above the value, against that of the value itself.
    """
    # For x < -4, y + y^2 / 4 is positive again: cutting it off at 0, as the released code does, would not do.
    above = torch.where(difference > 0, conjugate, 0)
    return level * above - (1 - level) * difference


def gumbel_loss(difference: Tensor, scale: float, clip: float | None = None, rescale: bool = False) -> Tensor:
    """`exp(z) - z - 1` with `z = x / scale`, any shape: least at `scale log E exp(Q / scale)`.

    XQL's Gumbel regression (Garg et al. 2023, eq. 10).

    Args:
        difference: `x = Q - V`.
        scale: the smaller, the nearer to the maximum.
        clip: `z` is cut off at it, and has no gradient beyond.
        rescale: divide by `exp(M)`, `M` the largest `z` of all that is given, at least -1, without a gradient. The
            minimum stays, and the learning rate changes from batch to batch.

    Raises:
        ValueError: a scale or clip that is not positive.
    """
    if scale <= 0 or (clip is not None and clip <= 0):
        raise ValueError(f"gumbel_loss: scale is {scale} and clip {clip}, expected above 0 (no clip: None)")
    z = difference / scale
    z = z if clip is None else z.clamp(max=clip)
    if not rescale:
        return z.exp() - z - 1
    most = z.detach().max().clamp(min=-1) if z.numel() else z.new_zeros(())
    return (z - most).exp() - (z + 1) * (-most).exp()


@dataclass(frozen=True)
class Expectile:
    """IQL's (Kostrikov et al. 2022, eq. 5): an expectile of Q; see `expectile_loss`."""

    level: float = 0.9

    def __post_init__(self) -> None:
        _check("Expectile", self.level, 0.0)

    def __call__(self, difference: Tensor) -> Tensor:
        """`expectile_loss`."""
        return expectile_loss(difference, self.level)


@dataclass(frozen=True)
class TotalVariation:
    """f-DVL's with total variation: the `(2 level - 1) / level` quantile of Q, whatever the rewards' scale."""

    level: float = 0.8

    def __post_init__(self) -> None:
        _check("TotalVariation", self.level, 0.5, "at 0.5 and below nothing holds V up, at 1 nothing down")

    def __call__(self, difference: Tensor) -> Tensor:
        """`surrogate_loss` with f*(x) = x."""
        return surrogate_loss(difference, difference, self.level)


@dataclass(frozen=True)
class ChiSquare:
    """f-DVL's with Pearson's chi-square: its pull grows with Q - V, so rewards' scale counts as in XQL.

    A level of 0.5 or less is warned of: V then lies below the mean of Q.
    """

    level: float = 0.7

    def __post_init__(self) -> None:
        _check("ChiSquare", self.level, 0.0)
        if self.level <= 0.5:
            warnings.warn(
                f"ChiSquare: level is {self.level}; at 0.5 and below V lies below the mean of Q; raise it",
                stacklevel=3,
            )

    def __call__(self, difference: Tensor) -> Tensor:
        """`surrogate_loss` with f*(x) = x + x^2 / 4."""
        return surrogate_loss(chi_square_conjugate(difference), difference, self.level)


@dataclass(frozen=True)
class Gumbel:
    """XQL's (Garg et al. 2023): the log of the mean exponential of Q; see `gumbel_loss`.

    Its defaults are those of the released code. `rescale` looks at all differences that it is given: micro-batches
    do not add up to the minibatch exactly.
    """

    scale: float = 1.0
    clip: float | None = 7.0
    rescale: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf or (self.clip is not None and self.clip <= 0):
            raise ValueError(f"Gumbel: scale is {self.scale} and clip {self.clip}, expected above 0 (no clip: None)")

    def __call__(self, difference: Tensor) -> Tensor:
        """`gumbel_loss`."""
        return gumbel_loss(difference, self.scale, self.clip, self.rescale)


def _check(owner: str, level: float, above: float, why: str = "") -> None:
    if not above < level < 1:
        reason = f": {why}; V is unbounded" if why else ""
        raise ValueError(f"{owner}: level is {level}, expected between {above:g} and 1{reason}")
