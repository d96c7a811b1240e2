"""What a written question is worth: worked numbers, rules, a history that is resumed, and rows of two roles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import NonTensorStack

from regimen.functions.answers import exact_match
from regimen.functions.pass_rate import pass_rate
from regimen.rewards import NOT_APPLICABLE, SCORED, FunctionReward, Scene, judge
from regimen.rewards.answers import AnswerReward
from regimen.rewards.questions import (
    PassRate,
    ProposerReward,
    QuestionDiversity,
    QuestionGuard,
    jaccard,
    proposer_reward,
    question_diversity,
)
from regimen.rollout import Rollout

SIXTHS = torch.tensor([0, 1, 2, 3, 5, 6]) / 6


def rows(task: str, texts: list[str], questions: list[tuple[str, str]], number: list[int]) -> Rollout:
    """Samples of one role, one step each."""
    return Rollout.create(
        task=task,
        group=torch.zeros(len(texts), dtype=torch.int64) if task == "proposer" else torch.tensor(number),
        mask=torch.ones(len(texts), 1, dtype=torch.bool),
        columns={
            "text": NonTensorStack(*texts),
            "question": NonTensorStack(*(question for question, _ in questions)),
            "reference": NonTensorStack(*(reference for _, reference in questions)),
            "question_number": torch.tensor(number),
        },
    )


def game(questions: list[tuple[str, str]], answers: list[list[str]]) -> Rollout:
    """Proposals, and the answers to each."""
    said = [text for each in answers for text in each]
    number = [place for place, each in enumerate(answers) for _ in each]
    proposed = rows("proposer", ["?"] * len(questions), questions, list(range(len(questions))))
    return Rollout.cat([proposed, rows("solver", said, [questions[place] for place in number], number)])


def parts(rules: tuple[str, ...] = ("missing",), **settings: Any) -> tuple[Any, PassRate, QuestionDiversity]:
    correct = AnswerReward(exact_match, expected="reference").on("solver")
    rate = PassRate(correct, QuestionGuard(rules))
    return correct, rate, QuestionDiversity(rate, **settings)


# Formulas


def test_the_reward_of_six_questions_is_the_worked_one() -> None:
    diversity = torch.tensor([1, 1, 1, 0.5, 0.25, 1])
    expected = torch.tensor([0, 0, 0.9667, 0.7, 0, 0.3])
    torch.testing.assert_close(proposer_reward(SIXTHS, diversity), expected, atol=1e-4, rtol=0)


def test_the_best_question_is_the_hardest_above_the_threshold() -> None:
    rate = torch.linspace(0.201, 1, 50)
    worth = proposer_reward(rate, torch.ones(50))
    assert bool((worth.diff() < 0).all())
    assert float(proposer_reward(torch.tensor([2 / 6]), torch.ones(1))) == pytest.approx(0.9667, abs=1e-4)
    assert proposer_reward(torch.tensor([0.2, 0.0]), torch.ones(2)).tolist() == [0, 0]
    assert proposer_reward(torch.tensor([0.5]), torch.tensor([0.3])).tolist() == [0]


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"rate \[2\], diversity \[3\]"):
        proposer_reward(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"rewards \[2\] and group \[3\]"):
        pass_rate(torch.zeros(2), torch.zeros(3, dtype=torch.int64))


def test_the_pass_rate_is_the_mean_of_each_group_in_order() -> None:
    rewards, group = torch.tensor([1.0, 0, 1, 1, 0]), torch.tensor([7, 3, 7, 3, 3])
    torch.testing.assert_close(pass_rate(rewards, group), torch.tensor([1 / 3, 1.0]))


def test_diversity_is_the_share_of_the_history_that_is_not_alike() -> None:
    history = [{1, 2, 3, 4, 5}, {1, 2, 3, 4, 6}, {7, 8, 9}]
    assert question_diversity([1, 2, 3, 4, 5], history) == pytest.approx(2 / 3)
    assert question_diversity([1, 2, 3, 4, 5, 6], history) == pytest.approx(1 / 3)
    assert question_diversity([1], []) == 1
    # An index of exactly 0.8 is not alike.
    assert jaccard({1, 2, 3, 4}, {1, 2, 3, 4, 5}) == 0.8
    assert question_diversity({1, 2, 3, 4}, [{1, 2, 3, 4, 5}]) == 1


def test_questions_are_sets_of_tokens() -> None:
    assert jaccard(list("1+1+2"), list("2+1+1")) == 1
    assert jaccard([], []) == 1
    assert jaccard([], [1]) == 0


@pytest.mark.parametrize(
    ("question", "reference", "reasons"),
    [
        (r"What is 3+4? \boxed{7}", "7", ("answer_in_question", "boxed", "stated")[:2]),
        ("7 plus 0", "7", ("answer_in_question",)),
        ("3 + 4 = 7 ?", "7", ("answer_in_question", "stated")),
        ("3", "3 apples", ("question_in_answer",)),
        ("", "7", ("missing",)),
        ("3 + 4", " ", ("missing", "answer_in_question")),
        ("What is 3+4?", "7", ()),
    ],
)
def test_a_guard_names_the_rules_that_a_question_breaks(
    question: str, reference: str, reasons: tuple[str, ...]
) -> None:
    guard = QuestionGuard(["missing", "answer_in_question", "question_in_answer", "boxed", "stated"])
    assert guard.reasons(question, reference) == reasons


def test_an_unknown_rule_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="rule 'rude' is not one of missing, answer_in_question"):
        QuestionGuard(["rude"])
    with pytest.raises(ValueError, match="history is 0"):
        parts(history=0)


# Components


QUESTIONS = [("1 + 1", "2"), ("2 + 2", "4"), ("", "")]
ANSWERS = [["2", "2", "3", "1"], ["5", "5", "5", "5"], ["", "0", "0", "0"]]


def test_the_pass_rate_is_that_of_the_answers_on_rows_of_both_roles() -> None:
    _, rate, _ = parts()
    found = rate.score(game(QUESTIONS, ANSWERS), Scene())
    # An empty question is solved by an empty answer, and not valid.
    assert found.tolist() == [0.5, 0, 0] + [0.5] * 4 + [0] * 8


def test_a_question_that_breaks_a_rule_has_pass_rate_0() -> None:
    _, rate, _ = parts(("stated",))
    found = rate.score(game([("1 + 1 = 2", "2")], [["2", "2"]]), Scene())
    assert found.tolist() == [0, 0, 0]


def test_both_roles_are_judged_in_one_sum_and_answers_are_asked_once() -> None:
    asked = []

    def right(rollout: Rollout) -> torch.Tensor:
        asked.append(len(rollout))
        same = zip(rollout["text"].tolist(), rollout["reference"].tolist(), strict=True)
        return torch.tensor([float(a == b) for a, b in same])

    correct = FunctionReward(right, "correct").on("solver")
    rate = PassRate(correct, QuestionGuard(["missing"]))
    diversity = QuestionDiversity(rate)
    reward = correct + ProposerReward(rate, diversity) + rate.logged() + diversity.logged()
    judged, report = judge(reward, game(QUESTIONS, ANSWERS), Scene(knobs={"weight/correct": 1, "weight/proposal": 1}))
    assert asked == [12]
    assert report.failed == 0
    assert bool(judged.loss_mask.all())
    torch.testing.assert_close(judged.reward, torch.tensor([0.8, 0, 0, *[1.0, 1, 0, 0], *[0.0] * 4, *[1.0, 0, 0, 0]]))
    assert judged.status["proposal"].tolist() == [SCORED] * 3 + [NOT_APPLICABLE] * 12


def test_questions_enter_the_history_after_they_are_scored_and_only_if_one_is_solved() -> None:
    _, _, diversity = parts(low=0.2)
    assert diversity.score(game(QUESTIONS, [["9"] * 2] * 3), Scene()).value[:3].tolist() == [1, 1, 1]
    assert len(diversity.history) == 0
    assert diversity.score(game(QUESTIONS, ANSWERS), Scene()).value[:3].tolist() == [1, 1, 1]
    # The third has no text.
    assert list(diversity.history) == [{"1", "+"}, {"2", "+"}]
    assert diversity.score(game(QUESTIONS, ANSWERS), Scene()).value[:3].tolist() == [0.5, 0.5, 1]


def test_only_proposals_are_compared_wherever_they_stand_and_as_the_tokens_they_are_read_as() -> None:
    read: list[str] = []

    def letters(text: str) -> list[str]:
        read.append(text)
        return list(text)

    _, _, diversity = parts(tokens=letters)
    rollout = game([("ab", "2"), ("cd", "4")], [["2", "2"], ["4", "4"]])
    diversity.score(rollout[torch.tensor([2, 3, 0, 4, 5, 1])], Scene())
    assert read == ["ab", "cd"]
    again = game([("abx", "2"), ("ba", "4")], [["2", "2"], ["4", "4"]])[torch.tensor([2, 3, 1, 4, 5, 0])]
    # Of {a, b, x} neither of the two is alike, of {a, b} one is.
    assert diversity.score(again, Scene()).value.tolist() == [0, 0, 0.5, 0, 0, 1]


def test_the_history_is_bounded_and_goes_on_from_a_checkpoint() -> None:
    _, _, diversity = parts(history=3)
    diversity.score(game(QUESTIONS, ANSWERS), Scene())
    diversity.score(game([("1 + 1", "2"), ("3 + 3", "6")], [["2", "2"], ["6", "6"]]), Scene())
    assert list(diversity.history) == [{"2", "+"}, {"1", "+"}, {"3", "+"}]
    _, _, other = parts(history=3)
    other.load_state(diversity.save_state())
    assert list(other.history) == list(diversity.history)
    again = game([("1 + 1", "2")], [["2", "2"]])
    assert other.score(again, Scene()).value.tolist() == diversity.score(again, Scene()).value.tolist()


def test_a_failure_of_the_answers_is_the_failure_of_what_is_made_of_them() -> None:
    rate = PassRate(FunctionReward(lambda rollout: torch.zeros(len(rollout)), "nothing").logged())
    judged, report = judge(ProposerReward(rate, QuestionDiversity(rate)), game(QUESTIONS, ANSWERS), Scene())
    assert report.failed == len(judged)
    assert "PassRate: answers have no total" in report.errors[0]
