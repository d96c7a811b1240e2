"""GenEval as a reward: a detector looks at the picture, a rule compares what it finds with what was asked for."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from regimen.functions.geneval import Counting, Detections, geneval_score
from regimen.rewards.base import Reward, Scene, Score
from regimen.rollout import Rollout

Detector = Callable[[Tensor], Detections]
"""Images `[B, C, H, W]` to what is found in them."""


class GenEvalReward(Reward):
    """Share of the prompt's demands that an image meets, `[B]` in [0, 1]; see `geneval_score`.

    It does not apply to samples without requirements.
    """

    def __init__(
        self,
        detector: Detector,
        *,
        graded: bool = True,
        counting: Counting = "exact",
        threshold: float = 0.3,
        margin: float = 0.1,
        requirements: str = "requirements",
        name: str = "geneval",
    ) -> None:
        """Make the reward.

        Args:
            detector: images to detections; the colours and labels are those of the requirements.
            graded: the share of demands that are met, as Flow-GRPO trains on; False: 1 where all are, else 0.
            counting, threshold, margin: see `geneval_score`.
            requirements: context entry, int64 `[B, R, 6]`.
            name: of the component.
        """
        self.detector, self.graded, self.requirements, self.name = detector, graded, requirements, name
        self.counting, self.threshold, self.margin = counting, threshold, margin

    def score(self, rollout: Rollout, scene: Scene) -> Score:
        """The share of demands met by each image."""
        requirements = rollout.context[self.requirements]
        graded, strict = geneval_score(
            self.detector(rollout["image"]),
            requirements,
            threshold=self.threshold,
            margin=self.margin,
            counting=self.counting,
        )
        return Score.of(graded if self.graded else strict.float(), (requirements[..., 1] > 0).any(1))
