"""The buffer of questions: which enter, which leave, and in which order they are asked again."""

from __future__ import annotations

import pytest
import torch
from tensordict import NonTensorStack

from regimen.memory import QuestionMemory
from regimen.rollout import Rollout
from regimen.storage import pack_tree, unpack_tree


def seen(rates: dict[str, float]) -> Rollout:
    """Two rows of each question, with its pass rate."""
    questions = [question for question in rates for _ in range(2)]
    number = torch.arange(len(rates)).repeat_interleave(2)
    rollout = Rollout.create(
        task="solver",
        group=number,
        mask=torch.ones(len(questions), 1, dtype=torch.bool),
        columns={
            "question": NonTensorStack(*questions),
            "reference": NonTensorStack(*("7" for _ in questions)),
            "question_number": number,
        },
    )
    return rollout.replace(rewards={"pass_rate": torch.tensor(list(rates.values())).repeat_interleave(2)})


def held(memory: QuestionMemory) -> list[str]:
    return [kept.question for kept in memory.questions]


def test_questions_strictly_inside_the_window_enter() -> None:
    memory = QuestionMemory(0.2, 1.0)
    memory.add(seen({"a": 0.2, "b": 0.21, "c": 0.9, "d": 1.0, "e": 0.0, "f": float("nan")}))
    assert held(memory) == ["b", "c"]
    assert len(memory) == len(memory.newest()) == 12


def test_a_question_leaves_when_all_have_it_right_or_after_three_visits_without_improvement() -> None:
    memory = QuestionMemory(0.2, 1.0, max_stale=3)
    memory.add(seen({"easy": 0.5, "stuck": 0.5, "rising": 0.5}))
    for rate in (0.6, 0.7):
        memory.add(seen({"stuck": 0.505, "rising": rate}))
    memory.add(seen({"easy": 1.0}))
    assert held(memory) == ["stuck", "rising"]
    memory.add(seen({"stuck": 0.0, "rising": 0.8}))
    assert held(memory) == ["rising"]


def test_an_improvement_makes_a_question_fresh_again() -> None:
    memory = QuestionMemory(max_stale=2)
    memory.add(seen({"a": 0.3}))
    for rate in (0.3, 0.4, 0.3, 0.5, 0.3):
        memory.add(seen({"a": rate}))
    assert [(kept.best, kept.stale) for kept in memory.questions] == [(pytest.approx(0.5), 1)]


def test_questions_are_drawn_round_and_round_and_no_question_twice_at_once() -> None:
    memory = QuestionMemory()
    memory.add(seen({"a": 0.5, "b": 0.5, "c": 0.5}))
    assert [[question for question, _ in memory.draw(2)] for _ in range(3)] == [["a", "b"], ["c", "a"], ["b", "c"]]
    assert memory.draw(9) == [("a", "7"), ("b", "7"), ("c", "7")]
    assert QuestionMemory().draw(2) == []


def test_the_order_survives_a_question_that_leaves() -> None:
    memory = QuestionMemory()
    memory.add(seen({"a": 0.5, "b": 0.5, "c": 0.5}))
    memory.draw(2)
    memory.add(seen({"a": 1.0}))
    assert [question for question, _ in memory.draw(2)] == ["c", "b"]


def test_the_buffer_goes_on_from_a_checkpoint() -> None:
    memory, other = QuestionMemory(), QuestionMemory()
    memory.add(seen({"a": 0.5, "b": 0.4, "c": 0.3}))
    memory.add(seen({"a": 0.5}))
    memory.draw(2)
    other.load_state_dict(unpack_tree(pack_tree(memory.state_dict())))
    assert other.questions == memory.questions
    assert other.draw(2) == memory.draw(2)


def test_bad_settings_and_rollouts_without_a_rate_are_named() -> None:
    with pytest.raises(ValueError, match=r"low=0\.5, high=0\.5, max_stale=3"):
        QuestionMemory(0.5, 0.5)
    with pytest.raises(ValueError, match=r"no reward component 'pass_rate'; add PassRate"):
        QuestionMemory().add(seen({"a": 0.5}).replace(rewards={}))
