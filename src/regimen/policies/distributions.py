"""Distributions over actions at `R` steps: categorical, Gaussian, and Gaussian squashed into a box."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn, Protocol, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import nll_loss, softplus

from regimen.functions.categorical import sample_tokens
from regimen.functions.divergences import gaussian_kl

_NEAR_ONE = 1 - 1e-6
# Numbers of which numpy's calls are quicker than torch's.
_FEW = 1024


class ActionDistribution(Protocol):
    """A distribution over actions at each of `R` steps."""

    @classmethod
    def cat(cls, parts: Sequence[Any]) -> Self:
        """That of the steps of several, in order."""
        ...

    def sample(self, rng: torch.Generator) -> Tensor:
        """Actions `[R, ...]`, drawn; with a gradient where the distribution has one (continuous actions)."""
        ...

    def propose(self, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Actions `[R, ...]`, drawn, and their log-probabilities `[R]`, both with a gradient (continuous actions)."""
        ...

    def mode(self) -> Tensor:
        """The likeliest actions `[R, ...]` (of a squashed Gaussian, its squashed mean)."""
        ...

    def logprob(self, actions: Tensor) -> Tensor:
        """`[R]`, of actions `[R, ...]`."""
        ...

    def entropy(self) -> Tensor:
        """`[R]`, in nats."""
        ...

    def kl(self, other: Any) -> Tensor:
        """`[R]`, KL(self || other)."""
        ...


@dataclass(frozen=True)
class Categorical:
    """One of `A` actions, by logits `[R, A]`."""

    logits: Tensor

    @classmethod
    def cat(cls, parts: Sequence[Categorical]) -> Self:
        """That of the steps of several, in order."""
        return cls(torch.cat([part.logits for part in parts]))

    @cached_property
    def logp(self) -> Tensor:
        """`[R, A]`, log-probabilities of all actions."""
        return self.logits.log_softmax(-1)

    def sample(self, rng: torch.Generator) -> Tensor:
        """Actions int64 `[R]`."""
        uniform = torch.rand(len(self.logits), generator=rng, device=rng.device)
        if self.logits.device.type == "cpu" and self.logits.numel() < _FEW:
            return _inverted(self.logits.softmax(-1), uniform)
        return sample_tokens(self.logits, uniform.to(self.logits.device))

    def propose(self, rng: torch.Generator) -> NoReturn:
        """Refused: a number of an action has no gradient."""
        raise NotImplementedError(
            "Categorical actions are drawn without a gradient, which an actor-critic such as SAC sends through them; "
            "use a QPolicy with DQNObjective"
        )

    def mode(self) -> Tensor:
        """The likeliest action, int64 `[R]`."""
        return self.logits.argmax(-1)

    def logprob(self, actions: Tensor) -> Tensor:
        """`[R]`."""
        return -nll_loss(self.logp, actions.long(), reduction="none")

    def entropy(self) -> Tensor:
        """`[R]`."""
        return -(self.logp.exp() * self.logp).sum(-1)

    def kl(self, other: Categorical) -> Tensor:
        """`[R]`."""
        return (self.logp.exp() * (self.logp - other.logp)).sum(-1)


@dataclass(frozen=True)
class Gaussian:
    """Independent Gaussians: `mean` and `std`, `[R, A]`."""

    mean: Tensor
    std: Tensor

    @classmethod
    def cat(cls, parts: Sequence[Gaussian]) -> Self:
        """That of the steps of several, in order."""
        return cls(torch.cat([part.mean for part in parts]), torch.cat([part.std for part in parts]))

    def sample(self, rng: torch.Generator) -> Tensor:
        """Actions `[R, A]`."""
        return self.mean + self.std * _noise(self.mean, rng)

    def propose(self, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Actions `[R, A]` and their log-probabilities `[R]`."""
        actions = self.sample(rng)
        return actions, self.logprob(actions)

    def mode(self) -> Tensor:
        """The mean."""
        return self.mean

    def logprob(self, actions: Tensor) -> Tensor:
        """`[R]`, summed over the action's dimensions."""
        squared = ((actions - self.mean) / self.std).square()
        return -(squared / 2 + self.std.log() + 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:
        """`[R]`."""
        return (0.5 * math.log(2 * math.pi * math.e) + self.std.log()).expand_as(self.mean).sum(-1)

    def kl(self, other: Gaussian) -> Tensor:
        """`[R]`."""
        return gaussian_kl(self.mean, self.std, other.mean, other.std).sum(-1)


@dataclass(frozen=True)
class SquashedGaussian:
    """Independent Gaussians squashed by `tanh` into a box (Haarnoja et al. 2018, appendix C).

    An action is `middle + reach tanh(x)` with `x` from a Gaussian of `mean` and `std`, `[R, A]`. It is scored from the
    action itself, when it is drawn as when it is replayed, so that the two agree even where the squashing is so flat
    that `x` cannot be told from it: within 1e-6 of the border, relative to the box, it counts as that far inside.

    Attributes:
        mean, std: before squashing, `[R, A]`.
        low, high: of the box, `[A]`.
    """

    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def cat(cls, parts: Sequence[SquashedGaussian]) -> Self:
        """That of the steps of several, in order, in the box of the first."""
        before = Gaussian.cat([part.before for part in parts])
        return cls(before.mean, before.std, parts[0].low, parts[0].high)

    @property
    def before(self) -> Gaussian:
        """The Gaussian before it is squashed."""
        return Gaussian(self.mean, self.std)

    def sample(self, rng: torch.Generator) -> Tensor:
        """Actions `[R, A]`."""
        return self._squashed(self.before.sample(rng))

    def propose(self, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Actions `[R, A]`, and the log-density `[R]` of what was squashed into (-1, 1), whatever the box.

        It is computed before squashing, so its gradient is exact up to the border; in the box the density differs by a
        constant.
        """
        raw = self.before.sample(rng)
        return self._squashed(raw), self.before.logprob(raw) - _log_slope(raw)

    def mode(self) -> Tensor:
        """The squashed mean."""
        return self._squashed(self.mean)

    def _squashed(self, raw: Tensor) -> Tensor:
        return (self.low + self.high) / 2 + self._reach * raw.tanh()

    @property
    def _reach(self) -> Tensor:
        return (self.high - self.low) / 2

    def logprob(self, actions: Tensor) -> Tensor:
        """`[R]`, the density in the box."""
        share = (actions - (self.low + self.high) / 2) / self._reach
        raw = share.clamp(-_NEAR_ONE, _NEAR_ONE).atanh()
        return self.before.logprob(raw) - _log_slope(raw) - self._reach.log().sum()

    def entropy(self) -> Tensor:
        """Refused: it has no closed form."""
        raise NotImplementedError(
            "SquashedGaussian has no entropy in closed form; use the log-probability of its samples, or a Gaussian"
        )

    def kl(self, other: SquashedGaussian) -> Tensor:
        """`[R]`: that of the Gaussians, which squashing both leaves as it is."""
        return self.before.kl(other.before)


def _log_slope(raw: Tensor) -> Tensor:
    """`sum log(1 - tanh(x)^2)`, stable for large `x`."""
    return (2 * (math.log(2) - raw - softplus(-2 * raw))).sum(-1)


def _inverted(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """As `sample_tokens` inverts the distribution function, by numpy: of few numbers in less than half the time."""
    cumulative = np.add.accumulate(probabilities.detach().numpy(), 1, dtype=np.float64)
    at = uniform.numpy()[:, None] * cumulative[:, -1:]
    return torch.from_numpy(np.add.reduce(cumulative <= at, 1, dtype=np.int64))


def _noise(like: Tensor, rng: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=rng, device=rng.device).to(like)
