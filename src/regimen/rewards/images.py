"""Rewards on generated images: follows the prompt, follows the instruction."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from regimen.functions.images import closeness
from regimen.rewards.base import Reward, Scene
from regimen.rollout import Rollout


class ClassifierReward(Reward):
    """Probability that a classifier gives to the class that was asked for, `[B]` in [0, 1]."""

    def __init__(
        self, classifier: Callable[[Tensor], Tensor], *, label: str = "condition", name: str = "follows_prompt"
    ) -> None:
        """Make the reward.

        Args:
            classifier: images `[B, ...]` to class probabilities `[B, K]`.
            label: context entry, int64 `[B]`, with the class asked for.
            name: of the component.
        """
        self.classifier, self.label, self.name = classifier, label, name

    def score(self, rollout: Rollout, scene: Scene) -> Tensor:
        """The probability of the class asked for."""
        probabilities = self.classifier(rollout["image"])
        return probabilities.gather(1, rollout.context[self.label][:, None])[:, 0]


class EditReward(Reward):
    """How close an edited image is to the exact result of its instruction, `[B]` in (0, 1]; see `closeness`."""

    def __init__(self, target: Callable[[Rollout], Tensor], *, scale: float = 4.0, name: str = "follows_edit") -> None:
        """Make the reward.

        Args:
            target: the rollout to the exact results `[B, ...]`.
            scale: how fast the reward falls with the squared error.
            name: of the component.
        """
        self.target, self.scale, self.name = target, scale, name

    def score(self, rollout: Rollout, scene: Scene) -> Tensor:
        """Closeness of each image to its target."""
        return closeness(rollout["image"], self.target(rollout), self.scale)
