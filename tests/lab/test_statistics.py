"""Intervals against hand-checked cases; claims and verdicts, with gaps shown."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest

from regimen.lab.experiment import ArmResult, Claim
from regimen.lab.statistics import Interval, JudgedClaim, caution, interval, intervals, judge_claim, position, verdict


def result(value: float) -> ArmResult:
    records = [{"stage": "start", "metrics": {"score": 0.0}}, {"stage": "end", "metrics": {"score": value}}]
    return ArmResult(records, samples=1, rows=0, gradient_steps=1, seconds=1.0)


def judged(values: Mapping[int, float], above: float = 0.0, seeds: list[int] | None = None) -> JudgedClaim:
    claim = Claim("score", "the score is high", lambda seed: seed["arm"].final["score"], ["arm"], above)
    return judge_claim(claim, seeds or list(values), {s: {"arm": result(v)} for s, v in values.items()})


def test_two_values_resample_to_their_extremes() -> None:
    # Both draws are 0 in a quarter of the resamples and 1 in a quarter: the 2.5 % points are the extremes.
    assert interval([0.0, 1.0]) == Interval(0.5, 0.0, 1.0)


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert interval([0.25] * 5) == Interval(0.25, 0.25, 0.25)


def test_interval_agrees_with_the_exact_distribution_of_resampled_means() -> None:
    values = [1.0, 2.0, 4.0, 8.0, 16.0]
    means = np.sort(np.array(np.meshgrid(*[values] * 5)).reshape(5, -1).mean(0))
    found = interval(values)
    assert found.mean == pytest.approx(6.2)
    assert found.low == pytest.approx(np.percentile(means, 2.5), abs=0.21)
    assert found.high == pytest.approx(np.percentile(means, 97.5), abs=0.41)


def test_interval_is_reproducible_and_leaves_the_global_generator_alone() -> None:
    from regimen.lab import statistics

    np.random.seed(3)
    first = interval([0.1, 0.4, 0.35])
    statistics._intervals.cache_clear()
    np.random.seed(3)
    expected = np.random.RandomState(3).rand()
    assert interval([0.1, 0.4, 0.35]) == first
    assert np.random.rand() == expected


def test_columns_are_resampled_together() -> None:
    rows = [[v, 1 - v, 7.0] for v in (0.1, 0.5, 0.9)]
    a, b, constant = intervals(rows)
    assert a == interval([row[0] for row in rows])
    assert b.low == pytest.approx(1 - a.high)
    assert constant == Interval(7.0, 7.0, 7.0)


def test_one_value_has_no_interval_and_is_unclear() -> None:
    found = interval([3.0])
    assert found.mean == 3.0
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert judged({0: 3.0}).verdict == "unclear"
    assert "nothing can be judged" in caution(1)
    assert caution(5) == ""


def test_values_that_are_not_finite_give_nan_in_their_column_only() -> None:
    broken, whole = intervals([[1.0, 1.0], [math.nan, 2.0], [math.inf, 3.0]])
    assert math.isnan(broken.mean)
    assert math.isnan(broken.low)
    assert whole.mean == 2.0


@pytest.mark.parametrize("table", [[], [[1.0], [1.0, 2.0]]])
def test_tables_that_are_none_are_refused(table: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="rows of lengths"):
        intervals(table)


def test_position_is_decided_by_the_whole_interval() -> None:
    assert position(Interval(0.5, 0.1, 0.9), 0.0) == "holds"
    assert position(Interval(0.5, -0.1, 0.9), 0.0) == "unclear"
    assert position(Interval(-0.5, -0.9, -0.1), 0.0) == "does not hold"
    assert position(Interval(0.0, 0.0, 0.0), 0.0) == "unclear"


def test_claims_are_judged_against_their_threshold() -> None:
    values = {0: 0.5, 1: 0.6, 2: 0.7}
    assert judged(values).verdict == "holds"
    assert judged(values, above=0.55).verdict == "unclear"
    assert judged(values, above=0.9).verdict == "does not hold"


def test_a_seed_without_a_value_leaves_a_claim_unclear_and_says_so() -> None:
    found = judged({0: 0.5, 1: math.nan, 2: 0.7})
    assert found.verdict == "unclear"
    assert found.interval.mean == pytest.approx(0.6)
    assert "1 of 3 seeds have no value" in found.note
    assert "seed 1: its value is nan" in found.note


def test_a_seed_without_results_is_a_gap_not_left_out() -> None:
    found = judged({0: 0.5, 1: 0.6}, seeds=[0, 1, 2])
    assert found.verdict == "unclear"
    assert found.missing == {2: "no result of arm"}


def test_a_claim_that_raises_is_a_gap() -> None:
    claim = Claim("ratio", "a ratio", lambda seed: 1.0 / seed["arm"].after("start")["score"], ["arm"])
    found = judge_claim(claim, [0], {0: {"arm": result(1.0)}})
    assert found.verdict == "unclear"
    assert "ZeroDivisionError" in found.missing[0]
    assert math.isnan(found.interval.mean)


def claims(*verdicts: str, judged: bool = True) -> list[JudgedClaim]:
    claim = Claim("c", "c", lambda seed: 0.0, [], judged=judged)
    return [JudgedClaim(claim, {}, {}, Interval(0, 0, 0), v) for v in verdicts]  # type: ignore[arg-type]


def test_the_paper_holds_only_if_all_judged_claims_hold() -> None:
    assert verdict(claims("holds", "holds")) == "holds"
    assert verdict(claims("holds", "unclear")) == "unclear"
    assert verdict(claims("unclear", "does not hold")) == "does not hold"
    assert verdict([*claims("holds"), *claims("does not hold", judged=False)]) == "holds"
    assert verdict(claims("holds"), left_out=True) == "unclear"
    assert verdict([]) == "unclear"
