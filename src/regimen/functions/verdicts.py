"""Verdicts on pairs: a judge's odds that the first of two is better, and what position bias does to them."""

from __future__ import annotations

import torch
from torch import Tensor


def symmetric_probability(margin: Tensor, swapped: Tensor) -> Tensor:
    """`(sigma(margin) + 1 - sigma(swapped)) / 2`: the probability that `a` beats `b`, whichever is shown first; `[R]`.

    It is 1/2 where the two are the same, and that of `a` over `b` and of `b` over `a` add up to 1.

    Args:
        margin: the judge's log-odds that the first is better where `a` is shown first; `l_yes - l_no` of a judge that
            answers by a word.
        swapped: the same where `b` is shown first.

    Raises:
        ValueError: unequal shapes.
    """
    if margin.shape != swapped.shape:
        raise ValueError(f"symmetric_probability: margins {list(margin.shape)} and {list(swapped.shape)}; expected one")
    return (torch.sigmoid(margin) + torch.sigmoid(-swapped)) / 2


def learned_once(mask: Tensor, last: float, rng: torch.Generator) -> Tensor:
    """A `loss_mask`, bool `[B, T]`, with one step of each sample, drawn evenly from the last part of its steps.

    Of `n` existing steps they are those from `ceil((1 - last) n)` to `n - 1`, and at least the last one.

    Args:
        mask: bool `[B, T]`, the steps that exist.
        last: the share of steps drawn from, in (0, 1].

    Raises:
        ValueError: a share outside (0, 1], or a sample without steps.
    """
    count = mask.sum(1)
    if not 0 < last <= 1 or bool((count == 0).any()):
        raise ValueError(
            f"learned_once: last={last}, and the shortest sample has {int(count.min())} steps; expected a share in "
            "(0, 1] and at least one step"
        )
    first = ((1 - last) * count.double() - 1e-9).ceil().long().clamp(min=0)
    first = torch.minimum(first, count - 1)
    drawn = torch.rand(len(mask), generator=rng, device=mask.device)
    place = first + (drawn * (count - first)).long().clamp(max=count - first - 1)
    return mask & (mask.cumsum(1) == place[:, None] + 1)
