"""Shares of tasks: fixed ones, and ones by a metric."""

from __future__ import annotations

from typing import Any

import pytest

from regimen.checkers import check
from regimen.controllers import Situation, TaskMixture

TASKS = ("a", "b", "c")


def moved(mixture: TaskMixture, **metrics: float) -> dict[str, float]:
    shown = {f"reward/{task}/odd": value for task, value in metrics.items()}
    return dict(mixture(Situation(0, None, shown, {})))


@pytest.mark.parametrize("by", [None, "odd"])
def test_it_passes_the_checks_of_a_users_controller(by: str | None) -> None:
    metrics = {f"reward/{task}/odd": 0.2 for task in TASKS}
    assert check(TaskMixture(TASKS, by=by), metrics=metrics).messages == []


def test_shares_are_equal_unless_given() -> None:
    assert moved(TaskMixture(TASKS)) == pytest.approx(dict.fromkeys(["mixture/a", "mixture/b", "mixture/c"], 1 / 3))
    assert moved(TaskMixture(["a", "b"], shares=[3, 1])) == {"mixture/a": 0.75, "mixture/b": 0.25}


def test_shares_are_proportional_to_one_minus_the_metric() -> None:
    found = moved(TaskMixture(TASKS, by="odd"), a=0.0, b=0.5, c=1.0)
    assert found == pytest.approx({"mixture/a": 2 / 3, "mixture/b": 1 / 3, "mixture/c": 0})


def test_temperature_evens_shares_out_and_least_is_kept() -> None:
    metrics = {"a": 0.0, "b": 0.75, "c": 1.0}
    assert moved(TaskMixture(TASKS, by="odd", temperature=2), **metrics)["mixture/b"] == pytest.approx(1 / 3)
    assert moved(TaskMixture(TASKS, by="odd", least=0.3), **metrics)["mixture/c"] == pytest.approx(0.1)
    assert sum(moved(TaskMixture(TASKS, by="odd", least=0.3), **metrics).values()) == pytest.approx(1)


def test_a_task_that_is_not_drawn_keeps_its_last_metric() -> None:
    mixture = TaskMixture(TASKS, by="odd")
    assert moved(mixture, a=0.0, b=0.5) == {}
    first = moved(mixture, a=0.0, b=0.5, c=1.0)
    assert moved(mixture, a=0.0, b=0.5) == first
    again = TaskMixture(TASKS, by="odd")
    again.load_state_dict(mixture.state_dict())
    assert moved(again, a=0.0) == first


def test_where_nothing_is_left_to_do_shares_are_equal() -> None:
    assert set(moved(TaskMixture(TASKS, by="odd"), a=1.0, b=1.0, c=1.0).values()) == {1 / 3}


def test_any_metric_and_the_weights_of_components_can_be_named() -> None:
    mixture = TaskMixture(["a"], by="eval/{task}/success", family="weight")
    assert mixture(Situation(0, None, {"eval/a/success": 0.5}, {})) == {"weight/a": 1.0}


def test_a_metric_out_of_range_is_an_error() -> None:
    with pytest.raises(ValueError, match="metric 'reward/a/odd' is 3.0 at step 0; expected a number from 0 to 1"):
        moved(TaskMixture(TASKS, by="odd"), a=3.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": "a"}, "expected at least one name, each once"),
        ({"tasks": ["a", "a"]}, "each once"),
        ({"tasks": []}, "at least one"),
        ({"tasks": TASKS, "shares": [1, 1]}, "for 3 tasks"),
        ({"tasks": TASKS, "shares": [1, 1, 1], "by": "odd"}, "no `by` beside them"),
        ({"tasks": TASKS, "temperature": 0}, "temperature=0"),
        ({"tasks": TASKS, "family": "share"}, "family='share'"),
    ],
)
def test_settings_that_do_not_fit_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskMixture(**settings)
