"""A key/value cache that is allocated once, and whose rows can be chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class _Layer:
    """One layer's keys and values `[B, H, capacity, D]`, of which the first `length` places are filled."""

    keys: Tensor
    values: Tensor
    length: int = 0


class RowsCache:
    """Keys and values of all layers of a model, for sequences of up to `capacity` tokens.

    It has the methods of a `transformers` cache that models call, and keeps every key: layers that attend to a
    sliding window are held to it by their mask.
    """

    is_compileable = False

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._layers: list[_Layer] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_options: Any
    ) -> tuple[Tensor, Tensor]:
        """Append to a layer, and return all it has."""
        if layer_idx == len(self._layers):
            self._layers.append(_Layer(self._room(key_states), self._room(value_states)))
        layer = self._layers[layer_idx]
        start, layer.length = layer.length, layer.length + key_states.shape[-2]
        layer.keys[:, :, start : layer.length] = key_states
        layer.values[:, :, start : layer.length] = value_states
        return layer.keys[:, :, : layer.length], layer.values[:, :, : layer.length]

    def _room(self, like: Tensor) -> Tensor:
        batch, heads, _, width = like.shape
        return like.new_empty(batch, heads, self.capacity, width)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Places of a layer that are filled."""
        return self._layers[layer_idx].length if layer_idx < len(self._layers) else 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Where the next token stands."""
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Places that the last of some next tokens sees, and where they begin."""
        return self.get_seq_length(layer_idx) + query_length, 0

    def filled(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values `[B, H, length, D]` of every layer."""
        return [(layer.keys[:, :, : layer.length], layer.values[:, :, : layer.length]) for layer in self._layers]

    def choose(self, rows: Tensor) -> None:
        """Keep (or repeat) some rows, int64 `[R]`, in every layer."""
        for layer in self._layers:
            layer.keys, layer.values = (self._chosen(x, rows, layer.length) for x in (layer.keys, layer.values))

    @staticmethod
    def _chosen(old: Tensor, rows: Tensor, length: int) -> Tensor:
        new = old.new_empty(len(rows), *old.shape[1:])
        torch.index_select(old[:, :, :length], 0, rows, out=new[:, :, :length])
        return new
