"""Training a judge of pairs on labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regimen.models.comparators import Comparator
from regimen.objectives.base import Batch, Objective
from regimen.objectives.variational_preference import preference_nll


@dataclass(frozen=True)
class PairwiseVerdictObjective(Objective):
    """`-log P(the better one wins | task, criterion)`, a mean over the questions that were asked (arXiv 2508.21066).

    A sample has the columns `first`, `second [B, K, ...]`, `label [B, K]` (the probability that the first is better)
    and `asked`, bool `[B, K]`, for the `K` criteria of the judge; see `labelled_pairs`.

    Attributes:
        member: the cast's `Comparator`.
        swap_augment: show half of the pairs, at random, in the other order, against a judge's bias for a place.
    """

    member: str = "reward_model"
    swap_augment: bool = True
    name: str = "pairwise_verdict"

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over the minibatch's questions. Metric: `pair_accuracy`, share of the labels that the judge agrees with.

        Raises:
            ValueError: nothing was asked, or as many criteria as the judge does not have.
        """
        rollout, judge = batch.rollout, batch.member(self.member)
        comparator: Comparator = judge
        asked = rollout["asked"]
        if asked.ndim != 2 or asked.shape[1] != len(comparator.criteria.names):
            raise ValueError(
                f"PairwiseVerdictObjective: column 'asked' is {list(asked.shape)}; expected "
                f"[B, {len(comparator.criteria.names)}], a place for each criterion of '{self.member}': "
                f"{', '.join(comparator.criteria.names)}"
            )
        whole = int((batch.rollout if batch.whole is None else batch.whole)["asked"].sum())
        if not whole:
            raise ValueError("PairwiseVerdictObjective: no question was asked about any sample of the minibatch")
        questions = comparator.criteria.questions(rollout, asked)
        first, second, label = (rollout[name][asked] for name in ("first", "second", "label"))
        if self.swap_augment:
            swapped = torch.rand(len(label), generator=batch.rng, device=label.device) < 0.5
            wide = swapped.view(-1, *[1] * (first.ndim - 1))
            first, second = torch.where(wide, second, first), torch.where(wide, first, second)
            label = torch.where(swapped, 1 - label, label)
        margin = comparator.compare(questions, first, second)
        right = ((margin > 0) == (label > 0.5)).float()
        return preference_nll(margin, label).sum() / whole, {"pair_accuracy": right.mean()}
