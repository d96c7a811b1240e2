"""Rewards: arithmetic, gates, the three outcomes, and failures that are contained."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from regimen.controllers import Constant, Schedule
from regimen.knobs import Knob, Knobs
from regimen.rewards import (
    FAILED,
    NOT_APPLICABLE,
    SCORED,
    Expression,
    FirstApplicable,
    Reward,
    Scene,
    Score,
    at_last_step,
    judge,
    reward_from,
)
from regimen.rollout import Rollout

Build = Callable[..., Rollout]


class Fixed(Reward):
    """Scores that a test writes down; counts how often it is asked."""

    def __init__(self, name: str, value: Any, applicable: Any = None, failed: Any = None) -> None:
        self.name, self.value, self.applicable, self.failed, self.asked = name, value, applicable, failed, 0

    def score(self, rollout: Rollout, scene: Scene) -> Score:
        self.asked += 1
        value = torch.as_tensor(self.value, dtype=torch.float32)
        rows = rollout["row"]
        score = Score.of(value[rows], None if self.applicable is None else torch.tensor(self.applicable)[rows])
        if self.failed is None:
            return score
        return Score(score.value, torch.where(torch.tensor(self.failed)[rows], FAILED, score.status).to(torch.uint8))


@pytest.fixture
def four(tiny_rollout: Build) -> Rollout:
    """Two groups of two: task "a", then task "b"; the second sample has three of four steps."""
    parts = [tiny_rollout(2, task=task, columns={"row": torch.arange(2) + 2 * i}) for i, task in enumerate("ab")]
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[1, 3] = False
    return Rollout.cat(parts).replace(mask=mask, loss_mask=mask)


def total(reward: Expression, rollout: Rollout, **knobs: float) -> Score:
    answer = reward.judge(rollout, Scene(knobs=Knobs.of(reward, **knobs)))
    assert answer.total is not None
    return answer.total


def test_sum_difference_and_weights(four: Rollout) -> None:
    correct, form, length = Fixed("correct", [1, 0, 1, 0]), Fixed("format", [1, 1, 0, 0]), Fixed("length", [2, 4, 6, 8])
    reward = correct + 0.2 * form - length * 0.1
    assert total(reward, four).value.tolist() == pytest.approx([1.0, -0.2, 0.4, -0.8])
    names = {knob.name: knob.default for knob in reward.knobs}
    assert names == {"weight/correct": 1.0, "weight/format": 0.2, "weight/length": 0.1}
    assert total(reward, four, **{"weight/length": 0.0}).value.tolist() == pytest.approx([1.2, 0.2, 1.0, 0.0])


def test_scaling_a_sum_scales_every_term_and_keeps_its_knobs(four: Rollout) -> None:
    reward = 2 * (Fixed("a", [1, 2, 3, 4]) - 0.5 * Fixed("b", [2, 2, 2, 2]))
    assert total(reward, four).value.tolist() == [0.0, 2.0, 4.0, 6.0]
    assert {knob.name: knob.default for knob in reward.knobs} == {"weight/a": 1.0, "weight/b": 0.5}
    assert total(-reward, four).value.tolist() == [-0.0, -2.0, -4.0, -6.0]


def test_negative_factor_is_a_positive_knob_and_a_sign(four: Rollout) -> None:
    reward = -0.5 * Fixed("a", [1, 2, 3, 4])
    assert [(knob.name, knob.default) for knob in reward.knobs] == [("weight/a", 0.5)]
    assert total(reward, four).value.tolist() == [-0.5, -1.0, -1.5, -2.0]


def test_knob_weights_a_whole_sum(four: Rollout) -> None:
    reward = Knob("shaping", 0.5, low=0) * (Fixed("a", [1, 1, 1, 1]) + 2 * Fixed("b", [1, 1, 1, 1]))
    assert total(reward, four).value.tolist() == [1.5] * 4
    assert total(reward, four, shaping=0.0).value.tolist() == [0.0] * 4
    assert {knob.name for knob in reward.knobs} == {"shaping", "weight/a", "weight/b"}


def test_weights_are_knobs_that_a_controller_may_move() -> None:
    reward = Fixed("a", 1) + 0.5 * Fixed("b", 1)
    assert set(Schedule("weight/b", Constant(1.0)).moves) <= set(Knobs.of(reward))


def test_product_applies_where_both_do(four: Rollout) -> None:
    a = Fixed("a", [1, 2, 3, 4], applicable=[True, True, True, False])
    b = Fixed("b", [2, 2, 2, 2], failed=[False, True, False, True])
    product = total(a * b, four)
    assert product.status.tolist() == [SCORED, FAILED, SCORED, FAILED]
    assert product.value[[0, 2]].tolist() == [2.0, 6.0]


def test_sample_reward_multiplies_every_step(four: Rollout) -> None:
    wide = Fixed("wide", torch.ones(4, 4).tolist())
    assert total(wide * Fixed("a", [1, 2, 3, 4]), four).value[1].tolist() == [2.0, 2.0, 2.0, 0.0]


def test_per_sample_terms_count_at_the_last_step_beside_per_step_ones(four: Rollout) -> None:
    wide = Fixed("wide", torch.full((4, 4), 0.1).tolist())
    value = total(wide + Fixed("end", [1, 2, 3, 4]), four).value
    assert value[0].tolist() == pytest.approx([0.1, 0.1, 0.1, 1.1])
    assert value[1].tolist() == pytest.approx([0.1, 0.1, 2.1, 0.0])


def test_gate(four: Rollout) -> None:
    reward = Fixed("correct", [1, 1, 1, 1]).when(Fixed("format", [1, 0, 0.6, 0.4]), above=0.5)
    assert total(reward, four).value.tolist() == [1, 0, 1, 0]
    answer = reward.judge(four, Scene())
    assert list(answer.components) == ["format", "correct"]


def test_closed_gate_forgives_a_failure_and_a_failed_gate_does_not(four: Rollout) -> None:
    correct = Fixed("correct", [1, 1, 1, 1], failed=[True, True, False, False])
    gate = Fixed("format", [0, 1, 1, 0], failed=[False, False, True, False], applicable=[True, True, True, False])
    answer = correct.when(gate).judge(four, Scene())
    assert answer.total is not None
    assert answer.total.status.tolist() == [SCORED, FAILED, FAILED, NOT_APPLICABLE]
    assert float(answer.total.value[0]) == 0
    assert answer.components["correct"].status.tolist() == [FAILED, FAILED, SCORED, SCORED]


def test_gate_per_step(four: Rollout) -> None:
    gate = torch.zeros(4, 4)
    gate[0, 3] = gate[1, 0] = gate[3, 3] = 1
    reward = Fixed("end", [1, 2, 3, 4]).when(Fixed("gate", gate.tolist()))
    value = total(reward, four).value
    assert value[0].tolist() == [0, 0, 0, 1]
    assert value[1].tolist() == [0, 0, 0, 0]
    assert value[3].tolist() == [0, 0, 0, 4]


def test_first_applicable(four: Rollout) -> None:
    rule = Fixed("rule", [1, 1, 1, 1], applicable=[True, False, True, False], failed=[False, False, True, False])
    model = Fixed("model", [2, 2, 2, 2], applicable=[True, True, True, False])
    answer = total(FirstApplicable(rule, model), four)
    assert answer.status.tolist() == [SCORED, SCORED, SCORED, NOT_APPLICABLE]
    assert answer.value[:3].tolist() == [1, 2, 2]
    broken = Fixed("broken", [0, 0, 0, 0], failed=[True] * 4)
    never = Fixed("never", [0, 0, 0, 0], applicable=[False] * 4)
    for order in ((broken, never), (never, broken)):
        assert total(FirstApplicable(*order), four).status.tolist() == [FAILED] * 4


def test_first_applicable_of_step_and_sample_rewards_does_not_multiply_the_sample_reward(four: Rollout) -> None:
    wide = Fixed("wide", torch.ones(4, 4).tolist(), applicable=[False, True, True, True])
    value = total(FirstApplicable(wide, Fixed("end", [5, 5, 5, 5])), four).value
    assert value[0].tolist() == [0, 0, 0, 5]
    assert value[2].tolist() == [1, 1, 1, 1]


def test_reward_of_some_tasks_is_not_computed_for_others(four: Rollout) -> None:
    a, b = Fixed("a", [1, 2, 3, 4]), Fixed("b", [10, 20, 30, 40])
    answer = (a.on("a") + b.on("b", "c")).judge(four, Scene(knobs=Knobs.of(a.on("a") + b.on("b"))))
    assert answer.total is not None
    assert answer.total.value.tolist() == [1, 2, 30, 40]
    assert answer.total.status.tolist() == [SCORED] * 4
    assert answer.components["a"].status.tolist() == [SCORED, SCORED, NOT_APPLICABLE, NOT_APPLICABLE]
    nowhere = Fixed("nowhere", [0] * 4)
    assert total(nowhere.on("other"), four).status.tolist() == [NOT_APPLICABLE] * 4
    assert nowhere.asked == 0


def test_logged_reward_is_seen_and_does_not_train(four: Rollout) -> None:
    reward = Fixed("a", [1, 2, 3, 4]) + 5.0 * Fixed("length", [9, 9, 9, 9], failed=[True] * 4).logged()
    answer = reward.judge(four, Scene(knobs=Knobs.of(reward)))
    assert answer.total is not None
    assert answer.total.value.tolist() == [1, 2, 3, 4]
    assert answer.total.status.tolist() == [SCORED] * 4
    assert answer.components["length"].status.tolist() == [FAILED] * 4
    assert [knob.name for knob in reward.knobs] == ["weight/a"]
    only = Fixed("a", [1, 2, 3, 4]).logged()
    assert only.judge(four, Scene()).total is None
    assert only.on("a").judge(four, Scene()).total is None
    assert only.on("nowhere").judge(four, Scene()).total is None


def test_compositions_that_need_a_total_refuse_logged_rewards() -> None:
    a, logged = Fixed("a", 1), Fixed("b", 1).logged()
    for build in (lambda: a * logged, lambda: a.when(logged), lambda: FirstApplicable(a, logged)):
        with pytest.raises(ValueError, match="'b', which is only logged"):
            build()


def test_component_that_stands_twice_is_asked_once(four: Rollout) -> None:
    correct, form = Fixed("correct", [1, 0, 1, 0]), Fixed("format", [1, 1, 1, 1])
    reward = correct + 0.5 * form.when(correct)
    assert total(reward, four).value.tolist() == [1.5, 0, 1.5, 0]
    assert correct.asked == 1
    assert [leaf.name for leaf in reward.leaves()] == ["correct", "format"]
    within = correct.on("a") + form.when(correct).on("a")
    total(within, four)
    assert correct.asked == 2


def test_two_components_of_one_name_are_refused() -> None:
    a, twin = Fixed("a", 1), Fixed("a", 2)
    for build in (lambda: a + twin, lambda: a * twin, lambda: a.when(twin), lambda: FirstApplicable(a, twin)):
        with pytest.raises(ValueError, match="two components of one reward are called a; give one another name"):
            build()


def test_arithmetic_with_anything_else_is_a_type_error() -> None:
    a: Any = Fixed("a", 1)
    for build in (lambda: a + 1, lambda: a - "x", lambda: a * "x", lambda: 1 + a):
        with pytest.raises(TypeError):
            build()


# Failures


def scored(function: Callable[[Rollout], Any], rollout: Rollout, timeout_s: float | None = None) -> Score:
    return reward_from(function).judge(rollout, Scene(timeout_s=timeout_s)).components[function.__name__]


def test_exception_fails_the_guilty_group_only(four: Rollout) -> None:
    def fragile(rollout: Rollout) -> Tensor:
        if 1 in rollout["row"]:
            raise RuntimeError("no such file")
        return rollout["row"].float()

    score = scored(fragile, four[torch.tensor([2, 0, 3, 1])])
    assert score.status.tolist() == [SCORED, FAILED, SCORED, FAILED]
    assert score.value[[0, 2]].tolist() == [2, 3]
    assert score.errors == ("reward 'fragile' raised RuntimeError: no such file",)


def test_exception_in_one_group_of_step_rewards(four: Rollout) -> None:
    def fragile(rollout: Rollout) -> Tensor:
        if 1 in rollout["row"]:
            raise RuntimeError("no")
        return torch.ones(len(rollout), 4)

    score = scored(fragile, four)
    assert score.value.shape == (4, 4)
    assert score.status.tolist() == [FAILED, FAILED, SCORED, SCORED]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.zeros(2), r"returned shape \[2\], expected \[4\] \(one per sample\) or \[4, 4\] \(per step\)"),
        (torch.tensor(1.0), r"returned shape \[\]"),
        (torch.zeros(4, 3), r"returned shape \[4, 3\]"),
        (None, "returned None, expected a tensor"),
        ("text", "returned 'text', expected a tensor"),
        (Score(torch.zeros(4), torch.zeros(2, dtype=torch.uint8)), r"shape \[4\] with a status of \[2\]"),
    ],
)
def test_wrong_answer_fails_the_batch_even_if_it_would_fit_a_group(four: Rollout, returned: Any, message: str) -> None:
    reward = reward_from(lambda rollout: returned)
    answer = reward.judge(four, Scene()).components[reward.name]
    assert answer.status.tolist() == [FAILED] * 4
    assert re.search(message, answer.errors[0])


def test_lists_numpy_and_booleans_are_scores(four: Rollout) -> None:
    for answer in ([1, 2, 3, 4], torch.tensor([1, 2, 3, 4]).numpy(), torch.tensor([True, False, True, True])):
        reward = reward_from(lambda rollout, answer=answer: answer)
        score = reward.judge(four, Scene()).components[reward.name]
        assert score.value.dtype == torch.float32
        assert score.status.tolist() == [SCORED] * 4


def test_nan_is_a_failure_that_names_the_sample(four: Rollout) -> None:
    def shaky(rollout: Rollout) -> Tensor:
        return torch.tensor([1.0, torch.nan, torch.inf, 0.0])

    score = scored(shaky, four)
    assert score.status.tolist() == [SCORED, FAILED, FAILED, SCORED]
    assert score.errors == ("reward 'shaky' returned nan for sample 1 (task a)",)


def test_nan_at_steps_that_do_not_exist_is_no_failure(four: Rollout) -> None:
    def wide(rollout: Rollout) -> Tensor:
        return torch.where(rollout.mask, 1.0, torch.nan)

    judged, _ = judge(reward_from(wide), four, Scene())
    assert judged.status["wide"].tolist() == [SCORED] * 4
    assert judged.reward.sum(1).tolist() == [4, 3, 4, 4]


def test_time_limit_fails_the_batch(four: Rollout) -> None:
    def slow(rollout: Rollout) -> Tensor:
        time.sleep(5)
        return torch.zeros(4)

    started = time.monotonic()
    score = scored(slow, four, timeout_s=0.05)
    assert time.monotonic() - started < 2
    assert score.status.tolist() == [FAILED] * 4
    assert score.errors == ("reward 'slow' did not return within 0.05 s",)


def test_swallowed_time_limit_is_a_failure_still(four: Rollout) -> None:
    def stubborn(rollout: Rollout) -> Tensor:
        try:
            while True:
                pass
        except Exception:
            return torch.ones(4)

    assert scored(stubborn, four, timeout_s=0.05).status.tolist() == [FAILED] * 4


def test_time_limit_lets_another_timer_go_on(four: Rollout) -> None:
    def fast(rollout: Rollout) -> Tensor:
        return torch.zeros(4)

    before = signal.setitimer(signal.ITIMER_REAL, 100.0)
    try:
        scored(fast, four, timeout_s=1.0)
        assert 90 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)


def test_own_timeout_error_of_a_reward_is_an_exception_like_others(four: Rollout) -> None:
    def remote(rollout: Rollout) -> Tensor:
        if 0 in rollout["row"]:
            raise TimeoutError("the server did not answer")
        return torch.ones(len(rollout))

    score = scored(remote, four)
    assert score.status.tolist() == [FAILED, FAILED, SCORED, SCORED]
    assert score.errors == ("reward 'remote' raised TimeoutError: the server did not answer",)


class Novelty(Reward):
    """Remembers what it has seen."""

    name, stateful = "novelty", True

    def __init__(self) -> None:
        self.seen = 0.0

    def score(self, rollout: Rollout, scene: Scene) -> Tensor:
        self.seen += float(len(rollout))
        if self.seen > 100:
            raise RuntimeError("full")
        return torch.full((len(rollout),), 1 / self.seen)

    def save_state(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state(self, state: Any) -> None:
        self.seen = state["seen"]


def test_state_of_components_round_trip(four: Rollout) -> None:
    reward = Fixed("a", [1, 2, 3, 4]) + 0.5 * Novelty().on("a", "b")
    total(reward, four)
    state = reward.state_dict()
    assert state == {"novelty": {"seen": 4.0}}
    expected = total(reward, four).value
    again = Fixed("a", [1, 2, 3, 4]) + 0.5 * Novelty().on("a", "b")
    again.load_state_dict(state)
    torch.testing.assert_close(total(again, four).value, expected)


def test_stateful_component_is_never_asked_twice_about_a_batch(four: Rollout) -> None:
    novelty = Novelty()
    novelty.seen = 100.0
    score = novelty.judge(four, Scene()).components["novelty"]
    assert score.status.tolist() == [FAILED] * 4
    assert novelty.seen == 104.0
    fresh = Novelty()
    total(fresh + Fixed("a", [1, 1, 1, 1]).when(fresh), four)
    assert fresh.seen == 4.0


def test_at_last_step() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert at_last_step(torch.tensor([2.0, 3.0]), mask).tolist() == [[0, 2, 0], [0, 0, 3]]
    wide = torch.ones(2, 3)
    assert at_last_step(wide, mask) is wide
