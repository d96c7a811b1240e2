"""The token sampler: prompts are read once, finished rows dropped, every row has a random stream of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from regimen.functions.categorical import draw_tokens, row_uniform, support_size
from regimen.models.causal_lm import CausalLM
from regimen.policies.continuing import read_prompts

DROP_BELOW = 0.75
"""Finished rows are dropped when less than this share of the rows is at work: dropping copies the cache."""


class Stop(Protocol):
    """Says which rows end with the token just sampled."""

    def __call__(self, tokens: Tensor, length: int) -> Tensor:
        """Bool `[R]`, given the tokens so far, int64 `[R, capacity]`, of which `length` count."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k, top_p: truncation, see `support_size`.
        max_new_tokens: per row.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 64

    @property
    def truncates(self) -> bool:
        """Whether some tokens are never drawn."""
        return self.top_k > 0 or self.top_p < 1

    def choose(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """A token per row `[R]`, its log-probability `[R]`, and the size of the support `[R]` if it is truncated."""
        if self.temperature == 0:
            return logits.argmax(-1), logits.new_zeros(len(logits)), None
        scaled = logits if self.temperature == 1 else logits / self.temperature
        kept = support_size(scaled, self.top_k, self.top_p) if self.truncates else None
        return *draw_tokens(scaled, uniform, kept), kept


@dataclass(frozen=True)
class Completions:
    """What was sampled after some prompts.

    Attributes:
        tokens: int64 `[B, R]`; mask: bool `[B, R]`.
        logprobs: `[B, R]`, 0 where `mask` is False and everywhere at temperature 0.
        kept: int64 `[B, R]`, sizes of the supports, if truncated.
        ended: bool `[B]`, False where a row was cut off at its length limit.
    """

    tokens: Tensor
    mask: Tensor
    logprobs: Tensor
    kept: Tensor | None
    ended: Tensor


@torch.no_grad()
def decode(
    network: CausalLM,
    prompts: Sequence[Tensor],
    rows: Tensor,
    sampling: Sampling,
    stop: Stop,
    seeds: Tensor,
    images: Mapping[str, Tensor] | None = None,
) -> Completions:
    """Sample a completion for each row.

    Args:
        network: the model.
        prompts: `U` distinct prompts, int64 `[L_u]`, each of at least one token.
        rows: int64 `[B]`, the prompt that each row continues.
        sampling: how tokens are drawn.
        stop: when a row ends.
        seeds: int64 `[B]`, of the rows' random streams.
        images: of the prompts, as the processor made them.
    """
    state = _Decoder(network, prompts, rows, sampling, seeds, images)
    for step in range(sampling.max_new_tokens):
        state.draw(step)
        if not state.end(stop, step):
            break
        if step + 1 < sampling.max_new_tokens:
            state.advance()
    return state.completions()


class _Decoder:
    """Rows at work: `alive` holds their place among all `B`, `None` while it is all of them."""

    def __init__(
        self,
        network: CausalLM,
        prompts: Sequence[Tensor],
        rows: Tensor,
        sampling: Sampling,
        seeds: Tensor,
        images: Mapping[str, Tensor] | None,
    ) -> None:
        self.network, self.sampling = network, sampling
        device, batch, room = rows.device, len(rows), sampling.max_new_tokens
        self.uniform = row_uniform(seeds[:, None], torch.arange(room, device=device))
        self.alive: Tensor | None = None
        self.working = torch.ones(batch, dtype=torch.bool, device=device)
        self.tokens = torch.zeros(batch, room, dtype=torch.int64, device=device)
        self.kept = torch.zeros(batch, room, dtype=torch.int64, device=device) if sampling.truncates else None
        self.lengths = torch.full((batch,), room, device=device)
        self.ended = torch.zeros(batch, dtype=torch.bool, device=device)
        ids, real = _left_padded(prompts, device)
        states, self.rows = read_prompts(network, ids, real, rows, room, images)
        self.logits = network.logits(states)[rows]
        self.logprobs = self.logits.new_zeros(batch, room)

    def draw(self, step: int) -> None:
        """A token for every row at work."""
        self.new, logprob, kept = self.sampling.choose(self.logits, self._at_work(self.uniform[:, step]))
        self._note(self.tokens, step, self.new)
        self._note(self.logprobs, step, logprob)
        if self.kept is not None and kept is not None:
            self._note(self.kept, step, kept)

    def _at_work(self, values: Tensor) -> Tensor:
        return values if self.alive is None else values[self.alive]

    def _note(self, table: Tensor, step: int, values: Tensor) -> None:
        if self.alive is None:
            table[:, step] = values
        else:
            table[self.alive, step] = values

    def end(self, stop: Stop, step: int) -> bool:
        """Take note of the rows that end with this token; whether any goes on."""
        done = stop(self._at_work(self.tokens), step + 1) & self.working
        if not bool(done.any()):
            return True
        ended = done.nonzero().squeeze(-1) if self.alive is None else self.alive[done]
        self.lengths[ended], self.ended[ended] = step + 1, True
        self.working &= ~done
        left = int(self.working.sum())
        if left and left < DROP_BELOW * len(self.working):
            rows = self.working.nonzero().squeeze(-1)
            self.rows.choose(rows)
            self.alive = rows if self.alive is None else self.alive[rows]
            self.new, self.working = self.new[rows], self.working[rows]
        return left > 0

    def advance(self) -> None:
        """Read the tokens just drawn."""
        self.logits = self.network.logits(self.rows.read(self.new))

    def completions(self) -> Completions:
        """All rows, cut to the longest."""
        longest = int(self.lengths.max())
        mask = torch.arange(longest, device=self.lengths.device) < self.lengths[:, None]
        tokens, logprobs = (torch.where(mask, x[:, :longest], 0) for x in (self.tokens, self.logprobs))
        kept = None if self.kept is None else torch.where(mask, self.kept[:, :longest], 0)
        return Completions(tokens, mask, logprobs, kept, self.ended)


def _left_padded(prompts: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens int64 `[U, L]` and bool `[U, L]`, which are real: all prompts end at the last place."""
    longest = max(len(prompt) for prompt in prompts)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    real = torch.arange(longest, device=device) >= longest - lengths[:, None]
    ids = torch.zeros(real.shape, dtype=torch.int64, device=device)
    ids[real] = torch.cat([prompt.to(device) for prompt in prompts])
    return ids, real
