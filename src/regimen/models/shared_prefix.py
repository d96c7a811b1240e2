"""Keys and values of rows that continue some prefixes: each prefix's once, and every row's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

CHUNK_BYTES = 2**20
"""Size of the first chunks of a layer's keys. A chunk is read as a whole, without gaps in memory: reading the filled
places of one large cache takes a processor three times as long. Calls for smaller ones cost more than their reading."""

PLACES = (16, 64)
"""Fewest and most places of the first chunks."""

SHARE = 4
"""A new chunk has one place for so many that are filled: little is read in vain, and the chunks stay few."""


@dataclass
class _Own:
    """Keys and values of the rows' own tokens, of one layer, in chunks `[B, Hkv, places, d]`.

    The last `free` places of the last chunk are not filled. Values are 0 there, as they take part with a share of 0.
    """

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    length: int = 0
    free: int = 0

    def append(self, key: Tensor, value: Tensor) -> None:
        if not self.free:
            fewest, most = PLACES
            places = CHUNK_BYTES // (key.numel() * key.element_size())
            self.free = max(fewest, min(places, most), self.length // SHARE)
            shape = (*key.shape[:2], self.free, key.shape[2])
            self.keys.append(key.new_empty(shape))
            self.values.append(key.new_zeros(shape))
        self.keys[-1][:, :, -self.free], self.values[-1][:, :, -self.free] = key, value
        self.length, self.free = self.length + 1, self.free - 1

    def choose(self, rows: Tensor) -> None:
        self.keys, self.values = ([x.index_select(0, rows) for x in chunks] for chunks in (self.keys, self.values))


@dataclass
class _Groups:
    """Which of `U` prefixes each row continues.

    Attributes:
        prefix: int64 `[B]`.
        count: of prefixes; width: rows of the largest group.
        slot: int64 `[B]`, each row's place among `[U, width]`; `None` if that is the order of the rows.
    """

    prefix: Tensor
    count: int = field(init=False)
    width: int = field(init=False)
    slot: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        order = self.prefix.argsort(stable=True)
        counts = self.prefix.bincount()
        first = counts.cumsum(0) - counts
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device) - first[self.prefix[order]]
        self.count, self.width = len(counts), int(counts.max())
        slot = self.prefix * self.width + rank
        whole = torch.arange(self.count * self.width, device=slot.device)
        self.slot = None if torch.equal(slot, whole) else slot

    def gather(self, rows: Tensor) -> Tensor:
        """`[B, Hkv, r, n]` by rows to `[U Hkv, width r, n]` by prefixes; 0 where a group has no row."""
        if self.slot is not None:
            rows = rows.new_zeros(self.count * self.width, *rows.shape[1:]).index_copy_(0, self.slot, rows)
        heads, more, size = rows.shape[1:]
        return rows.view(-1, self.width, heads, more, size).transpose(1, 2).reshape(-1, self.width * more, size)

    def spread(self, groups: Tensor, heads: int) -> Tensor:
        """Back: `[U Hkv, width r, n]` to `[B Hkv, r, n]`."""
        parts = groups.view(-1, heads, self.width, groups.shape[1] // self.width, groups.shape[2]).transpose(1, 2)
        rows = parts.flatten(0, 1) if self.slot is None else parts.flatten(0, 1).index_select(0, self.slot)
        return rows.flatten(0, 1)


class SharedPrefixCache:
    """Attention of one more token per row to a prefix that several rows share, and to the row's own tokens.

    All queries of a group meet the keys of its prefix in one matrix product (Juravsky et al. 2024, Hydragen). The
    softmax is over both parts together.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], real: Tensor, rows: Tensor) -> None:
        """Take what was read of the prefixes.

        Args:
            layers: keys and values `[U, Hkv, P, d]` of each layer.
            real: bool `[U, P]`, where it is not padding; some of every prefix.
            rows: int64 `[B]`, the prefix that each row continues.
        """
        self._prefixes, self._real = list(layers), real
        self._heads = layers[0][0].shape[1]
        self._own = [_Own() for _ in layers]
        self._group(rows)

    def _group(self, prefix: Tensor) -> None:
        """Note which prefix each row continues, and leave out those that none does."""
        used, prefix = prefix.unique(return_inverse=True)
        if len(used) < len(self._real):
            self._prefixes = [(keys[used], values[used]) for keys, values in self._prefixes]
            self._real = self._real[used]
        self._groups = _Groups(prefix)
        bias = torch.zeros(self._real.shape, dtype=self._prefixes[0][0].dtype, device=self._real.device)
        bias.masked_fill_(~self._real, -torch.inf)
        self._bias = bias.repeat_interleave(self._heads, 0)[:, None]

    def choose(self, rows: Tensor) -> None:
        """Keep some rows, int64 `[R]`."""
        for own in self._own:
            own.choose(rows)
        self._group(self._groups.prefix[rows])

    def attend(self, query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
        """Append a token to every row, and attend to all there is.

        Args:
            query: `[B, H, d]`; key, value: `[B, Hkv, d]`.
            layer: of which they are.

        Returns:
            `[B, H d]`.
        """
        own, (keys, values) = self._own[layer], self._prefixes[layer]
        own.append(key, value)
        query = (query * query.shape[-1] ** -0.5).unflatten(1, (self._heads, -1))
        far = torch.baddbmm(self._bias, self._groups.gather(query), keys.flatten(0, 1).transpose(1, 2))
        near = [torch.bmm(query.flatten(0, 1), chunk.flatten(0, 1).transpose(1, 2)) for chunk in own.keys]
        if own.free:
            near[-1][..., -own.free :] = -torch.inf
        scores = [self._groups.spread(far, self._heads), *near]
        far, *near = torch.cat(scores, -1).softmax(-1).split([part.shape[-1] for part in scores], -1)
        far = torch.bmm(self._groups.gather(far.unflatten(0, (-1, self._heads))), values.flatten(0, 1))
        mixed = self._groups.spread(far, self._heads)
        for share, chunk in zip(near, own.values, strict=True):
            mixed = torch.baddbmm(mixed, share, chunk.flatten(0, 1))
        return mixed.view(len(key), -1)
