"""Sequences of a batch as one row of tokens: no padding, and what several begin with in common only once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """`N` tokens of `B` sequences.

    Attributes:
        ids, positions: int64 `[N]`.
        place: int64 `[B, L]`, which of the tokens stands where; arbitrary after a sequence's end.
        owner: int64 `[N]`, where each token stands (the first place, if it is shared), in the flattened `[B L]`.
        before: int64 `[R]`, the token before each of the steps that are asked for, in row order.
    """

    ids: Tensor
    positions: Tensor
    place: Tensor
    owner: Tensor
    before: Tensor

    @classmethod
    def of(cls, tokens: Tensor, where: Tensor) -> Self:
        """Pack what must be read to predict some tokens, those before each row's last one.

        Args:
            tokens: int64 `[B, T]`.
            where: bool `[B, T]`, the tokens to be predicted, none of them a row's first.
        """
        step = torch.arange(tokens.shape[1], device=tokens.device)
        end = (where * step).amax(1)
        length = int(end.max()) if len(end) else 0
        step, tokens = step[:length], tokens[:, :length]
        # All before a row's first asked step is shared with the rows that begin alike.
        first = torch.minimum(where.int().argmax(1), end)[:, None]
        leader = _leaders(tokens, first[:, 0])
        own = (step >= first) | (leader == torch.arange(len(tokens), device=tokens.device))[:, None]
        needed = own & (step < end[:, None])
        number = needed.flatten().cumsum(0).view(needed.shape) - 1
        place = torch.where(step < first, number[leader], number).clamp(min=0)
        owner = needed.flatten().nonzero().squeeze(-1)
        row, asked = where.nonzero(as_tuple=True)
        return cls(tokens.flatten()[owner], owner % max(length, 1), place, owner, place[row, asked - 1])


def _leaders(tokens: Tensor, lengths: Tensor) -> Tensor:
    """int64 `[B]`, for every row the first row whose first `lengths` tokens are the same."""
    rows, found = tokens.numpy(force=True), dict[bytes, int]()
    keys = [row[:length].tobytes() for row, length in zip(rows, lengths.tolist(), strict=True)]
    return torch.tensor([found.setdefault(key, index) for index, key in enumerate(keys)], device=tokens.device)
