"""A judge of pairs as a reward: each sample against one that stands beside it, by every criterion of its task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from regimen.models.comparators import Comparator, Criteria, preference
from regimen.rewards.base import Reward, Scene
from regimen.rewards.expression import MeanReward, Score
from regimen.rollout import Rollout

Transform = Literal["prob", "log", "centred", "logit"]

TRANSFORMS: dict[Transform, Callable[[Tensor], Tensor]] = {
    "prob": lambda p: p,
    "log": torch.log,
    "centred": lambda p: 2 * p - 1,
    "logit": torch.logit,
}
"""A probability of winning to a reward."""


class PairwiseReward(MeanReward):
    """How likely a judge holds each sample to beat its anchor: a component `[B]` per criterion, and their mean.

    A criterion that does not belong to a sample's task is not applicable. The judge is asked all its questions at once,
    in both orders. A gradient may flow through it into the sample.

    Of the transforms, `"log"` makes the reward `mean_d log P_d`, of which the negative is OneReward's loss (arXiv
    2508.21066); its slope against a margin is `1 - P`, which fades as the sample wins.
    """

    def __init__(
        self,
        criteria: Criteria,
        member: str = "reward_model",
        *,
        column: str = "image",
        anchor: str = "reference_image",
        transform: Transform = "prob",
    ) -> None:
        """Make the reward.

        Args:
            criteria: of each task; those of the judge, or some of them.
            member: the cast's `Comparator`.
            column: the judged samples `[B, ...]`; anchor: what each is compared with, of the same shape.
            transform: of a probability; see `TRANSFORMS`.

        Raises:
            ValueError: an unknown transform.
        """
        if transform not in get_args(Transform):
            raise ValueError(f"PairwiseReward: transform '{transform}'; expected one of {', '.join(TRANSFORMS)}")
        asked = _Asked(criteria, member, column, anchor)
        super().__init__(*(_Criterion(asked, place, name, transform) for place, name in enumerate(criteria.names)))


class _Asked:
    """The answers to all questions about a rollout."""

    def __init__(self, criteria: Criteria, member: str, column: str, anchor: str) -> None:
        self.criteria, self.member, self.column, self.anchor = criteria, member, column, anchor

    def __call__(self, rollout: Rollout, scene: Scene) -> Tensor:
        """Probabilities of winning `[B, K]`, 1/2 where a criterion does not apply."""
        if self.member not in scene.cast:
            raise ValueError(
                f"PairwiseReward needs the member '{self.member}', which the cast lacks (it has: "
                f"{', '.join(scene.cast)}); add a comparator, or name another"
            )
        comparator: Comparator = scene.cast[self.member]
        questions = self.criteria.questions(rollout)
        image, anchor = rollout[self.column], rollout[self.anchor]
        if image.shape != anchor.shape:
            raise ValueError(
                f"PairwiseReward: column '{self.column}' is {list(image.shape)} and '{self.anchor}' "
                f"{list(anchor.shape)}; expected one shape"
            )
        won = preference(comparator, questions, image[questions.row], anchor[questions.row])
        table = won.new_full((len(rollout), len(self.criteria.names)), 0.5)
        return table.index_put((questions.row, questions.place), won)


class _Criterion(Reward):
    """One criterion."""

    differentiable = True

    def __init__(self, asked: _Asked, place: int, name: str, transform: Transform) -> None:
        self.asked, self.place, self.name, self.transform = asked, place, name, transform

    def score(self, rollout: Rollout, scene: Scene) -> Score:
        """`[B]`, not applicable where the criterion is none of the task's."""
        won: Tensor = scene.once(rollout, ("pairwise", id(self.asked)), lambda: self.asked(rollout, scene))
        applies = self.asked.criteria.applicable(rollout)[:, self.place]
        return Score.of(TRANSFORMS[self.transform](won[:, self.place]), applies)
