"""Cyclical annealing along a cosine."""

from __future__ import annotations

import pytest

from regimen.controllers import Cosine


def test_it_rises_along_half_a_cosine() -> None:
    curve = Cosine(125, 4)
    assert [curve(step) for step in (0, 25, 100, 125)] == pytest.approx([0, 0.0955, 0.9045, 1], abs=1e-4)
    assert Cosine(250)(125) == pytest.approx(0.5)


def test_from_a_baseline() -> None:
    curve = Cosine(10_000, baseline=0.1)
    assert [curve(step) for step in (0, 2500, 5000, 10_000)] == pytest.approx([0.1, 0.2318, 0.55, 1], abs=1e-4)


def test_cycles_begin_anew_and_the_last_one_stays() -> None:
    curve = Cosine(4, 2)
    assert curve(5) == pytest.approx(curve(1))
    assert [curve(4), curve(8), curve(9), curve(100)] == [1, 1, 1, 1]


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="Cosine: cycles is 0"):
        Cosine(4, 0)
    with pytest.raises(ValueError, match="baseline is 1.5"):
        Cosine(4, baseline=1.5)
