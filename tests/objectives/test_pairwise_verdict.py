"""A judge of pairs learns one pair of images as a win by one criterion and a loss by another."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from regimen.checkers import check
from regimen.models.comparators import Criteria, EncoderComparator, Questions, Told, labelled_pairs, preference
from regimen.objectives import PairwiseVerdictObjective
from regimen.objectives.base import Batch
from regimen.rollout import Rollout

CRITERIA = Criteria({"fill": ("bright", "dark"), "remove": ("dark",)})


class Fixed(nn.Module):
    """The margin of the first over the second is what the first shows."""

    criteria = CRITERIA

    def compare(self, questions: Questions, a: Tensor, b: Tensor) -> Tensor:
        return a[:, 0] - b[:, 0]


def samples(rows: int, seed: int = 0) -> Rollout:
    rng = torch.Generator().manual_seed(seed)
    parts = [
        Rollout.create(task=task, group=torch.arange(rows), mask=torch.ones(rows, 1, dtype=torch.bool),
                       context={"x": torch.zeros(rows)})
        for task in ("fill", "remove")
    ]  # fmt: skip
    rollout = Rollout.cat(parts)
    candidates = torch.randn(2, len(rollout), 3, generator=rng)
    return rollout.with_columns(**labelled_pairs(CRITERIA, score, rollout, list(candidates), 0.0, rng))


def score(questions: Questions, images: Tensor) -> Tensor:
    return torch.tensor([1.0 if name == "bright" else -1.0 for name in questions.criterion]) * images.sum(1)


def batch(rollout: Rollout, model: nn.Module, seed: int = 0, **parts: object) -> Batch:
    return Batch(rollout, {"reward_model": model}, {}, torch.Generator().manual_seed(seed), **parts)  # type: ignore[arg-type]


def test_the_loss_is_that_of_the_verdict() -> None:
    rollout = samples(1).of_task("fill")
    first = torch.tensor([[[1.2, 0, 0], [-0.3, 0, 0]]])
    second = torch.tensor([[[0.4, 0, 0], [0.5, 0, 0]]])
    labelled = rollout.with_columns(first=first, second=second, label=torch.ones(1, 2), asked=torch.ones(1, 2) > 0)
    for swap in (True, False):  # A judge without a bias for a place does not see the swap.
        found = PairwiseVerdictObjective(swap_augment=swap)(batch(labelled, Fixed()))
        assert float(found.total) == pytest.approx((0.371101 + 1.171101) / 2, abs=1e-6)
        assert float(found.metrics["pair_accuracy"]) == 0.5
    unsure = labelled.with_columns(label=torch.full((1, 2), 0.5), first=second)
    assert float(PairwiseVerdictObjective()(batch(unsure, Fixed())).total) == pytest.approx(math.log(2))


def test_parts_of_a_minibatch_add_up_to_it() -> None:
    rollout, objective = samples(5), PairwiseVerdictObjective(swap_augment=False)
    whole = float(objective(batch(rollout, Fixed())).total)
    rows = [slice(0, 3), slice(3, 10)]
    parts = [objective(batch(rollout[part], Fixed(), whole=rollout, rows=part)).total for part in rows]
    assert float(sum(parts)) == pytest.approx(whole, rel=1e-6)


class Encoder(nn.Module):
    """A candidate beside the condition."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 + 4, 16)

    def forward(self, candidate: Tensor, context: TensorDict, condition: Tensor) -> Tensor:
        seen: Tensor = self.layer(torch.cat([candidate, condition], 1)).tanh()
        return seen


def accuracy(told: Told) -> dict[str, float]:
    torch.manual_seed(0)
    model = EncoderComparator(Encoder(), 16, CRITERIA, told)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    rollout, rng = samples(400), torch.Generator().manual_seed(0)
    for step in range(200):
        rows = torch.randint(len(rollout), (64,), generator=rng)
        loss = PairwiseVerdictObjective()(batch(rollout[rows], model, step)).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    new = samples(200, seed=9)
    questions = CRITERIA.questions(new, new["asked"])
    won = preference(model, questions, new["first"][new["asked"]], new["second"][new["asked"]])
    right = (won > 0.5) == (new["label"][new["asked"]] > 0.5)
    names = zip(questions.task, questions.criterion, strict=True)
    found = dict.fromkeys(["fill/bright", "fill/dark", "remove/dark"], 0.0)
    for (task, criterion), hit in zip(names, right.tolist(), strict=True):
        found[f"{task}/{criterion}"] += hit / 200
    return found


def test_only_a_judge_that_is_told_the_criterion_learns_criteria_that_conflict() -> None:
    told = accuracy(("task", "criterion"))
    assert min(told.values()) > 0.9
    pooled = accuracy(())
    assert pooled["fill/bright"] < 0.3  # Two of three labels want the dark one.
    assert pooled["fill/dark"] > 0.7


def test_the_same_stream_gives_the_same_loss() -> None:
    torch.manual_seed(0)
    model, rollout = EncoderComparator(Encoder(), 16, CRITERIA), samples(8)
    losses = [float(PairwiseVerdictObjective()(batch(rollout, model, seed)).total) for seed in (3, 3, 4)]
    assert losses[0] == losses[1] != losses[2]


def test_columns_that_do_not_fit_are_named() -> None:
    rollout = samples(2)
    odd = rollout.with_columns(asked=torch.ones(4, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"column 'asked' is \[4, 3\]; expected \[B, 2\].*bright, dark"):
        PairwiseVerdictObjective()(batch(odd, Fixed()))
    nothing = rollout.with_columns(asked=torch.zeros(4, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="no question was asked"):
        PairwiseVerdictObjective()(batch(nothing, Fixed()))


def test_it_passes_the_checker() -> None:
    torch.manual_seed(0)
    model = EncoderComparator(Encoder(), 16, CRITERIA)
    assert check(PairwiseVerdictObjective(), samples(4), cast={"reward_model": model}).messages == []
