"""The distribution over the next token at the steps of a rollout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from regimen.functions.categorical import categorical_entropy, categorical_kl, in_blocks, token_logprob
from regimen.rollout import Steps

LOGITS_AT_ONCE = {"cpu": 2**20, "other": 2**27}
"""How many logits are in memory at a time, by the kind of device: more are computed block by block, and again for the
gradient. A processor is fastest with what its cache holds."""


@dataclass(frozen=True)
class TokenSteps:
    """The distribution over the next token at every recorded step (a `StepDistribution`).

    Attributes:
        steps: the `R` steps that are described.
        tokens: int64 `[R]`, what was taken.
        states: `[R, D]`, the hidden states from which they were predicted.
        temperature: `[R]`, under which it was sampled.
        kept: int64 `[R]`, size of the support if the sampler was truncated.
        output: the output layer, `[N, D]` to logits `[N, V]`.
        heads: further heads by name, see `head`.
    """

    steps: Steps
    tokens: Tensor
    states: Tensor
    temperature: Tensor
    kept: Tensor | None
    output: Callable[[Tensor], Tensor]
    heads: Mapping[str, nn.Module]

    @cached_property
    def hidden(self) -> Tensor:
        """`[B, T, D]`, the state before each step, for critics and other heads; 0 at steps that are not described."""
        return self.steps.spread(self.states)

    def head(self, name: str) -> Tensor:
        """What a further head of the policy makes of the hidden states, `[B, T, ...]`; `KeyError` if there is none."""
        if name not in self.heads:
            raise KeyError(f"the policy has no head '{name}'; it has: {', '.join(self.heads) or 'none'}")
        found: Tensor = self.heads[name](self.hidden)
        return found

    @cached_property
    def logits(self) -> Tensor:
        """`[R, V]`, after the temperature and before any truncation, all in memory."""
        return self._logits(self.states, self.temperature)

    def _logits(self, states: Tensor, temperature: Tensor) -> Tensor:
        return self.output(states) / temperature[:, None]

    @cached_property
    def logprob(self) -> Tensor:
        """`[B, T]`, of the tokens taken, under the distribution that they were sampled from."""
        return self._each(token_logprob, self.tokens, self.kept)

    def entropy(self) -> Tensor:
        """`[B, T]`, in nats, of the distribution before truncation."""
        return self._each(categorical_entropy)

    def kl(self, other: TokenSteps, estimator: str = "exact") -> Tensor:
        """`[B, T]`, KL(self || other) over the whole vocabulary, before truncation.

        Raises:
            ValueError: an estimator other than `"exact"`.
        """
        if estimator != "exact":
            raise ValueError(f"KL estimator '{estimator}' is not known to a token policy; expected exact, k1, k2 or k3")

        def of(mine: Tensor, states: Tensor, temperature: Tensor) -> Tensor:
            return categorical_kl(mine, other._logits(states, temperature))

        return self._each(of, other.states, other.temperature)

    def _each(self, function: Callable[..., Tensor], *others: Tensor | None) -> Tensor:
        """`[B, T]`, a function of the logits `[R, V]` and of others `[R, ...]`; if they are few, once for all."""
        if len(self.states) <= self._rows:
            return self.steps.spread(function(self.logits, *others))

        def of(states: Tensor, temperature: Tensor, *rest: Tensor | None) -> Tensor:
            return function(self._logits(states, temperature), *rest)

        return self.steps.spread(in_blocks(of, self._rows, self.states, self.temperature, *others))

    @cached_property
    def _rows(self) -> int:
        """Rows whose logits are in memory at a time."""
        with torch.no_grad():
            vocabulary = self.output(self.states[:1]).shape[-1]
        device = self.states.device.type
        return max(LOGITS_AT_ONCE.get(device, LOGITS_AT_ONCE["other"]) // vocabulary, 1)
