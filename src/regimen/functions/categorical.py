"""Categorical distributions over a vocabulary: temperature, truncation, sampling by row, log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor


def support_size(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """How many of the likeliest tokens top-k and nucleus sampling keep, int64 `[R]` (Holtzman et al. 2020).

    Args:
        logits: `[R, V]`, after the temperature.
        top_k: keep at most so many; 0 for no limit.
        top_p: keep the smallest set of likeliest tokens whose probabilities add up to at least this; 1 for all.

    Raises:
        ValueError: `top_k` is negative or `top_p` not in (0, 1].
    """
    if top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"support_size: top_k={top_k}, top_p={top_p}; expected top_k >= 0 and top_p in (0, 1]")
    rows, vocabulary = logits.shape
    kept = torch.full((rows,), vocabulary, dtype=torch.int64, device=logits.device)
    if top_p < 1:
        probabilities = logits.softmax(-1).sort(-1, descending=True).values
        before = probabilities.cumsum(-1) - probabilities
        kept = (before < top_p).sum(-1).clamp(min=1)
    return kept.clamp(max=top_k) if top_k else kept


def token_logprob(logits: Tensor, tokens: Tensor, kept: Tensor | None = None) -> Tensor:
    """Log-probability `[R]` of tokens `[R]` under logits `[R, V]`, truncated to the `kept [R]` likeliest tokens.

    A token outside its row's support counts as part of it, so that the value stays finite when the policy has moved
    since the token was sampled.
    """
    chosen = logits.gather(-1, tokens[:, None]).squeeze(-1)
    if kept is None:
        return chosen - logits.logsumexp(-1)
    widest = int(kept.max()) if len(kept) else 1
    top = logits.topk(widest, -1).values
    inside = torch.arange(widest, device=logits.device) < kept[:, None]
    least = top.gather(-1, kept[:, None] - 1).squeeze(-1)
    support = torch.where(inside, top, -torch.inf).logsumexp(-1)
    return chosen - torch.where(chosen < least, torch.logaddexp(support, chosen), support)


def sample_tokens(logits: Tensor, uniform: Tensor, kept: Tensor | None = None) -> Tensor:
    """Tokens int64 `[R]` by inverting the distribution function at `uniform [R]` in [0, 1).

    The same number gives the same token whatever the other rows are.

    Args:
        logits: `[R, V]`, after the temperature.
        uniform: one number per row.
        kept: size of each row's support, see `support_size`; everything by default.
    """
    if kept is None:
        order, probabilities = None, logits.softmax(-1)
    else:
        values, order = logits.topk(int(kept.max()), -1)
        inside = torch.arange(values.shape[-1], device=logits.device) < kept[:, None]
        probabilities = torch.where(inside, values, -torch.inf).softmax(-1)
    cumulative = probabilities.double().cumsum(-1)
    at = (uniform.double() * cumulative[:, -1])[:, None]
    # A number that rounds up to the total falls on the last token that has any probability.
    last = (probabilities > 0).cumsum(-1).argmax(-1)
    place = torch.searchsorted(cumulative, at, right=True).squeeze(-1).minimum(last)
    return place if order is None else order.gather(-1, place[:, None]).squeeze(-1)


def row_uniform(seeds: Tensor, step: int) -> Tensor:
    """One number in [0, 1) per row, `[R]` float64, from the row's seed (int64 `[R]`) and a step.

    SplitMix64 (Steele et al. 2014), a counter-based stream: rows have streams of their own, so a sample does not
    depend on which others are in its batch, or on when they end.
    """
    mixed = _mix(seeds + _signed(0x9E3779B97F4A7C15 * (step + 1)))
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
