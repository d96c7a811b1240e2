"""A judge of pairs as a reward: worked numbers, what does not apply, and who may be differentiated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from regimen.checkers import check
from regimen.models.comparators import Criteria, Questions
from regimen.rewards import (
    NOT_APPLICABLE,
    SCORED,
    MeanReward,
    NormalizedReward,
    PairwiseReward,
    Reward,
    Scene,
    judge,
    reward_from,
)
from regimen.rollout import Rollout

CRITERIA = Criteria({"fill": ("alignment", "consistency", "structure"), "extend": ("alignment", "structure")})
MARGINS = {"alignment": 1.2 - 0.4, "consistency": -0.3 - 0.5, "structure": 2.0 + 1.0}


class Told:
    """The margin of a criterion times the difference of the images, and a bias for the first."""

    def __init__(self, bias: float = 0.0) -> None:
        self.criteria, self.bias, self.calls = CRITERIA, bias, 0

    def compare(self, questions: Questions, a: Tensor, b: Tensor) -> Tensor:
        self.calls += 1
        margin = torch.tensor([MARGINS[name] for name in questions.criterion])
        return margin * (a - b).flatten(1).mean(1) + self.bias


def rollout(*tasks: str, rows: int = 2) -> Rollout:
    parts = [
        Rollout.create(task=task, group=torch.arange(rows), mask=torch.ones(rows, 1, dtype=torch.bool),
                       columns={"image": torch.ones(rows, 1, 2, 2), "reference_image": torch.zeros(rows, 1, 2, 2)})
        for task in tasks
    ]  # fmt: skip
    return Rollout.cat(parts)


def total(reward: Any, samples: Rollout, **members: Any) -> Tensor:
    answer = reward.answer(samples, members or {"reward_model": Told()}, {})
    assert answer.total is not None
    found: Tensor = answer.total.value
    return found


def test_losses_of_three_criteria_are_the_worked_numbers() -> None:
    samples = rollout("fill", rows=1)
    assert float(-total(PairwiseReward(CRITERIA, transform="log"), samples)) == pytest.approx(0.530263, abs=1e-6)
    assert float(-total(PairwiseReward(CRITERIA), samples)) == pytest.approx(-0.650858, abs=1e-6)
    assert float(total(PairwiseReward(CRITERIA, transform="centred"), samples)) == pytest.approx(
        2 * 0.650858 - 1, abs=1e-5
    )
    assert float(total(PairwiseReward(CRITERIA, transform="logit"), samples)) == pytest.approx(
        (0.8 - 0.8 + 3) / 3, abs=1e-5
    )


def test_a_criterion_that_is_none_of_the_task_s_is_left_out_of_its_mean() -> None:
    samples = rollout("fill", "extend", rows=1)
    answer = PairwiseReward(CRITERIA, transform="log").answer(samples, {"reward_model": Told()}, {})
    assert answer.total is not None
    assert (-answer.total.value).tolist() == pytest.approx([0.530263, 0.209844], abs=1e-6)
    assert answer.components["consistency"].status.tolist() == [SCORED, NOT_APPLICABLE]
    judged, report = judge(PairwiseReward(CRITERIA), samples, Scene({"reward_model": Told()}))
    assert report.counts["extend", "consistency"] == (0, 1, 0)
    assert judged.reward.tolist() == pytest.approx([0.650858, (0.689974 + 0.952574) / 2], abs=1e-5)


def test_identical_images_are_worth_half_however_biased_the_judge() -> None:
    samples = rollout("fill")
    samples = samples.with_columns(reference_image=samples["image"])
    found = total(PairwiseReward(CRITERIA, transform="log"), samples, reward_model=Told(bias=1.5))
    assert (-found).tolist() == pytest.approx([0.693147] * 2, abs=1e-6)


def test_a_task_without_criteria_leaves_the_loss_and_the_judge_is_asked_once_in_each_order() -> None:
    told = Told()
    judged, report = judge(PairwiseReward(CRITERIA), rollout("fill", "other", rows=1), Scene({"reward_model": told}))
    assert told.calls == 2
    assert judged.loss_mask.tolist() == [[True], [False]]
    assert report.failed == 0


def test_a_judge_s_trouble_is_told() -> None:
    samples = rollout("fill", rows=1)
    errors = PairwiseReward(CRITERIA).answer(samples, {"policy": None}, {}).components["alignment"].errors
    assert "needs the member 'reward_model', which the cast lacks (it has: policy)" in errors[0]
    wide = samples.with_columns(reference_image=torch.zeros(1, 1, 3, 3))
    errors = PairwiseReward(CRITERIA).answer(wide, {"reward_model": Told()}, {}).components["alignment"].errors
    assert "column 'image' is [1, 1, 2, 2] and 'reference_image' [1, 1, 3, 3]" in errors[0]
    with pytest.raises(ValueError, match="transform 'square'"):
        PairwiseReward(CRITERIA, transform="square")  # type: ignore[arg-type]


# What a gradient may flow through


class Smooth(Reward):
    """Differentiable."""

    name, differentiable = "smooth", True

    def score(self, rollout: Rollout, scene: Scene) -> Tensor:
        found: Tensor = rollout["image"].flatten(1).mean(1)
        return found


@reward_from
def counted(rollout: Rollout) -> Tensor:
    found: Tensor = (rollout["image"] > 0).flatten(1).float().mean(1)
    return found


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (Smooth, []),
        (lambda: counted, ["counted"]),
        (lambda: Smooth() + 2 * counted, ["counted"]),
        (lambda: Smooth() + counted.logged(), []),
        (lambda: Smooth().when(counted), []),
        (lambda: (Smooth() * counted).on("fill"), ["counted"]),
        (lambda: NormalizedReward(Smooth()), ["normalized"]),
        (lambda: PairwiseReward(CRITERIA), []),
    ],
)
def test_a_composition_says_which_components_pass_no_gradient(make: Callable[[], Any], names: list[str]) -> None:
    assert make().undifferentiable == names


def test_the_mean_of_what_applies_counts_each_sample_alike() -> None:
    samples = rollout("fill", "extend", rows=1)
    answer = MeanReward(Smooth().on("fill"), 3 * Smooth.__class__("Other", (Smooth,), {"name": "other"})()).answer(
        samples, {}, {"weight/smooth": 1.0, "weight/other": 3.0}
    )
    assert answer.total is not None
    assert answer.total.value.tolist() == [2.0, 3.0]
    with pytest.raises(ValueError, match="at least one reward"):
        MeanReward()
    with pytest.raises(ValueError, match="only logged"):
        MeanReward(Smooth().logged())


def test_it_passes_the_checker() -> None:
    parts = PairwiseReward(CRITERIA).parts
    for part in (Smooth(), *parts):
        assert check(part, rollout("fill", "extend"), cast={"reward_model": Told()}).messages == []
