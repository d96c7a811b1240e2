"""Curves: the worked numbers of the budget schedules, limits, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regimen.controllers import Alternating, Constant, Curve, Exponential, Linear, Piecewise, Steps
from regimen.knobs import Knob, Knobs


def budgets(curve: Curve, *steps: int) -> list[float]:
    """The curve as an integer knob holds it."""
    knobs = Knobs([("a task", Knob("token_budget", 1, 1, integer=True))])
    held = []
    for step in steps:
        knobs.set("token_budget", curve(step), by="Schedule")
        held.append(knobs["token_budget"])
    return held


def levels(curve: Curve, total: int) -> list[float]:
    """The distinct budgets in the order in which they come."""
    return list(dict.fromkeys(budgets(curve, *range(total))))


def test_exponential_budget_of_256_that_shrinks_by_3_tenths_every_150_steps() -> None:
    curve = Exponential(256, 0.7, 150, staircase=True, floor=1)
    steps = (0, 149, 150, 299, 300, 449, 450, 599, 600)
    assert budgets(curve, *steps) == [256, 256, 179, 179, 125, 125, 87, 87, 61]
    assert budgets(curve, 10_000) == [1]


@pytest.mark.parametrize(("drops", "factor", "expected"), [
    (1, 0.3398, [256, 87]), (3, 0.6978, [256, 178, 124, 87]), (7, 0.8571, [256, 219, 188, 161, 138, 118, 101, 87]),
])  # fmt: skip
def test_drops_of_equal_ratio_from_256_to_87(drops: int, factor: float, expected: list[int]) -> None:
    curve = Steps(256, 87, drops, 600)
    assert levels(curve, 600) == expected
    every = 600 // (drops + 1)
    assert curve(every) / curve(every - 1) == pytest.approx(factor, abs=5e-5)
    assert budgets(curve, every - 1, every) == expected[:2]
    assert budgets(curve, 600, 10_000) == [87, 87]


@pytest.mark.parametrize(("curve", "expected"), [
    (Steps(48, 24, 3, 100), [48, 38, 30, 24]), (Steps(48, 24, 3, 100, "linear"), [48, 40, 32, 24]),
    (Steps(256, 87, 3, 600, "linear"), [256, 199, 143, 87]),
])  # fmt: skip
def test_other_budgets(curve: Steps, expected: list[int]) -> None:
    assert levels(curve, curve.total) == expected
    every = curve.total // 4
    assert budgets(curve, 0, every, 2 * every, 3 * every) == expected


def test_drops_of_equal_difference() -> None:
    curve = Steps(256, 87, 3, 600, "linear")
    assert [curve(step) for step in (0, 150, 300, 450)] == pytest.approx([256, 199.6667, 143.3333, 87], abs=1e-4)
    assert Steps(48, 24, 3, 100)(25) == pytest.approx(48 * 0.793701, abs=1e-4)


def test_final_budget_lasts_as_long_as_the_others() -> None:
    held = budgets(Steps(48, 24, 3, 100), *range(100))
    assert [held.count(level) for level in (48, 38, 30, 24)] == [25] * 4


@pytest.mark.parametrize("value", [1.0, 0.1, 48, 256, 1e-9])
@pytest.mark.parametrize("make", [
    lambda v: Exponential(v, 1), lambda v: Exponential(v, 1.0, 150, staircase=True), lambda v: Steps(v, v, 0, 600),
    lambda v: Steps(v, v, 3, 600), lambda v: Steps(v, v, 3, 600, "linear"), lambda v: Linear(v, v, 600),
    lambda v: Piecewise([(0, v)]), lambda v: Alternating(7, 0.3, v, v),
])  # fmt: skip
def test_curves_that_go_nowhere_are_constants_to_the_bit(make: Callable[[float], Curve], value: float) -> None:
    assert all(make(value)(step) == Constant(value)(step) for step in range(0, 1200, 7))


def test_exponential_without_stairs_and_with_a_floor() -> None:
    curve = Exponential(1.0, 0.5, every=10)
    assert [curve(step) for step in (0, 5, 10, 20)] == pytest.approx([1, 0.5**0.5, 0.5, 0.25])
    assert Exponential(1.0, 0.5, every=10, floor=0.3)(20) == 0.3


def test_linear_ends_where_it_ends() -> None:
    curve = Linear(0.9, 0.3, 6)
    assert [curve(step) for step in (0, 3, 6, 100)] == pytest.approx([0.9, 0.6, 0.3, 0.3])


def test_piecewise_holds_or_joins() -> None:
    points = [(2, 1.0), (4, 3.0), (10, 0.0)]
    assert [Piecewise(points)(step) for step in (0, 2, 3, 4, 9, 10, 50)] == [1, 1, 1, 3, 3, 0, 0]
    joined = Piecewise(points, linear=True)
    assert [joined(step) for step in (0, 2, 3, 4, 7, 10, 50)] == pytest.approx([1, 1, 2, 3, 1.5, 0, 0])


def test_alternating_takes_its_share_of_each_window() -> None:
    curve = Alternating(10, 0.3, 1.0, 0.0)
    assert [curve(step) for step in range(20)] == ([1.0] * 3 + [0.0] * 7) * 2
    assert {Alternating(5, 1.0, 1.0, 0.0)(step) for step in range(20)} == {1.0}
    assert {Alternating(5, 0.0, 1.0, 0.0)(step) for step in range(20)} == {0.0}


@given(st.floats(1, 500), st.floats(0.01, 1), st.integers(1, 9), st.integers(10, 1000), st.booleans())
def test_steps_only_fall_and_stay_within_their_ends(
    start: float, share: float, drops: int, total: int, linear: bool
) -> None:
    curve = Steps(start, share * start, drops, total, "linear" if linear else "exponential")
    values = [curve(step) for step in range(total + 5)]
    assert all(after <= before for before, after in pairwise(values))
    assert values[0] == start
    assert values[-1] == pytest.approx(share * start)
    assert len(set(values)) <= drops + 1


@given(st.floats(0.1, 100), st.floats(0.1, 1), st.integers(1, 50), st.integers(0, 500))
def test_stairs_never_lie_below_the_smooth_curve(start: float, gamma: float, every: int, step: int) -> None:
    smooth, stairs = Exponential(start, gamma, every)(step), Exponential(start, gamma, every, staircase=True)(step)
    assert stairs >= smooth * (1 - 1e-9)
    assert stairs == pytest.approx(Exponential(start, gamma, every)(step - step % every))


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Exponential(256, 0.0), r"gamma is 0.0, expected in \(0, 1\]"),
    (lambda: Exponential(256, 1.1), "gamma is 1.1"),
    (lambda: Exponential(256, -0.5), "gamma is -0.5"),
    (lambda: Exponential(256, 0.7, 0), "every is 0, expected above 0"),
    (lambda: Exponential(256, 0.7, -5), "every is -5"),
    (lambda: Steps(87, 256, 3, 600), "start=87, end=256, n_drops=3; expected end <= start"),
    (lambda: Steps(256, 87, 0, 600), "n_drops=0; expected end <= start, and equal if there are no drops"),
    (lambda: Steps(256, 87, -1, 600), "n_drops=-1"), (lambda: Steps(256, 87, 3, 0), "total is 0, expected above 0"),
    (lambda: Steps(1, 0, 3, 600), "end is 0; drops of equal ratio need values above 0"),
    (lambda: Linear(1, 0, 0), "Linear: total is 0"), (lambda: Piecewise([]), r"steps are \[\], expected at least one"),
    (lambda: Piecewise([(4, 1.0), (2, 2.0)]), r"steps are \[4, 2\], expected at least one, increasing"),
    (lambda: Piecewise([(2, 1.0), (2, 2.0)]), r"steps are \[2, 2\]"),
    (lambda: Alternating(0, 0.5, 1, 0), "window is 0"),
    (lambda: Alternating(5, 1.5, 1, 0), r"share is 1.5, expected in \[0, 1\]"),
])  # fmt: skip
def test_bad_settings_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("curve", [Constant(0), Exponential(-5, 0.7), Linear(5, -5, 10)])
def test_budget_that_is_not_positive_is_refused_by_its_knob(curve: Curve) -> None:
    with pytest.raises(ValueError, match=r"knob 'token_budget': Schedule gave .*, expected a finite number in \[1"):
        budgets(curve, 0, 10)
