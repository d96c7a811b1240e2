"""Knobs: ranges, conflicts, evaluation values, weights."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regimen.knobs import Knob, Knobs, Weight


def board(*knobs: Knob, **overrides: float) -> Knobs:
    return Knobs([("a part", knob) for knob in knobs], overrides)


def test_value_outside_the_range_names_knob_source_and_range() -> None:
    knobs = board(Knob("temperature", 1.0, 0.0, 2.0))
    with pytest.raises(
        ValueError, match=r"knob 'temperature': Schedule gave 3.0, expected a finite number in \[0.0, 2.0\]"
    ):
        knobs.set("temperature", 3.0, by="Schedule")
    assert knobs["temperature"] == 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_value_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="expected a finite number"):
        board(Knob("a", 1.0)).set("a", value, by="test")


def test_default_and_evaluation_value_are_checked_when_the_knob_is_made() -> None:
    with pytest.raises(ValueError, match="its default gave -1"):
        Knob("a", -1.0, low=0.0)
    with pytest.raises(ValueError, match="its evaluation value gave 0"):
        Knob("steps", 5, low=1, evaluation=0)


def test_integer_knob_floors_and_forgives_rounding() -> None:
    knobs = board(Knob("budget", 10, integer=True))
    for given_value, kept in ((86.9999999999, 87.0), (86.5, 86.0), (87.0, 87.0)):
        knobs.set("budget", given_value, by="test")
        assert knobs["budget"] == kept


def test_unknown_knob_names_the_nearest_and_all() -> None:
    knobs = board(Knob("kl_weight", 0.1), Knob("clip", 0.2))
    with pytest.raises(KeyError, match="did you mean 'kl_weight'.*clip, kl_weight"):
        knobs["kl_wieght"]
    with pytest.raises(ValueError, match="Schedule: no component reads a knob 'zzz'"):
        knobs.set("zzz", 1.0, by="Schedule")


def test_two_defaults_are_a_conflict_unless_settled() -> None:
    two = [("policy", Knob("a", 1.0)), ("task", Knob("a", 2.0))]
    with pytest.raises(ValueError, match=r"'a' has two defaults: 1.0 \(policy\) and 2.0 \(task\)"):
        Knobs(two)
    assert Knobs(two, {"a": 3.0})["a"] == 3.0


def test_two_evaluation_values_are_a_conflict() -> None:
    with pytest.raises(ValueError, match=r"two evaluation values: 20 \(policy\) and 40 \(teacher\)"):
        Knobs([("policy", Knob("steps", 10, evaluation=20)), ("teacher", Knob("steps", 10, evaluation=40))])


def test_shared_knob_satisfies_both_owners() -> None:
    knobs = Knobs([("a", Knob("x", 3.0, low=0)), ("b", Knob("x", 3.0, high=5, integer=True, evaluation=4))])
    assert knobs.owners("x") == ["a", "b"]
    assert knobs.for_evaluation() == {"x": 4.0}
    for bad in (-1.0, 6.0):
        with pytest.raises(ValueError, match="expected a finite number"):
            knobs.set("x", bad, by="test")
    knobs.set("x", 2.7, by="test")
    assert knobs["x"] == 2.0


def test_evaluation_values_do_not_touch_those_in_force() -> None:
    knobs = board(Knob("noise_level", 0.7, evaluation=0.0), Knob("guidance", 2.0))
    assert knobs.for_evaluation() == {"noise_level": 0.0, "guidance": 2.0}
    assert knobs.snapshot() == {"noise_level": 0.7, "guidance": 2.0}


def test_override_of_an_unread_knob_is_refused() -> None:
    with pytest.raises(ValueError, match="no component reads a knob 'b'"):
        board(Knob("a", 1.0), b=2.0)


def test_state_round_trip() -> None:
    knobs = board(Knob("a", 1.0), Knob("b", 2.0))
    knobs.set("a", 0.5, by="test")
    other = board(Knob("a", 1.0), Knob("b", 2.0))
    other.load_state_dict(knobs.state_dict())
    assert dict(other) == {"a": 0.5, "b": 2.0}


def test_board_of_parts() -> None:
    class Part:
        knobs = (Knob("a", 1.0), Knob("weight/x", 2.0))

    assert dict(Knobs.of(Part(), **{"weight/x": 3.0})) == {"a": 1.0, "weight/x": 3.0}


@given(st.floats(-10, 10), st.floats(-10, 10))
def test_weight_is_a_non_negative_knob_times_a_constant(first: float, second: float) -> None:
    weight = Weight.of(first, "format").times(second)
    assert weight.knob.name == "weight/format"
    assert weight.knob.default == abs(first)
    assert weight.value({"weight/format": weight.knob.default}) == pytest.approx(first * second)


def test_weight_takes_a_knob_as_it_is() -> None:
    knob = Knob("kl_weight", 0.01)
    assert Weight.of(knob, "kl").knob is knob
    assert Weight.of(knob, "kl").value({"kl_weight": 0.5}) == 0.5
