"""Rewards on a text's form: the worked numbers of Train Long, Think Short, limits, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regimen import Knob, Knobs
from regimen.controllers import Exponential, Steps
from regimen.credit import GroupRelativeAdvantage
from regimen.functions.answers import exact_match
from regimen.rewards import FAILED, NOT_APPLICABLE, SCORED, Expression, Scene, judge
from regimen.rewards.answers import AnswerReward
from regimen.rewards.text import (
    Failure,
    LengthReward,
    TagFormatReward,
    band_length,
    field_of,
    own_steps,
    ramp_length,
    score_each,
    triangular_length,
)
from regimen.rollout import Rollout

FULL = "<think> {} </think> <answer> {} </answer>"


def texts(
    lines: Sequence[str], lengths: Sequence[int] | None = None, knobs: dict[str, float] | None = None, **columns: Any
) -> Rollout:
    """A group of texts, of so many steps (by default one per word)."""
    count = torch.tensor([len(line.split()) for line in lines] if lengths is None else lengths)
    mask = torch.arange(max(int(count.max()), 1)) < count[:, None]
    return Rollout.create(
        task="ask", group=torch.zeros(len(lines), dtype=torch.int64), mask=mask,
        knobs={"token_budget": 87.0} if knobs is None else knobs, columns={"text": list(lines), **columns},
    )  # fmt: skip


def scores(reward: Any, rollout: Rollout) -> list[float]:
    value = reward.score(rollout, Scene())
    return list((value if isinstance(value, Tensor) else value.value).tolist())


# Length


LENGTHS = [0, 43, 87, 100, 130.5, 174, 175]


@pytest.mark.parametrize(
    ("shape", "values"),
    [
        (triangular_length, [0, 0.4943, 1, 0.8506, 0.5, 0, 0]),
        (band_length, [1, 1, 1, 0.8506, 0.5, 0, 0]),
        (ramp_length, [0, 0.4943, 1, 1, 1, 1, 1]),
    ],
)
def test_length_shapes_at_a_budget_of_87(shape: Any, values: list[float]) -> None:
    assert shape(torch.tensor(LENGTHS), 87).tolist() == pytest.approx(values, abs=5e-5)
    assert shape(torch.tensor(LENGTHS), 87, 2.0).tolist() == pytest.approx([2 * v for v in values], abs=1e-4)
    budgets = torch.tensor([87.0, 174.0])
    assert shape(torch.tensor([130.5, 261.0]), budgets).tolist() == pytest.approx([values[4]] * 2)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.floats(0, 1e4), st.floats(1, 1e3), st.floats(0, 10))
def test_length_reward_is_never_negative_and_never_above_its_peak(length: float, budget: float, high: float) -> None:
    for shape in (triangular_length, band_length, ramp_length):
        value = float(shape(torch.tensor(length, dtype=torch.float64), budget, high))
        assert 0 <= value <= high + 1e-12


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.floats(0, 1), st.floats(1, 1e3))
def test_triangle_is_symmetric_and_band_falls_as_it_does(share: float, budget: float) -> None:
    offset = torch.tensor(share * budget, dtype=torch.float64)
    below, above = triangular_length(budget - offset, budget), triangular_length(budget + offset, budget)
    assert float(below - above) == pytest.approx(0, abs=1e-9)
    assert float(band_length(budget + offset, budget) - above) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("shape", [triangular_length, band_length])
@pytest.mark.parametrize("corner", [87.0, 174.0])
def test_length_reward_is_continuous_at_its_corners(shape: Any, corner: float) -> None:
    at = torch.tensor([corner - 1e-6, corner, corner + 1e-6], dtype=torch.float64)
    values = shape(at, 87.0)
    assert float((values - values[1]).abs().max()) < 1e-7


def test_length_is_counted_in_own_steps() -> None:
    rollout = texts(["a", "b", "c"], [3, 5, 0], {"token_budget": 4.0})
    assert scores(LengthReward(), rollout) == [0.75, 0.75, 0]
    assert scores(LengthReward("band"), rollout) == [1, 0.75, 1]
    assert scores(LengthReward("ramp"), rollout) == [0.75, 1, 0]
    assert scores(LengthReward(budget=5), rollout) == pytest.approx([0.6, 1, 0])
    assert scores(LengthReward(high=2.0), rollout) == [1.5, 1.5, 0]
    # Forced and foreign steps (a template's, another speaker's) are none of its own.
    forced = rollout.loss_mask.clone()
    forced[1, :2] = False
    given = rollout.replace(loss_mask=forced)
    assert own_steps(given).sum(1).tolist() == [3, 3, 0]
    assert scores(LengthReward(), given) == [0.75, 0.75, 0]


def test_length_of_a_tag_is_counted_inside_it() -> None:
    rollout = texts([FULL.format("a b c", 1), "no tags at all", "a b </think> <answer> 1"], knobs={"token_budget": 3.0})
    words = LengthReward(of="think", unit="words")
    assert words.lengths(rollout).tolist() == [3, 0, 0]
    assert scores(words, rollout) == [1, 0, 0]
    # The prompt opened the tag already.
    assert LengthReward(of="think", unit="words", prefix="<think>").lengths(rollout).tolist() == [4, 0, 2]
    letters = LengthReward(of="think", count=len)
    assert letters.lengths(rollout).tolist() == [5, 0, 0]
    assert LengthReward(unit="words").lengths(rollout).tolist() == [8, 4, 5]


def test_empty_completion_has_length_0() -> None:
    rollout = texts(["", ""], knobs={"token_budget": 87.0})
    assert scores(LengthReward(), rollout) == [0, 0]
    assert scores(LengthReward("band"), rollout) == [1, 1]
    assert scores(LengthReward("band", unit="words"), rollout) == [1, 1]


def test_each_sample_has_the_budget_that_it_was_sampled_under() -> None:
    rollout = Rollout.cat([texts(["a b c"], knobs={"token_budget": budget}) for budget in (3.0, 6.0, 1.0)])
    assert scores(LengthReward(), rollout) == [1, 0.5, 0]


def test_budget_is_declared_only_as_a_knob() -> None:
    assert LengthReward().reads == ()
    knob = Knob("thinking", 9, low=1, integer=True)
    reward = LengthReward(budget=knob)
    assert reward.reads == (knob,)
    assert scores(reward, texts(["a b c"], knobs={"thinking": 3.0})) == [1]
    with pytest.raises(KeyError, match=r"no knob 'token_budget' was in force .*Knob\('token_budget', 256, low=1"):
        LengthReward().score(texts(["a"], knobs={}), Scene())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "square"}, "shape 'square', unit 'tokens'; expected triangular, band, ramp"),
        ({"unit": "letters"}, "unit 'letters'"),
        ({"budget": 0}, "budget 0, high 1.0; expected a budget above 0"),
        ({"budget": -3.0}, "budget -3.0"),
        ({"high": -1.0}, "high -1.0"),
        ({"of": "think"}, "cannot count the tokens inside <think>; give count=lambda"),
    ],
)
def test_wrong_length_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LengthReward(**options)


def test_a_budget_of_0_in_the_rollout_is_a_failure_and_no_number() -> None:
    _, report = judge(LengthReward(), texts(["a"], knobs={"token_budget": 0.0}), Scene())
    assert report.failed == 1
    assert "budget 'token_budget' was 0.0 in this rollout, expected above 0" in report.errors[0]


# Format


def test_format_is_worth_its_tags() -> None:
    rollout = texts([FULL.format("a", 1), "<think> a </think> 1", "1", "a </think> <answer> 1 </answer>"])
    assert scores(TagFormatReward(), rollout) == [1, 0.5, 0, 0.5]
    assert scores(TagFormatReward(prefix="<think>"), rollout) == [0.5, 0, 0, 1]
    assert scores(TagFormatReward(weights=(0.25, 0.5)), rollout) == [0.75, 0.25, 0, 0.5]
    assert scores(TagFormatReward(whole=True), rollout) == [1, 0, 0, 0]
    assert scores(TagFormatReward(schema={"answer": r"\d"}), rollout) == [1, 0.5, 0, 0.5]
    assert scores(TagFormatReward(schema={"answer": "[a-z]"}), rollout) == [0.5, 0.5, 0, 0]
    assert scores(TagFormatReward(("answer",)), rollout) == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tags": ()}, r"tags are \[\], expected at least one"),
        ({"tags": ("a", "a")}, r"tags are \['a', 'a'\]"),
        ({"weights": (1,)}, r"weights \[1\] for tags \['think', 'answer'\]; expected one of at least 0 per tag"),
        ({"weights": (1.5, -0.5)}, r"weights \[1.5, -0.5\]"),
        ({"schema": {"code": "x"}}, r"schema for code, which is not among the tags \['think', 'answer'\]"),
    ],
)
def test_wrong_format_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TagFormatReward(**options)


# Composed


def composed(correct: float = 0.6, length: float = 0.3, form: float = 0.1) -> Expression:
    return (
        correct * AnswerReward(exact_match, tag="answer")
        + length * LengthReward()
        + form * TagFormatReward(("think", "answer"), (0.5, 0.5))
    )


@pytest.fixture
def four() -> Rollout:
    """(right, 87), (right, 150), (wrong, 60), all in full format; (right, 200) without the first tag."""
    lines = [FULL.format("a", 7), FULL.format("a", 7), FULL.format("a", 3), "a <answer> 7 </answer>"]
    return texts(lines, [87, 150, 60, 200], answer=["7"] * 4)


def judged(reward: Expression, rollout: Rollout) -> Rollout:
    answer, report = judge(reward, rollout, Scene(knobs=Knobs.of(reward)))
    assert report.failed == 0
    return answer


def test_composed_reward_of_the_paper(four: Rollout) -> None:
    rollout = judged(composed(), four)
    assert rollout.rewards["correct"].tolist() == [1, 1, 0, 1]
    assert rollout.rewards["length"].tolist() == pytest.approx([1, 24 / 87, 60 / 87, 0])
    assert rollout.rewards["format"].tolist() == [1, 1, 1, 0.5]
    assert rollout.reward.tolist() == pytest.approx([1.0, 0.7828, 0.3069, 0.65], abs=5e-5)


@pytest.mark.parametrize(
    ("ddof", "advantages"),
    [(0, [1.2524, 0.3889, -1.5026, -0.1388]), (1, [1.0847, 0.3368, -1.3013, -0.1202])],
)
def test_advantages_of_the_composed_reward(ddof: int, advantages: list[float], four: Rollout) -> None:
    credited = GroupRelativeAdvantage(ddof=ddof, eps=1e-4)(judged(composed(), four), {}, {})
    assert credited.advantages[:, 0].tolist() == pytest.approx(advantages, abs=5e-5)
    assert torch.equal(credited.advantages != 0, four.mask)


def test_factors_are_knobs() -> None:
    board = Knobs.of(composed())
    assert {name: value for name, value in board.items() if name.startswith("weight/")} == {
        "weight/correct": 0.6, "weight/length": 0.3, "weight/format": 0.1,
    }  # fmt: skip


def test_no_length_weight_is_no_length_reward(four: Rollout) -> None:
    without = 0.6 * AnswerReward(exact_match, tag="answer") + 0.1 * TagFormatReward()
    assert torch.equal(judged(composed(length=0.0), four).reward, judged(without, four).reward)


def test_wrong_answer_of_perfect_length_earns_what_is_left() -> None:
    rollout = texts([FULL.format("a", 3)], [87], answer=["7"])
    assert judged(composed(), rollout).reward.tolist() == pytest.approx([0.4])
    assert judged(composed(0.3, 0.6), rollout).reward.tolist() == pytest.approx([0.7])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Exponential(256, 0.0), "gamma is 0.0, expected in"),
        (lambda: Exponential(256, 1.1), "gamma is 1.1"),
        (lambda: Exponential(256, 0.7, every=0), "every is 0, expected above 0"),
        (lambda: Steps(87, 256, 3, 600), "expected end <= start"),
        (lambda: Steps(256, 87, 0, 600), "equal if there are no drops"),
    ],
)
def test_budgets_that_make_no_curriculum_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


# How rewards read texts


def test_outcomes_per_sample_are_told_once_each() -> None:
    score = score_each([1, Failure("no"), None, 0.5, Failure("no"), Failure("other")], "r")
    assert score.status.tolist() == [SCORED, FAILED, NOT_APPLICABLE, SCORED, FAILED, FAILED]
    assert score.value[[0, 3]].tolist() == [1, 0.5]
    assert score.errors == ("reward 'r', sample 1: no", "reward 'r', sample 5: other")
    many = score_each([Failure(str(n)) for n in range(9)], "r")
    assert len(many.errors) == 5


def test_fields_are_columns_before_contexts() -> None:
    rollout = texts(["a"], n=[3]).replace(context={"n": torch.tensor([4]), "m": torch.tensor([5])})
    assert field_of(rollout, "n") == [3]
    assert field_of(rollout, "m") == [5]
    assert field_of(rollout, "text") == ["a"]
    with pytest.raises(KeyError, match="no column or context entry 'x'; it has: m, n, text"):
        field_of(rollout, "x")
