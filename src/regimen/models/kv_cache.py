"""A key/value cache that is allocated once, and whose rows can be chosen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class RowsLayer(CacheLayerMixin):
    """One layer's keys and values `[B, H, capacity, D]`, of which the first `length` places are filled."""

    is_sliding = False
    is_croppable = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.length = capacity, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the shapes of the first keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = self._room(key_states)
        self.values = self._room(value_states)
        self.is_initialized = True

    def _room(self, like: Tensor) -> Tensor:
        batch, heads, _, width = like.shape
        return like.new_empty(batch, heads, self.capacity, width)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append, and return all there is."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[-2]
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Places that a query sees, and where they begin."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Places that are filled."""
        return self.length

    def get_max_length(self) -> int:
        """Places that there are."""
        return self.capacity

    def choose(self, rows: Tensor) -> None:
        """Keep (or repeat) some rows."""
        self.keys, self.values = (self._chosen(x, rows) for x in (self.keys, self.values))

    def _chosen(self, old: Tensor, rows: Tensor) -> Tensor:
        new = old.new_empty(len(rows), *old.shape[1:])
        torch.index_select(old[:, :, : self.length], 0, rows, out=new[:, :, : self.length])
        return new


class RowsCache(Cache):
    """The cache of all layers of a model, for sequences of up to `capacity` tokens."""

    def __init__(self, layers: int, capacity: int) -> None:
        super().__init__(layers=[RowsLayer(capacity) for _ in range(layers)])

    def choose(self, rows: Tensor) -> None:
        """Keep (or repeat) some rows, int64 `[R]`, in every layer."""
        for layer in self.layers:
            layer.choose(rows)
