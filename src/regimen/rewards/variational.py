"""A learned reward of a given user as a judge, and the same as a probability of winning."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from regimen.models.latent_reward import LatentReward
from regimen.rewards.base import Reward, Scene
from regimen.rollout import Rollout

Read = Callable[[Rollout], Tensor]


def states_after(rollout: Rollout) -> Tensor:
    """`[B, T, S]`: the entry `state` of what was observed after each step."""
    after: Tensor = rollout["next_observations"]["state"]
    return after


def condition_of(rollout: Rollout) -> Tensor:
    """`[B, Z]`: the column `condition`, as a `Conditioned` task writes it."""
    condition: Tensor = rollout["condition"]
    return condition


class VariationalReward(Reward):
    """What a `LatentReward` of the cast makes of each sample's states, for the user with the sample's latent.

    Of states `[B, T, S]` it is a reward per step, of states `[B, S]` one per sample (an image, a text's features).
    """

    def __init__(
        self,
        states: Read = states_after,
        latents: Read = condition_of,
        member: str = "reward_model",
        name: str = "variational",
    ) -> None:
        """Make the reward.

        Args:
            states: where in a rollout the judged states are, `[B, T, S]` or `[B, S]`.
            latents: where each sample's latent is, `[B, Z]`.
            member: name in the cast.
            name: of the component.
        """
        self.states, self.latents, self.member, self.name = states, latents, member, name

    @torch.no_grad()
    def score(self, rollout: Rollout, scene: Scene) -> Tensor:
        """`[B, T]` or `[B]`."""
        return self.model(scene).score(self.states(rollout), self.latents(rollout))

    def model(self, scene: Scene) -> LatentReward:
        """The member; `ValueError` if there is none."""
        if self.member not in scene.cast:
            raise ValueError(
                f"VariationalReward '{self.name}' needs the member '{self.member}', which the cast lacks (it has: "
                f"{', '.join(scene.cast)}); train a LatentReward in a stage before, or name another"
            )
        model: LatentReward = scene.cast[self.member]
        return model


def win_probability(rewards: Tensor, comparison: Tensor, chunk: int = 128) -> Tensor:
    """`mean_m sigma(rewards - comparison_m)`: the probability to be preferred to one of `M` others, drawn at random.

    It is in (0, 1) whatever the scale of a user's rewards (VPL-SPO, arXiv 2408.10075).

    Args:
        rewards: `[B, ...]`; comparison: `[B, M]`, rewards of the others for the same users.
        chunk: others at a time, which bounds the memory.

    Raises:
        ValueError: other shapes, or nobody to compare with.
    """
    if comparison.ndim != 2 or len(comparison) != len(rewards) or not comparison.shape[1]:
        raise ValueError(
            f"win_probability: rewards {list(rewards.shape)}, comparison {list(comparison.shape)}; expected [B, ...] "
            "and [B, M] with M at least 1"
        )
    total = torch.zeros_like(rewards)
    for others in comparison.split(chunk, 1):
        shape = len(others), *[1] * (rewards.ndim - 1), others.shape[1]
        total = total + torch.sigmoid(rewards[..., None] - others.view(shape)).sum(-1)
    return total / comparison.shape[1]


class WinProbabilityReward(Reward):
    """A `VariationalReward` as the probability that its user prefers the state to one of some others.

    Users whose rewards have different scales, which is how sure they are, become comparable (VPL-SPO).
    """

    def __init__(self, base: VariationalReward, comparison: Tensor, name: str = "win_probability") -> None:
        """Make the reward.

        Args:
            base: whose rewards are compared.
            comparison: states `[M, S]`, drawn from the data.
            name: of the component.

        Raises:
            ValueError: there is no state to compare with.
        """
        if comparison.ndim != 2 or not len(comparison):
            raise ValueError(
                f"WinProbabilityReward: comparison states {list(comparison.shape)}; expected [M, S] with M at least 1"
            )
        self.base, self.comparison, self.name = base, comparison, name

    @torch.no_grad()
    def score(self, rollout: Rollout, scene: Scene) -> Tensor:
        """`[B, T]` or `[B]`, in (0, 1)."""
        latents = self.base.latents(rollout)
        others = self.comparison.to(latents.device).expand(len(latents), -1, -1)
        return win_probability(self.base.score(rollout, scene), self.base.model(scene).score(others, latents))
