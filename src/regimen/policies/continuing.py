"""Reading prompts once, and then what many rows make of them, token by token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from regimen.models.causal_lm import CausalLM
from regimen.models.kv_cache import RowsCache
from regimen.models.llama_forward import LlamaForward
from regimen.models.llama_step import LlamaStep
from regimen.models.shared_prefix import SharedPrefixCache


class Continuation(Protocol):
    """Rows that continue prompts which were read."""

    def read(self, tokens: Tensor) -> Tensor:
        """States `[R, D]` after one more token of each row, int64 `[R]`."""
        ...

    def choose(self, rows: Tensor) -> None:
        """Keep some rows, int64 `[R]`."""
        ...


def read_prompts(
    network: CausalLM,
    ids: Tensor,
    real: Tensor,
    rows: Tensor,
    room: int,
    images: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Continuation]:
    """The last states `[U, D]` of `U` prompts, and the rows that continue them.

    Args:
        network: the model.
        ids: int64 `[U, L]`, padded on the left; real: bool `[U, L]`, what is not padding.
        rows: int64 `[B]`, the prompt that each row continues.
        room: tokens that a row may add.
        images: of the prompts, as the processor made them.
    """
    positions = network.positions(real, ids, images)
    forward = network.forward_pass
    shared = forward is not None and forward.in_full_precision
    cache = RowsCache(ids.shape[1] + (0 if shared else room))
    padded = not bool(real.all())
    hidden = network.hidden(ids, mask=real if padded else None, positions=positions, cache=cache, images=images)
    # Images take less positions than tokens: the next one follows the highest, on all axes.
    last = (positions if positions.ndim == 2 else positions.amax(0)).amax(1)[rows]
    if forward is not None and shared:
        return hidden[:, -1], _Sharing.of(forward, cache, real, rows, last)
    cache.choose(rows)
    return hidden[:, -1], _Copying(network, cache, real[rows] if padded else None, last)


@dataclass
class _Sharing:
    """Rows whose prompts' keys and values are kept once, by a forward pass of our own."""

    step: Callable[[Tensor, Tensor, SharedPrefixCache], Tensor]
    cache: SharedPrefixCache
    last: Tensor

    @classmethod
    def of(cls, forward: LlamaForward, read: RowsCache, real: Tensor, rows: Tensor, last: Tensor) -> Self:
        if not LlamaStep.suits(forward.model):
            return cls(forward.step, SharedPrefixCache(read.filled(), real, rows), last)
        step = LlamaStep(forward.model)
        return cls(step, SharedPrefixCache(step.paired(read.filled()), real, rows), last)

    def read(self, tokens: Tensor) -> Tensor:
        self.last = self.last + 1
        return self.step(tokens, self.last, self.cache)

    def choose(self, rows: Tensor) -> None:
        self.cache.choose(rows)
        self.last = self.last[rows]


class _Copying:
    """Rows with copies of their prompts' keys and values, for models that only `transformers` knows."""

    def __init__(self, network: CausalLM, cache: RowsCache, real: Tensor | None, last: Tensor) -> None:
        self._network, self._cache, self._real, self._last = network, cache, real, last

    def read(self, tokens: Tensor) -> Tensor:
        self._last = self._last + 1
        if self._real is not None:
            self._real = torch.cat([self._real, self._real.new_ones(len(self._real), 1)], 1)
        hidden = self._network.hidden(
            tokens[:, None], mask=self._real, positions=self._last[:, None], cache=self._cache
        )
        return hidden[:, -1]

    def choose(self, rows: Tensor) -> None:
        self._cache.choose(rows)
        self._last = self._last[rows]
        self._real = None if self._real is None else self._real[rows]
