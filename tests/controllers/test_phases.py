"""Phases: they follow each other by the steps that updates have taken."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest

from regimen.controllers import Phase, Phases, Situation

A, B = {"mixture/a": 1.0, "mixture/b": 0.0}, {"mixture/a": 0.0, "mixture/b": 1.0}


def after(phases: Phases, **steps: float) -> Mapping[str, float]:
    metrics = {f"{update}/steps": count for update, count in steps.items()}
    return phases(Situation(1, None, metrics, {}))


def test_a_phase_ends_after_so_many_steps_of_its_update() -> None:
    phases = Phases([Phase(A, "writer", 2, 9), Phase(B, "reader", 1, 9)])
    assert phases.first == A
    assert phases.moves == ("mixture/a", "mixture/b")
    assert after(phases, writer=1, reader=0) == A
    # An iteration that is skipped does not count.
    assert after(phases, writer=1, reader=0) == A
    assert after(phases, writer=2, reader=0) == B
    assert after(phases, writer=2, reader=1) == A
    assert after(phases, writer=3, reader=1) == A
    assert after(phases, writer=4, reader=1) == B


def test_a_phase_ends_after_so_many_attempts_or_when_it_is_over() -> None:
    empty = False
    phases = Phases([Phase(A, "writer", 1, 2), Phase(B, "reader", 5, 5, lambda: empty)])
    assert [after(phases, writer=0, reader=0) for _ in range(2)] == [A, B]
    assert after(phases, writer=0, reader=1) == B
    empty = True
    assert after(phases, writer=0, reader=2) == A


def test_it_goes_on_from_a_checkpoint() -> None:
    first, second = (Phases([Phase(A, "writer", 2, 9), Phase(B, "reader", 2, 9)]) for _ in range(2))
    for steps in (1, 2):
        after(first, writer=steps, reader=0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert [after(each, writer=2, reader=1) for each in (first, second)] == [B, B]
    assert [after(each, writer=2, reader=2) for each in (first, second)] == [A, A]


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="steps=3, attempts=2"):
        Phase(A, "writer", 3, 2)
    with pytest.raises(ValueError, match=r"\[\['mixture/a', 'mixture/b'\], \['lr'\]\]"):
        Phases([Phase(A, "writer", 1, 1), Phase({"lr": 1.0}, "reader", 1, 1)])


def test_three_rounds_of_ten_and_five_are_thirty_steps_of_one_and_fifteen_of_the_other() -> None:
    phases, taken, turns = (
        Phases([Phase(A, "writer", 10, 20), Phase(B, "reader", 5, 10)]),
        {"writer": 0, "reader": 0},
        [],
    )
    knobs = phases.first
    while len(turns) < 6:
        active = "writer" if knobs == A else "reader"
        taken[active] += 1
        after_it = after(phases, **taken)
        turns += [active] if after_it != knobs else []
        knobs = after_it
    assert taken == {"writer": 30, "reader": 15}
    assert turns == ["writer", "reader"] * 3
