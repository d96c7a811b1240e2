"""Categorical distributions over a vocabulary: temperature, truncation, sampling by row, log-probabilities."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Numbers up to which one cumulative sum is faster than two of blocks.
_SHORT = 256


def support_size(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """How many of the likeliest tokens top-k and nucleus sampling keep, int64 `[R]` (Holtzman et al. 2020).

    Both together are top-k first, as in `transformers` and vLLM.

    Args:
        logits: `[R, V]`, after the temperature.
        top_k: keep at most so many; 0 for no limit.
        top_p: of those, keep the smallest set of likeliest tokens that has at least this share of their probability.

    Raises:
        ValueError: `top_k` is negative or `top_p` not in (0, 1].
    """
    if top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"support_size: top_k={top_k}, top_p={top_p}; expected top_k >= 0 and top_p in (0, 1]")
    rows, vocabulary = logits.shape
    most = min(top_k, vocabulary) if top_k else vocabulary
    if top_p == 1:
        return torch.full((rows,), most, dtype=torch.int64, device=logits.device)
    probabilities = logits.topk(most, -1).values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    return (before < top_p).sum(-1).clamp(min=1)


def token_logprob(logits: Tensor, tokens: Tensor, kept: Tensor | None = None) -> Tensor:
    """Log-probability `[R]` of tokens `[R]` under logits `[R, V]`, truncated to the `kept [R]` likeliest tokens.

    A token that is not among them, because the policy has moved since it was sampled, takes the place of the least
    likely one: the value stays finite and has no jump.
    """
    chosen = logits.gather(-1, tokens[:, None]).squeeze(-1)
    if kept is None:
        return chosen - logits.logsumexp(-1)
    widest = int(kept.max()) if len(kept) else 1
    top, last = logits.topk(widest, -1).values, kept[:, None] - 1
    least = torch.minimum(top.gather(-1, last), chosen[:, None])
    outside = torch.arange(widest, device=logits.device) > last
    return chosen - top.scatter(-1, last, least).masked_fill(outside, -torch.inf).logsumexp(-1)


def categorical_entropy(logits: Tensor) -> Tensor:
    """Entropy `[R]` in nats of logits `[R, V]`."""
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def categorical_kl(mine: Tensor, theirs: Tensor) -> Tensor:
    """KL(mine || theirs) `[R]` in nats, of logits `[R, V]` both."""
    logp, logq = mine.log_softmax(-1), theirs.log_softmax(-1)
    return (logp.exp() * (logp - logq)).sum(-1)


def in_blocks(function: Callable[..., Tensor], size: int, *tensors: Tensor | None) -> Tensor:
    """What a function gives for rows `[R, ...]`, computed for `size` rows at a time, and again for the gradient.

    Nothing that it computes on the way is kept, so that logits `[R, V]` are never in memory as a whole. Up to `size`
    rows are computed at once, and once.

    Args:
        function: of as many tensors, row by row; differentiable in what it is given and in what it refers to.
        size: rows at a time.
        tensors: with `R` rows each, or `None`, which is passed on.
    """
    rows = next(len(tensor) for tensor in tensors if tensor is not None)
    if rows <= size:
        return function(*tensors)
    parts = []
    for start in range(0, rows, size):
        block = [None if tensor is None else tensor[start : start + size] for tensor in tensors]
        kept = not torch.is_grad_enabled()
        parts.append(
            function(*block) if kept else checkpoint(function, *block, use_reentrant=False, preserve_rng_state=False)
        )
    return torch.cat(parts)


def draw_tokens(logits: Tensor, uniform: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Tokens int64 `[R]` by inverting the distribution function at `uniform [R]`, and their log-probabilities `[R]`.

    The same number gives the same token whatever the other rows are. One exponential of every logit serves both; there
    is no gradient.

    Args:
        logits: `[R, V]`, after the temperature.
        uniform: one number in [0, 1) per row.
        kept: size of each row's support, see `support_size`; everything by default.
    """
    if kept is None:
        return _drawn(logits, uniform)
    values, order = logits.topk(int(kept.max()), -1)
    outside = torch.arange(values.shape[-1], device=logits.device) >= kept[:, None]
    place, logprob = _drawn(values.masked_fill(outside, -torch.inf), uniform)
    return order.gather(-1, place[:, None]).squeeze(-1), logprob


def sample_tokens(logits: Tensor, uniform: Tensor, kept: Tensor | None = None) -> Tensor:
    """The tokens of `draw_tokens`."""
    return draw_tokens(logits, uniform, kept)[0]


@torch.no_grad()
def _drawn(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    (rows, vocabulary), uniform = logits.shape, uniform.double()[:, None]
    width = 1 if vocabulary <= _SHORT else round(vocabulary**0.5)
    weights = logits.new_zeros(rows, -(-vocabulary // width) * width)
    highest = logits.amax(-1, keepdim=True)
    torch.sub(logits, highest, out=weights[:, :vocabulary]).exp_()
    blocks = weights.view(rows, -1, width)
    sums = weights if width == 1 else blocks.sum(-1)
    cumulative = sums.cumsum(-1, dtype=torch.float64)
    tokens, at = _reached(cumulative, uniform)
    if width > 1:
        # What is left of the number, in [0, 1), finds the token in its block.
        rest = 1 - (cumulative.gather(-1, tokens) - at) / sums.gather(-1, tokens)
        inside = blocks.gather(1, tokens[:, :, None].expand(-1, 1, width)).squeeze(1)
        places, _ = _reached(inside.cumsum(-1, dtype=torch.float64), rest.clamp(0, 1 - 2.0**-53))
        tokens = tokens * width + places
    logprobs = logits.gather(-1, tokens) - highest - cumulative[:, -1:].log().to(logits.dtype)
    return tokens.squeeze(-1), logprobs.squeeze(-1)


def _reached(cumulative: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Where `cumulative [R, N]` goes beyond a share `[R, 1]` of its total, and how much that share is."""
    # Below 1, a number times the total is below the total however it is rounded: the place has some weight.
    at = uniform * cumulative[:, -1:]
    return torch.searchsorted(cumulative, at, right=True), at


def row_uniform(seeds: Tensor, step: int | Tensor) -> Tensor:
    """One number in [0, 1) per row, `[R]` float64, from the row's seed (int64 `[R]`) and a step, or each row's own.

    SplitMix64 (Steele et al. 2014), a counter-based stream: rows have streams of their own, so a sample does not
    depend on which others are in its batch, or on when they end.
    """
    odd = 0x9E3779B97F4A7C15
    offset = _signed(odd) * (step + 1) if isinstance(step, Tensor) else _signed(odd * (step + 1))
    mixed = _mix(seeds + offset)
    return _shift(mixed, 11).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """A shift to the right that brings in zeros, as int64 has none."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """A number below 2^64 as int64 holds it, larger ones wrapped."""
    value %= 1 << 64
    return value - (1 << 64) if value >= 1 << 63 else value
