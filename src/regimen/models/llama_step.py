"""One more token for each of many rows, by a decoder of Llama's kind whose weights were prepared for that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

from regimen.models.dense import FixedDense
from regimen.models.shared_prefix import SharedPrefixCache
from regimen.models.sublayers import side_by_side

AT_MOST = 2**26
"""Weights of a model that are prepared, which takes two more copies of most of them."""


@dataclass(frozen=True)
class _Layer:
    """A layer's maps, into which the gains of the norms before them are multiplied.

    Attributes:
        heads: queries, keys and values; of queries and keys, what turns together stands side by side.
        gains: of the norms of queries and keys, `[H + Hkv, d]`, where there are some.
        output: of the attention.
        pair: gate and its partner.
        down: of their product.
    """

    heads: FixedDense
    gains: Tensor | None
    output: FixedDense
    pair: FixedDense
    down: FixedDense


class LlamaStep:
    """Last hidden states of rows, token by token, equal to those of `LlamaForward` up to rounding.

    At a hundred rows and a small model, most of a step are calls of small operations. So the gains of norms and the
    scale of the attention are multiplied into the weights, projections of one input are joined, and halves of heads
    that turn together are interleaved, to be turned as complex numbers (Su et al. 2021, eq. 12).
    """

    @torch.no_grad()
    def __init__(self, model: Any) -> None:
        """Prepare the weights of a model for which `suits` is true; later changes of them are not seen."""
        config, weight = model.config, model.norm.weight
        self._model, self._eps = model, config.rms_norm_eps
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._width = model.layers[0].self_attn.head_dim
        self._floor = weight.new_tensor(len(weight) * self._eps).sqrt()
        self._head_floor = weight.new_tensor(self._width * self._eps).sqrt()
        self._frequencies = model.rotary_emb.inv_freq.to(weight.device, torch.float32)
        self._radius = self._frequencies.new_tensor(model.rotary_emb.attention_scaling)
        self._layers = [self._prepared(layer) for layer in model.layers]

    @staticmethod
    def suits(model: Any) -> bool:
        """Whether a model is small, in full precision, and its layers are plain ones."""
        plain = all(type(part) is nn.Linear for layer in model.layers for part in _linear(layer))
        full = all(weight.dtype in (torch.float32, torch.float64) for weight in model.parameters())
        return plain and full and sum(weight.numel() for weight in model.parameters()) <= AT_MOST

    def paired(self, layers: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values `[U, Hkv, P, d]` of prefixes, as a cache for this step must have them."""
        return [(_paired(keys, self._width), values) for keys, values in layers]

    @torch.inference_mode()
    def __call__(self, ids: Tensor, positions: Tensor, cache: SharedPrefixCache) -> Tensor:
        """`[B, D]` for one more token of each row, both int64 `[B]`, which is added to the cache."""
        x = self._model.embed_tokens(ids)
        turn = torch.polar(self._radius, positions[:, None, None] * self._frequencies).to(x.dtype.to_complex())
        for index, layer in enumerate(self._layers):
            heads = layer.heads(_unit(x, self._floor)).view(len(x), -1, self._width)
            x += layer.output(cache.attend(*self._turned(heads, turn, layer.gains), index))
            gate, partner = layer.pair(_unit(x, self._floor)).chunk(2, -1)
            x += layer.down(silu(gate).mul_(partner))
        return rms_norm(x, x.shape[1:], self._model.norm.weight, self._eps)

    def _turned(self, heads: Tensor, turn: Tensor, gains: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[B, H or Hkv, d]`, the former two turned by their positions."""
        turning, values = heads.split_with_sizes([self._heads + self._kv_heads, self._kv_heads], 1)
        if gains is not None:
            turning = _unit(turning, self._head_floor) * gains
        pairs = torch.view_as_complex(turning.view(len(heads), -1, self._width // 2, 2))
        turned = torch.view_as_real(pairs * turn).view(len(heads), -1, self._width)
        queries, keys = turned.split_with_sizes([self._heads, self._kv_heads], 1)
        return queries, keys, values

    def _prepared(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        return _Layer(
            self._heads_map(layer.input_layernorm, attention),
            self._gains(attention) if hasattr(attention, "q_norm") else None,
            FixedDense(attention.o_proj.weight, attention.o_proj.bias),
            _joined(layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            FixedDense(mlp.down_proj.weight, mlp.down_proj.bias),
        )

    def _heads_map(self, norm: Any, attention: Any) -> FixedDense:
        """Queries (scaled, unless a norm follows), keys and values; queries and keys are paired."""
        joined = _joined(norm, (attention.q_proj, attention.k_proj, attention.v_proj))
        place = torch.arange(len(joined.weight), device=joined.weight.device)
        turning = (self._heads + self._kv_heads) * self._width
        order = torch.cat([_paired(place[:turning], self._width), place[turning:]])
        scale = torch.ones_like(joined.weight[:, :1])
        if not hasattr(attention, "q_norm"):
            scale[: self._heads * self._width] = self._width**-0.5
        bias = None if joined.bias is None else (joined.bias * scale[:, 0])[order]
        return FixedDense((joined.weight * scale)[order], bias)

    def _gains(self, attention: Any) -> Tensor:
        """Of the norms of queries and keys. The first's is times the scale, both times what `_unit` leaves out."""
        key = (attention.k_norm.weight * self._width**0.5).expand(self._kv_heads, -1)
        return _paired(torch.cat([attention.q_norm.weight.expand(self._heads, -1), key]), self._width)


def _unit(x: Tensor, floor: Tensor) -> Tensor:
    """`x / rms(x)` (Zhang and Sennrich 2019), but for a factor `sqrt(D)` that the weights have."""
    return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), floor)


def _linear(layer: Any) -> tuple[Any, ...]:
    attention, mlp = layer.self_attn, layer.mlp
    return (
        attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
        mlp.gate_proj, mlp.up_proj, mlp.down_proj,
    )  # fmt: skip


def _joined(norm: Any, layers: Sequence[nn.Linear]) -> FixedDense:
    """The maps that read a norm, side by side, as a map of unit vectors."""
    weight, bias = side_by_side([layer.weight for layer in layers], [layer.bias for layer in layers])
    return FixedDense(weight * (norm.weight * len(norm.weight) ** 0.5), bias)


def _paired(heads: Tensor, width: int) -> Tensor:
    """`[..., H d]`: of every head, the places of both halves in turns."""
    return heads.unflatten(-1, (-1, 2, width // 2)).transpose(-1, -2).flatten(-3)
