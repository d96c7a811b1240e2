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
        place = self.keys[-1].shape[2] - self.free
        self.keys[-1].select(2, place).copy_(key)
        self.values[-1].select(2, place).copy_(value)
        self.length, self.free = self.length + 1, self.free - 1

    def scores(self, query: Tensor) -> list[Tensor]:
        """Of queries `[B Hkv, r, d]` with the keys of every chunk, `[B Hkv, r, places]`; -inf in free places."""
        found = [torch.bmm(query, _flat(chunk).transpose(1, 2)) for chunk in self.keys]
        if self.free:
            found[-1].narrow(2, found[-1].shape[2] - self.free, self.free).fill_(-torch.inf)
        return found

    def mix(self, mixed: Tensor, shares: Sequence[Tensor]) -> Tensor:
        """Add values in these shares, `[..., places]` of every chunk, to `[B Hkv, r, d]`, in place."""
        for share, chunk in zip(shares, self.values, strict=True):
            mixed.baddbmm_(share.view(*mixed.shape[:2], -1), _flat(chunk))
        return mixed

    def choose(self, rows: Tensor) -> None:
        self.keys, self.values = ([x.index_select(0, rows) for x in chunks] for chunks in (self.keys, self.values))


def _flat(chunk: Tensor) -> Tensor:
    return chunk.view(-1, *chunk.shape[2:])


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

    @property
    def shape(self) -> tuple[int, ...]:
        """The rows as `gather` and `spread` have them: `[U, width]` where that is their order, `[B]` elsewhere."""
        return (len(self.prefix),) if self.slot is not None else (self.count, self.width)

    def gather(self, rows: Tensor) -> Tensor:
        """`[*shape, Hkv, r, n]` by rows to `[U Hkv, width r, n]` by prefixes; 0 where a group has no row."""
        if self.slot is not None:
            places = rows.new_zeros(self.count * self.width, *rows.shape[1:])
            rows = places.index_copy_(0, self.slot, rows).unflatten(0, (self.count, self.width))
        heads, more, size = rows.shape[2:]
        return rows.transpose(1, 2).reshape(self.count * heads, self.width * more, size)

    def spread(self, groups: Tensor, heads: int) -> Tensor:
        """Back: `[U Hkv, width r, n]` to `[*shape, Hkv, r, n]`, a view where it can be."""
        parts = groups.view(self.count, heads, self.width, -1, groups.shape[2]).transpose(1, 2)
        return parts if self.slot is None else parts.flatten(0, 1).index_select(0, self.slot)


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
        self._heads, self._real = layers[0][0].shape[1], real
        # Turned and flattened for the products.
        self._prefixes = [(keys.flatten(0, 1).transpose(1, 2), values.flatten(0, 1)) for keys, values in layers]
        self._own = [_Own() for _ in layers]
        self._group(rows)

    def _group(self, prefix: Tensor) -> None:
        """Note which prefix each row continues, and leave out those that none does."""
        used, prefix = prefix.unique(return_inverse=True)
        if len(used) < len(self._real):
            places = (used[:, None] * self._heads + torch.arange(self._heads, device=used.device)).flatten()
            self._prefixes = [(keys[places], values[places]) for keys, values in self._prefixes]
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
            query: `[B, H, d]`, times `d ** -0.5`; key, value: `[B, Hkv, d]`.
            layer: of which they are.

        Returns:
            `[B, H d]`.
        """
        own, (keys, values) = self._own[layer], self._prefixes[layer]
        own.append(key, value)
        shape = (*self._groups.shape, self._heads, query.shape[1] // self._heads)
        near = own.scores(query.reshape(-1, shape[-1], query.shape[2]))
        far = torch.baddbmm(self._bias, self._groups.gather(query.view(*shape, -1)), keys)
        scores = [self._groups.spread(far, self._heads), *(part.view(*shape, -1) for part in near)]
        far, *near = torch.cat(scores, -1).softmax(-1).split([part.shape[-1] for part in scores], -1)
        mixed = self._groups.spread(torch.bmm(self._groups.gather(far), values), self._heads)
        return own.mix(mixed.reshape(-1, shape[-1], query.shape[2]), near).view(len(query), -1)
