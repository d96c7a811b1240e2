"""Rewards on an answer: right or wrong by rule, and the three outcomes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from regimen.functions.answers import boxed_text, choice_match, exact_match, last_number, math_match, numeric_match
from regimen.rewards import FAILED, NOT_APPLICABLE, SCORED, Scene, Score, judge
from regimen.rewards.answers import AnswerReward
from regimen.rollout import Rollout


def texts(lines: list[str], **columns: Any) -> Rollout:
    return Rollout.create(
        task="ask", group=torch.zeros(len(lines), dtype=torch.int64), mask=torch.ones(len(lines), 1, dtype=torch.bool),
        columns={"text": lines, **columns},
    )  # fmt: skip


def scored(reward: AnswerReward, rollout: Rollout) -> Score:
    return reward.judge(rollout, Scene()).components[reward.name]


@pytest.mark.parametrize(
    ("verifier", "tag", "lines", "answers", "values"),
    [
        (exact_match, "answer", ["<answer> 7 </answer>", "<answer>8</answer>", "7"], ["7"] * 3, [1, 0, 0]),
        (exact_match, None, [" 7 ", "so 7"], ["7"] * 2, [1, 0]),
        (numeric_match, last_number, ["3 and 7.0", "$7", "seven"], [7, 7, 7], [1, 1, 0]),
        (choice_match, "answer", ["<answer>(B) x</answer>", "<answer>A</answer>"], ["B", "B"], [1, 0]),
        (numeric_match, boxed_text, [r"\boxed{1/2}", r"\boxed{2}"], [0.5, 0.5], [1, 0]),
    ],
)
def test_answers_are_found_and_verified(
    verifier: Any, tag: Any, lines: list[str], answers: list[Any], values: list[float]
) -> None:
    score = scored(AnswerReward(verifier, tag=tag), texts(lines, answer=answers))
    assert score.status.tolist() == [SCORED] * len(lines)
    assert score.value.tolist() == values


def test_mathematics_is_verified_by_value() -> None:
    pytest.importorskip("math_verify")
    rollout = texts([r"\boxed{\frac{3}{6}}", r"\boxed{0.4}", "half"], answer=["1/2"] * 3)
    assert scored(AnswerReward(math_match, tag=boxed_text), rollout).value.tolist() == [1, 0, 0]


def test_right_and_wrong_have_values_and_grades_lie_between() -> None:
    def grade(given: str, expected: Any) -> float:
        return 1 - abs(float(given) - expected) / 10

    rollout = texts(["10", "5", "0", ""], answer=[10, 10, 10, 10])
    reward = AnswerReward(grade, right=2.0, wrong=-1.0, tag=lambda text: text or None)
    assert scored(reward, rollout).value.tolist() == pytest.approx([2.0, 0.5, -1.0, -1.0])


def test_whole_text_may_stand_in_for_a_missing_tag() -> None:
    rollout = texts([" 7 ", "<answer>7</answer>", "<answer>8</answer> 7"], answer=["7"] * 3)
    assert scored(AnswerReward(exact_match, tag="answer", untagged=True), rollout).value.tolist() == [1, 1, 0]
    assert scored(AnswerReward(exact_match, tag="answer"), rollout).value.tolist() == [0, 1, 0]


def test_unverifiable_samples_are_not_applicable_and_never_asked() -> None:
    asked = []

    def verifier(given: str, expected: Any) -> bool:
        asked.append(given)
        return True

    rollout = texts(["a", "b", "c"], answer=["a"] * 3, verifiable=[True, False, True])
    score = scored(AnswerReward(verifier), rollout)
    assert score.status.tolist() == [SCORED, NOT_APPLICABLE, SCORED]
    assert asked == ["a", "c"]


def test_an_expected_answer_that_cannot_be_read_fails_its_sample_alone() -> None:
    rollout = texts(["7", "7", "7"], answer=["7", "seven", "8"])
    judged, report = judge(AnswerReward(numeric_match), rollout, Scene())
    assert judged.status["correct"].tolist() == [SCORED, FAILED, SCORED]
    assert judged.rewards["correct"].nan_to_num(-1).tolist() == [1, -1, 0]
    assert judged.loss_mask[:, 0].tolist() == [True, False, True]
    assert report.errors[0].startswith(
        "reward 'correct', sample 1: the verifier raised ValueError: expected answer 'se"
    )


def test_a_policy_cannot_make_its_answer_unreadable() -> None:
    """Whatever it writes is wrong at worst: a failed sample would leave the loss."""
    lines = ["e5", "3/", "1/0", "1e999", "-", "\u0663", "9" * 5000, "nan", "(", "\\boxed{"]
    for verifier in (numeric_match, exact_match):
        score = scored(AnswerReward(verifier), texts(lines, answer=["12"] * len(lines)))
        assert score.status.tolist() == [SCORED] * len(lines)
        assert score.value.sum() == 0
    choice = scored(AnswerReward(choice_match), texts(lines, answer=["B"] * len(lines)))
    assert choice.status.tolist() == [SCORED] * len(lines)


def test_a_missing_extra_is_told_for_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def verifier(given: str, expected: Any) -> bool:
        raise ImportError("needs math-verify: pip install 'regimen-rl[math-verify]'")

    score = scored(AnswerReward(verifier), texts(["a", "b"], answer=["a", "b"]))
    assert score.status.tolist() == [FAILED, FAILED]
    assert "regimen-rl[math-verify]" in score.errors[0]


def test_expected_answers_may_stand_in_another_field_or_the_context() -> None:
    rollout = texts(["7"], target=["7"])
    assert scored(AnswerReward(exact_match, expected="target"), rollout).value.tolist() == [1]
    shown = texts(["7"]).replace(context={"answer": torch.tensor([7])})
    assert scored(AnswerReward(exact_match), shown).value.tolist() == [1]
    missing = scored(AnswerReward(exact_match), texts(["7"]))
    assert missing.status.tolist() == [FAILED]
    assert "no column or context entry 'answer'; it has: text" in missing.errors[0]


def test_verifiers_that_take_long_are_stopped() -> None:
    def slow(given: str, expected: Any) -> bool:
        while True:
            pass

    score = AnswerReward(slow).judge(texts(["a"], answer=["a"]), Scene(timeout_s=0.05)).components["correct"]
    assert score.status.tolist() == [FAILED]
    assert score.errors == ("reward 'correct' did not return within 0.05 s",)


def test_mathematics_that_takes_long_is_stopped_too() -> None:
    """math-verify catches exceptions of every kind; the time limit must not be one that it swallows for good."""
    pytest.importorskip("math_verify")
    hostile = "$" + "+".join(f"x^{{{n}}}" for n in range(3000)) + "$"
    rollout = texts([hostile], answer=["4"])
    score = AnswerReward(math_match).judge(rollout, Scene(timeout_s=0.1)).components["correct"]
    assert score.status.tolist() == [FAILED]
    assert score.errors == ("reward 'correct' did not return within 0.1 s",)
