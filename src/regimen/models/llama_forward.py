"""The forward pass of decoders of Llama's kind, with less work around the matrix products than `transformers` has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from regimen.models.dense import product
from regimen.models.kv_cache import RowsCache
from regimen.models.packing import Packed
from regimen.models.shared_prefix import SharedPrefixCache
from regimen.models.sublayers import gated_projection, normed_projection, rotate

KNOWN = ("LlamaModel", "Qwen2Model", "Qwen3Model", "MistralModel")
ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary positions whose frequencies do not depend on the sequence."""

Attend = Callable[[Tensor, Tensor, int], Tensor]
"""Attention of a layer: queries with keys `[N, H + Hkv, d]` and values `[N, Hkv, d]` of all tokens to `[N, H d]`."""


class LlamaForward:
    """Last hidden states of a model, computed with its own weights; it holds no copies.

    Tokens are rows `[N, D]`, and only attention knows which belong together. Layers that are not plain (adapters,
    quantised weights) are called as they are.
    """

    def __init__(self, model: Any) -> None:
        """Take a model for which `knows` is true."""
        self.model, config = model, model.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.width = model.layers[0].self_attn.head_dim
        self._grouped = self.heads != self.kv_heads
        half = self.width // 2
        self._sign = torch.cat([-torch.ones(half), torch.ones(half)])
        self._hooks = [hooks for part in model.modules() for hooks in (part._forward_hooks, part._forward_pre_hooks)]

    @staticmethod
    def knows(model: Any) -> bool:
        """Whether a model's forward pass is known here: its class, activation and positions, nothing put over it."""
        config = model.config
        if type(model).__name__ not in KNOWN or not type(model).__module__.startswith("transformers."):
            return False
        plain = config.hidden_act in ("silu", "swish") and not any("forward" in vars(part) for part in model.modules())
        whole = getattr(config, "sliding_window", None) is None
        return plain and whole and model.rotary_emb.rope_type in ROPE

    @property
    def applies(self) -> bool:
        """Whether nobody wants to see the passes of the parts (hooks), or another attention."""
        return self.model.config._attn_implementation == "sdpa" and not any(self._hooks)

    @property
    def in_full_precision(self) -> bool:
        """Whether sums of the weights' precision are good enough for attention: the fused ones of torch use more."""
        return self.model.embed_tokens.weight.dtype in (torch.float32, torch.float64)

    def grid(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None, cache: RowsCache | None) -> Tensor:
        """`[B, L, D]` for tokens `[B, L]`; see `CausalLM.hidden`."""
        past = 0 if cache is None else cache.get_seq_length()
        if positions is None:
            positions = torch.arange(past, past + ids.shape[1], device=ids.device).expand(ids.shape)
        seen = self._seen(ids.shape[1], past, mask)
        attend = partial(self._attend_grid, shape=ids.shape, seen=seen, cache=cache)
        return self._run(ids.flatten(), positions.flatten(), attend).view(*ids.shape, -1)

    def packed(self, packed: Packed) -> Tensor:
        """`[N, D]` for packed tokens."""
        return self._run(packed.ids, packed.positions, partial(self._attend_packed, packed=packed))

    def step(self, ids: Tensor, positions: Tensor, cache: SharedPrefixCache) -> Tensor:
        """`[B, D]` for one more token of each row, int64 `[B]`, which is added to the cache."""
        return self._run(ids, positions, partial(self._attend_step, cache=cache))

    def _run(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        model = self.model
        x = model.embed_tokens(ids)
        turn = self._turn(positions, x)
        for index, layer in enumerate(model.layers):
            mixed = attend(*self._heads(layer, x, turn), index)
            x = x + _applied(layer.self_attn.o_proj, mixed)
            x = x + self._mlp(layer, x)
        found: Tensor = model.norm(x)
        return found

    def _turn(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines `[N, 1, d]`."""
        rotary = self.model.rotary_emb
        angle = positions[:, None].float() * rotary.inv_freq.to(positions.device, torch.float32)
        angle = torch.cat([angle, angle], -1)[:, None]
        cos, sin = angle.cos(), angle.sin() * self._sign.to(positions.device)
        if rotary.attention_scaling != 1:
            cos, sin = cos * rotary.attention_scaling, sin * rotary.attention_scaling
        return cos.to(like.dtype), sin.to(like.dtype)

    def _heads(self, layer: Any, x: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Queries and keys `[N, H + Hkv, d]`, turned by their positions, and values `[N, Hkv, d]`."""
        attention = layer.self_attn
        joined = self._project(x, *_projections(layer)[0])
        heads = joined.view(len(x), self.heads + 2 * self.kv_heads, self.width)
        turning, values = heads.split([self.heads + self.kv_heads, self.kv_heads], 1)
        if hasattr(attention, "q_norm"):
            queries, keys = turning.split([self.heads, self.kv_heads], 1)
            turning = torch.cat([attention.q_norm(queries), attention.k_norm(keys)], 1)
        return rotate(turning, *turn), values

    def _mlp(self, layer: Any, x: Tensor) -> Tensor:
        mlp = layer.mlp
        pair = self._project(x, *_projections(layer)[1])
        if not _plain(x, (mlp.down_proj,)) or mlp.down_proj.bias is not None:
            gate, up = pair.chunk(2, -1)
            found: Tensor = mlp.down_proj(silu(gate) * up)
            return found
        return gated_projection(pair, mlp.down_proj.weight)

    def _project(self, x: Tensor, norm: Any, layers: Sequence[Any]) -> Tensor:
        """Several layers applied to `norm(x)`, side by side."""
        if not _plain(x, layers):
            normed = norm(x)
            return torch.cat([layer(normed) for layer in layers], -1)
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        return normed_projection(x, norm.weight, norm.variance_epsilon, weights, biases)

    def _attend_packed(self, turned: Tensor, values: Tensor, _layer: int, packed: Packed) -> Tensor:
        place, shape = packed.place.flatten(), packed.place.shape
        turned, values = (x.index_select(0, place).unflatten(0, shape).transpose(1, 2) for x in (turned, values))
        query, key = turned.split([self.heads, self.kv_heads], 1)
        mixed = scaled_dot_product_attention(query, key, values, is_causal=True, enable_gqa=self._grouped)
        return mixed.transpose(1, 2).reshape(len(place), self.heads * self.width).index_select(0, packed.owner)

    def _attend_step(self, turned: Tensor, values: Tensor, layer: int, cache: SharedPrefixCache) -> Tensor:
        query, key = turned.split([self.heads, self.kv_heads], 1)
        return cache.attend(query * self.width**-0.5, key, values, layer)

    def _attend_grid(
        self,
        turned: Tensor,
        values: Tensor,
        layer: int,
        shape: Sequence[int],
        seen: Tensor | None,
        cache: RowsCache | None,
    ) -> Tensor:
        turned, value = (x.unflatten(0, shape).transpose(1, 2) for x in (turned, values))
        query, key = turned.split([self.heads, self.kv_heads], 1)
        if cache is not None:
            key, value = cache.update(key, value, layer)
        causal = seen is None and shape[1] > 1
        mixed = scaled_dot_product_attention(query, key, value, seen, is_causal=causal, enable_gqa=self._grouped)
        return mixed.transpose(1, 2).reshape(len(turned) * shape[1], -1)

    @staticmethod
    def _seen(length: int, past: int, mask: Tensor | None) -> Tensor | None:
        """Bool `[B, 1, L, keys]`, which token sees which; `None` where it is all of those before it."""
        if mask is None and (length == 1 or past == 0):
            return None
        if mask is not None and length == 1:
            return mask[:, None, None]
        device = None if mask is None else mask.device
        places = torch.arange(past + length, device=device)
        before = places <= places[past:, None]
        if mask is None:
            return before[None, None]
        # Padding sees itself: attention to nothing is not a number, which would spread.
        return (before & mask[:, None] | (places == places[past:, None]))[:, None]


def _applied(layer: Any, x: Tensor) -> Tensor:
    found: Tensor = product(x, layer.weight, layer.bias) if _plain(x, (layer,)) else layer(x)
    return found


def _plain(x: Tensor, layers: Sequence[Any]) -> bool:
    return x.dtype in (torch.float32, torch.float64) and all(type(layer) is nn.Linear for layer in layers)


def _projections(layer: Any) -> tuple[tuple[Any, tuple[Any, ...]], ...]:
    """The norms of a layer, each with those that read it."""
    attention, mlp = layer.self_attn, layer.mlp
    return (
        (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
        (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
    )
