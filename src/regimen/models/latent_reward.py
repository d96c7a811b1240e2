"""Rewards that depend on a hidden user, who is inferred from a few labelled pairs (VPL, arXiv 2408.10075)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from regimen.functions.divergences import gaussian_kl
from regimen.models.torsos import MLPTorso


@dataclass(frozen=True)
class Pairs:
    """Pairs of segments that users were asked to compare.

    Attributes:
        first, second: `[B, N, L, S]`, of `B` users, `N` pairs of segments of `L` states each.
        label: `[B, N]`, the probability that the first is preferred; 1 or 0 where there is no doubt.
        mask: bool `[B, N]`, pairs that exist.

    Raises:
        ValueError: the shapes do not fit, or a label outside [0, 1].
    """

    first: Tensor
    second: Tensor
    label: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        shape = self.label.shape
        if self.first.ndim != 4 or self.first.shape != self.second.shape or self.first.shape[:2] != shape:
            raise ValueError(
                f"pairs: first {list(self.first.shape)}, second {list(self.second.shape)}, label {list(shape)}; "
                "expected [B, N, L, S] twice, and [B, N]"
            )
        if self.mask.shape != shape or self.mask.dtype != torch.bool:
            raise ValueError(f"pairs: mask {list(self.mask.shape)} {self.mask.dtype}, expected {list(shape)} bool")
        wrong = self.mask & ~((self.label >= 0) & (self.label <= 1))
        if bool(wrong.any()):
            user, pair = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"pairs: the label of pair {pair} of user {user} is {float(self.label[user, pair]):g}, expected in "
                "[0, 1]: 1 if the first is preferred, 0 if the second is"
            )

    @classmethod
    def of(cls, table: Mapping[str, Any], mask: Tensor | None = None) -> Pairs:
        """The pairs in entries `first`, `second` and `label`, all of which exist unless a mask is given."""
        label = table["label"]
        mask = torch.ones_like(label, dtype=torch.bool) if mask is None else mask
        return cls(table["first"], table["second"], label, mask)

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, pairs: slice) -> Pairs:
        """Some of everyone's pairs."""
        return Pairs(self.first[:, pairs], self.second[:, pairs], self.label[:, pairs], self.mask[:, pairs])

    def by_preference(self) -> Tensor:
        """`[B, N, 2 L S + 1]`: the preferred segment, the other, and how sure the label is, from 0 to 1.

        Exchanging the segments of a pair and turning its label around changes nothing.
        """
        first, second = self.first.flatten(2), self.second.flatten(2)
        ahead = (self.label >= 0.5)[:, :, None]
        sure = (2 * self.label - 1).abs()[:, :, None].to(first.dtype)
        return torch.cat([torch.where(ahead, first, second), torch.where(ahead, second, first), sure], 2)


@dataclass(frozen=True)
class Latents:
    """Independent Gaussians over the latents of `B` users.

    Attributes:
        mean, log_var: `[B, Z]`; log_var is the logarithm of the variance.
    """

    mean: Tensor
    log_var: Tensor

    def sample(self, rng: torch.Generator) -> Tensor:
        """`[B, Z]`, with a gradient."""
        noise = torch.randn(self.mean.shape, generator=rng, device=rng.device, dtype=self.mean.dtype)
        return self.mean + (self.log_var / 2).exp() * noise

    def kl(self, other: Latents) -> Tensor:
        """KL(self || other) in nats, `[B]`."""
        std, reference = (self.log_var / 2).exp(), (other.log_var / 2).exp()
        return gaussian_kl(self.mean, std, other.mean, reference).sum(-1)

    def active_units(self) -> Tensor:
        """How many numbers of the latent differ between users: the variance of their mean is above 0.01, `[]`."""
        mean = self.mean.detach()
        return ((mean - mean.mean(0)).square().mean(0) > 0.01).sum().to(mean.dtype)


class LatentEncoder(Protocol):
    """What infers users: labelled pairs to a posterior over latents of `latent` numbers."""

    latent: int

    def __call__(self, pairs: Pairs) -> Latents:
        """The posterior, `[B, Z]`."""
        ...


class PairEncoder(nn.Module):
    """Each pair to features, whose mean over a user's pairs tells the latent; the order of the pairs plays no part.

    With `attention` the features look at each other before they are averaged, `softmax(Q K^T / sqrt(d)) V`, as in VPL
    for language models.
    """

    def __init__(
        self,
        size: int,
        latent: int,
        widths: Sequence[int] = (64, 64),
        *,
        attention: bool = False,
        bounds: tuple[float, float] = (-6.0, 2.0),
    ) -> None:
        """Make the encoder.

        Args:
            size: numbers in a segment, `L S`.
            latent: numbers in a latent, `Z`.
            widths: of the layers.
            attention: see above.
            bounds: that `log_var` is kept in.
        """
        super().__init__()
        self.latent, self.bounds = latent, bounds
        self.torso = MLPTorso(2 * size + 1, widths, nn.ReLU)
        width = self.torso.width
        self.attend = nn.Linear(width, 3 * width) if attention else None
        self.out = nn.Linear(width, 2 * latent)

    def forward(self, pairs: Pairs) -> Latents:
        """The posterior, `[B, Z]`."""
        features = self.torso(pairs.by_preference().flatten(0, 1)).unflatten(0, pairs.label.shape)
        if self.attend is not None:
            features = self._attended(features, pairs.mask)
        there = pairs.mask[:, :, None].to(features.dtype)
        pooled = (features * there).sum(1) / there.sum(1).clamp(min=1)
        return _latents(self.out(pooled), self.bounds)

    def _attended(self, features: Tensor, mask: Tensor) -> Tensor:
        assert self.attend is not None, "only asked where there is attention"
        query, key, value = self.attend(features).chunk(3, -1)
        # A user without pairs attends to all, so that nothing is divided by 0; nobody looks at what comes out.
        seen = (mask | ~mask.any(1, keepdim=True))[:, None]
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)


class ConcatenatingEncoder(nn.Module):
    """All pairs side by side to a latent: the encoder of VPL's code for control, for sets of exactly `pairs` pairs."""

    def __init__(
        self,
        size: int,
        latent: int,
        pairs: int,
        widths: Sequence[int] = (64, 64),
        bounds: tuple[float, float] = (-6.0, 2.0),
    ) -> None:
        """As `PairEncoder`; `pairs` is how many a user is asked."""
        super().__init__()
        self.latent, self.pairs, self.bounds = latent, pairs, bounds
        self.torso = MLPTorso(pairs * (2 * size + 1), widths, nn.ReLU)
        self.out = nn.Linear(self.torso.width, 2 * latent)

    def forward(self, pairs: Pairs) -> Latents:
        """The posterior, `[B, Z]`.

        Raises:
            ValueError: another number of pairs, or some are missing.
        """
        if pairs.label.shape[1] != self.pairs or not bool((pairs.mask.all(1) | ~pairs.mask.any(1)).all()):
            least = int(pairs.mask.sum(1).min()) if len(pairs) else 0
            raise ValueError(
                f"ConcatenatingEncoder was made for {self.pairs} pairs and given {pairs.label.shape[1]}, of which a "
                f"user has {least}; give as many, or use a PairEncoder"
            )
        told = torch.cat([pairs.first.flatten(2), pairs.second.flatten(2), (2 * pairs.label - 1)[:, :, None]], 2)
        return _latents(self.out(self.torso(told.flatten(1))), self.bounds)


def _latents(numbers: Tensor, bounds: tuple[float, float]) -> Latents:
    mean, log_var = numbers.chunk(2, -1)
    return Latents(mean, log_var.clamp(*bounds))


class LatentReward(nn.Module):
    """`r(s, z)`: a reward of states that depends on a user's latent, and an encoder that infers the latent.

    Without an encoder the latent has no numbers, and the reward is one for all (Bradley and Terry 1952).
    """

    def __init__(
        self,
        states: int,
        encoder: LatentEncoder | None = None,
        widths: Sequence[int] = (64, 64),
        *,
        learned_prior: bool = False,
    ) -> None:
        """Make the reward.

        Args:
            states: numbers in a state, `S`.
            encoder: a module that infers latents from pairs.
            widths: of the reward's layers.
            learned_prior: whether the prior's mean and variance are learned; by default it is N(0, 1).
        """
        super().__init__()
        self.states, self.encoder = states, encoder
        self.latent = 0 if encoder is None else encoder.latent
        torso = MLPTorso(states + self.latent, widths, nn.ReLU)
        self.decoder = nn.Sequential(torso, nn.Linear(torso.width, 1))
        self.prior_mean, self.prior_log_var = (
            nn.Parameter(torch.zeros(self.latent), requires_grad=learned_prior) for _ in range(2)
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.prior_mean.device

    @property
    def prior(self) -> Latents:
        """Of a user of whom nothing is known, `[1, Z]`."""
        return Latents(self.prior_mean[None], self.prior_log_var[None])

    def infer(self, pairs: Pairs) -> Latents:
        """The posterior over the users' latents, `[B, Z]`; the prior for those without pairs."""
        prior = self.prior
        if self.encoder is None:
            return Latents(prior.mean.expand(len(pairs), 0), prior.log_var.expand(len(pairs), 0))
        found, known = self.encoder(pairs), pairs.mask.any(1, keepdim=True)
        return Latents(torch.where(known, found.mean, prior.mean), torch.where(known, found.log_var, prior.log_var))

    def score(self, states: Tensor, latents: Tensor) -> Tensor:
        """Rewards `[B, ...]` of states `[B, ..., S]` for users with latents `[B, Z]`.

        Raises:
            ValueError: other shapes.
        """
        if states.shape[-1] != self.states or latents.shape != (len(states), self.latent):
            raise ValueError(
                f"LatentReward: states {list(states.shape)}, latents {list(latents.shape)}; expected "
                f"[B, ..., {self.states}] and [{len(states)}, {self.latent}]"
            )
        wide = latents.view(len(latents), *[1] * (states.ndim - 2), self.latent)
        both = torch.cat([states, wide.expand(*states.shape[:-1], self.latent)], -1)
        rewards: Tensor = self.decoder(both.flatten(0, -2))
        return rewards.view(states.shape[:-1])

    def compare(self, pairs: Pairs, latents: Tensor) -> Tensor:
        """By how much the first segments' rewards, summed over their states, exceed the second ones', `[B, N]`."""
        first, second = self.score(torch.stack([pairs.first, pairs.second], 1), latents).sum(-1).unbind(1)
        return first - second
