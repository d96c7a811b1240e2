"""Verdicts on pairs, and the step that a sample is learned from."""

from __future__ import annotations

import pytest
import torch

from regimen.functions.flow import predicted_data
from regimen.functions.verdicts import learned_once, symmetric_probability


def test_without_position_bias_it_is_the_probability_of_the_margin() -> None:
    margin = torch.tensor([1.2 - 0.4, -0.3 - 0.5, 2.0 + 1.0])
    won = symmetric_probability(margin, -margin)
    assert won.tolist() == pytest.approx([0.689974, 0.310026, 0.952574], abs=1e-6)
    assert (-won.log()).tolist() == pytest.approx([0.371101, 1.171101, 0.048587], abs=1e-6)
    assert float(-won.log().mean()) == pytest.approx(0.530263, rel=1e-5)


def test_the_slope_of_the_log_fades_as_the_first_wins() -> None:
    margin = torch.tensor(0.8, requires_grad=True)
    (-symmetric_probability(margin, -margin).log()).backward()
    assert float(margin.grad) == pytest.approx(-0.310026, abs=1e-6)  # type: ignore[arg-type]


def test_a_judge_that_prefers_the_first_place_prefers_nothing_of_equals() -> None:
    bias, other = torch.tensor([2.0]), torch.tensor([-0.7])
    assert float(symmetric_probability(bias, bias)) == pytest.approx(0.5)
    assert float(symmetric_probability(bias, other) + symmetric_probability(other, bias)) == pytest.approx(1)
    with pytest.raises(ValueError, match=r"margins \[1\] and \[2\]"):
        symmetric_probability(bias, torch.zeros(2))


def test_the_clean_sample_is_where_the_straight_path_ends() -> None:
    found = predicted_data(torch.tensor([[0.4, -0.2]]), torch.tensor([[1.0, -0.5]]), torch.tensor([0.6]))
    assert found[0].tolist() == pytest.approx([-0.2, 0.1])


@pytest.mark.parametrize(("steps", "last", "places"), [(12, 0.5, range(6, 12)), (5, 0.5, range(3, 5)),
                                                       (4, 1.0, range(4)), (3, 0.1, range(2, 3))])  # fmt: skip
def test_one_step_of_the_last_part_is_learned_from_each_as_often(steps: int, last: float, places: range) -> None:
    mask = torch.ones(3000, steps, dtype=torch.bool)
    found = learned_once(mask, last, torch.Generator().manual_seed(0))
    assert found.sum(1).unique().tolist() == [1]
    counts = found.sum(0)
    assert counts.nonzero().flatten().tolist() == list(places)
    assert counts[list(places)].float().std(correction=0) < 0.1 * 3000 / len(places)


def test_only_steps_that_exist_are_learned_from() -> None:
    mask = torch.tensor([[True, True, True, False], [False, True, True, False]])
    for seed in range(20):
        found = learned_once(mask, 0.4, torch.Generator().manual_seed(seed))
        assert found.tolist() == [[False, False, True, False], [False, False, True, False]]
    with pytest.raises(ValueError, match=r"last=1\.5"):
        learned_once(mask, 1.5, torch.Generator())
    with pytest.raises(ValueError, match="shortest sample has 0 steps"):
        learned_once(torch.zeros(1, 2, dtype=torch.bool), 0.5, torch.Generator())
