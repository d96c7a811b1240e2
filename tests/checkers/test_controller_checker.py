"""The checker of controllers: good ones pass, and every class of failure is explained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from regimen.checkers import check
from regimen.controllers import Alternating, Linear, Schedule, Situation


class Rising:
    """Raises a knob by a tenth each time that a metric lies above a target; remembers how far it is."""

    moves: Any = ("kl_weight",)
    moment: Any = "after_learn"

    def __init__(self) -> None:
        self.value = 0.1

    def __call__(self, situation: Situation) -> dict[str, float]:
        self.value += 0.1
        return {"kl_weight": self.value}

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value = state["value"]


def test_good_controllers_pass_and_keep_their_state() -> None:
    rising = Rising()
    for controller in (rising, Schedule("kl_weight", Linear(1, 0, 10)), Schedule("a", Alternating(2, 0.5, 1, 0))):
        assert check(controller).messages == []
    assert rising.value == 0.1


class MovesNothing(Rising):
    moves = ()


class MovesText(Rising):
    moves = "kl_weight"


class Whenever(Rising):
    moment = "sometimes"


class Unstorable(Rising):
    def state_dict(self) -> dict[str, Any]:
        return {"value": {1, 2}}


class Forgets(Rising):
    def state_dict(self) -> dict[str, Any]:
        return {"value": 0.1}


class CannotLoad(Rising):
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value = state["level"]


class NoMapping(Rising):
    def __call__(self, situation: Situation) -> Any:
        return 0.5


class MovesAnother(Rising):
    def __call__(self, situation: Situation) -> dict[str, float]:
        return {"temperature": 1.0}


class NotFinite(Rising):
    def __call__(self, situation: Situation) -> dict[str, float]:
        return {"kl_weight": float("inf") if situation.step == 3 else 1.0}


class TextValue(Rising):
    def __call__(self, situation: Situation) -> Any:
        return {"kl_weight": "high"}


class Writes(Rising):
    def __call__(self, situation: Situation) -> dict[str, float]:
        situation.metrics["kl"] = 0.0  # type: ignore[index]
        return {}


class Reads(Rising):
    def __call__(self, situation: Situation) -> dict[str, float]:
        return {"kl_weight": 2.0 * situation.metrics["policy/kl"]}


@pytest.mark.parametrize(
    ("controller", "message"),
    [
        (MovesNothing(), "moves is (), expected the names of the knobs that it moves, such as ('kl_weight',)"),
        (MovesText(), "moves is 'kl_weight', expected the names"),
        (Whenever(), "moment is 'sometimes', expected one of before_collect, after_judge, before_learn, after_learn"),
        (Unstorable(), "state_dict() cannot be stored (state at '/value' is a set"),
        (Forgets(), "after load_state_dict its next values are {'kl_weight': 0.2}, without the interruption"),
        (CannotLoad(), "load_state_dict(state_dict()) raised KeyError: level"),
        (NoMapping(), "it returned 0.5, expected a mapping of knob names to new values"),
        (MovesAnother(), "it moved temperature, which its moves ('kl_weight',) do not name"),
        (NotFinite(), "it gave knob 'kl_weight' the value inf at step 3, expected a finite number"),
        (TextValue(), "it gave knob 'kl_weight' the value 'high' at step 0"),
        (Writes(), "it changed the metrics that it was shown; they are the log's"),
        (Reads(), "controller(situation) at step 0 (metrics: none) raised KeyError: policy/kl"),
    ],
)  # fmt: skip
def test_every_failure_is_explained(controller: Any, message: str) -> None:
    result = check(controller)
    assert not result.ok
    assert message in str(result)


def test_metrics_and_knobs_of_ones_own_are_shown() -> None:
    assert check(Reads(), metrics={"policy/kl": 0.5}).ok

    class Doubles(Rising):
        def __call__(self, situation: Situation) -> dict[str, float]:
            assert situation.knobs["kl_weight"] == 0.25
            return {"kl_weight": 0.5}

    assert check(Doubles(), knobs={"kl_weight": 0.25}).ok


def test_a_controller_that_lacks_a_part_is_told_which() -> None:
    class Half:
        moves = ("kl_weight",)

        def __call__(self, situation: Situation) -> dict[str, float]:
            return {}

    assert "it looks like a Controller (it has moves) but lacks moment, state_dict, load_state_dict" in str(
        check(Half())
    )


def test_what_is_no_part_at_all_is_told_which_parts_there_are() -> None:
    assert "a int is no part that can be checked; expected a policy (distribution), a task" in str(check(3))
