"""Group-relative advantages: worked numbers, limits, who is left out, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from regimen.checkers import assert_ok
from regimen.credit import GroupRelativeAdvantage
from regimen.credit.group_relative import group_relative
from regimen.rollout import Rollout

REWARDS = torch.tensor([1.0, 0, 0, 1, 0.2, 0.4, 0.4, 0.6])
GROUP = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
BY_GROUP = torch.tensor([0.9998, -0.9998, -0.9998, 0.9998, -1.41321, 0, 0, 1.41321])
BY_BATCH = torch.tensor([1.34804, -1.34804, -1.34804, 1.34804, -0.53921, 0, 0, 0.53921])
Build = Callable[..., Rollout]


def judged(build: Build, rewards: Tensor = REWARDS, group: Tensor = GROUP, **fields: Any) -> Rollout:
    return build(len(rewards), group=group, reward=rewards, **fields)


def credited(rollout: Rollout, **settings: Any) -> Tensor:
    advantages: Tensor = GroupRelativeAdvantage(**settings)(rollout, {}, {}).advantages
    return advantages


@pytest.mark.parametrize(("std", "expected"), [("group", BY_GROUP), ("batch", BY_BATCH)])
def test_worked_numbers(tiny_rollout: Build, std: Any, expected: Tensor) -> None:
    torch.testing.assert_close(group_relative(REWARDS, GROUP, std=std, ddof=0), expected, atol=1e-5, rtol=0)
    advantages = credited(judged(tiny_rollout), std=std, ddof=0)
    torch.testing.assert_close(advantages, expected[:, None].expand(8, 4), atol=1e-5, rtol=0)


def test_deviation_of_the_batch_is_over_all_rewards() -> None:
    assert float(REWARDS.std(correction=0)) == pytest.approx(0.370810, abs=1e-6)
    torch.testing.assert_close(BY_BATCH[0], (0.5 / (REWARDS.std(correction=0) + 1e-4)), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("ddof", "expected"), [
    (0, [1.2524, 0.3889, -1.5026, -0.1388]), (1, [1.0847, 0.3368, -1.3013, -0.1202]),
])  # fmt: skip
def test_population_and_sample_deviation(ddof: int, expected: list[float]) -> None:
    rewards = torch.tensor([1.0, 0.7828, 0.3069, 0.65])
    found = group_relative(rewards, torch.zeros(4, dtype=torch.int64), ddof=ddof)
    torch.testing.assert_close(found, torch.tensor(expected), atol=2e-4, rtol=0)


def test_deviation_of_a_task_is_over_its_own_rewards(tiny_rollout: Build) -> None:
    """Answers in two groups, and four demonstrations in groups of their own, which are nearly all right."""
    rewards, group = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0]), torch.tensor([0, 0, 1, 1, 2, 3, 4, 5])
    answers = Rollout(judged(tiny_rollout, rewards[:4], group[:4]).data, ("questions",))
    shown = Rollout(judged(tiny_rollout, rewards[4:], group[4:] - 2).data, ("demonstrations",))
    both = Rollout.cat([answers, shown])
    found = credited(both, std="task", ddof=0, eps=0.0)
    # Of the answers alone the deviation is sqrt(3) / 4; of all eight rewards it would be 1 / 2.
    expected = torch.tensor([0.5, -0.5, 0, 0]) / (3**0.5 / 4)
    torch.testing.assert_close(found[:4, 0], expected)
    assert torch.equal(found[4:], torch.zeros(4, 4))
    torch.testing.assert_close(credited(both, std="batch", ddof=0, eps=0.0)[:2, 0], torch.tensor([1.0, -1.0]))
    assert torch.equal(credited(answers, std="task"), credited(answers, std="batch"))


def test_sample_deviation_of_the_batch() -> None:
    found = group_relative(REWARDS, GROUP, std="batch", ddof=1, eps=0.0)
    torch.testing.assert_close(found[0], 0.5 / REWARDS.std())


def test_without_a_deviation_it_is_the_difference_from_the_mean() -> None:
    found = group_relative(REWARDS, GROUP, std=None)
    torch.testing.assert_close(found, torch.tensor([0.5, -0.5, -0.5, 0.5, -0.2, 0, 0, 0.2]))


@pytest.mark.parametrize("std", ["group", "batch", None])
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1e6])
def test_identical_rewards_give_exactly_zero(std: Any, value: float) -> None:
    found = group_relative(torch.full((9,), value), torch.arange(9) // 3, std=std)
    assert torch.equal(found, torch.zeros(9))


def test_clip_bounds_both_sides(tiny_rollout: Build) -> None:
    """One odd sample in 64 is sqrt(63) = 7.94 deviations away."""
    rewards = torch.zeros(128)
    rewards[0], rewards[64] = 1.0, -1.0
    rollout = judged(tiny_rollout, rewards, torch.arange(128) // 64)
    free, clipped = (credited(rollout, ddof=0, clip=clip)[:, 0] for clip in (None, 5.0))
    assert float(free[0]) == pytest.approx(7.94, abs=0.01)
    assert float(free[64]) == pytest.approx(-7.94, abs=0.01)
    assert (float(clipped[0]), float(clipped[64])) == (5.0, -5.0)
    assert torch.equal(clipped[1:64], free[1:64])


@pytest.mark.parametrize("std", ["group", "batch", None])
@pytest.mark.parametrize("bad", [0.0, 1e6, torch.nan])
def test_failed_samples_leave_their_group_whatever_they_hold(tiny_rollout: Build, std: Any, bad: float) -> None:
    kept = torch.tensor([0, 1, 3, 4, 5, 6, 7])
    rewards = REWARDS.clone()
    rewards[2] = bad
    loss_mask = torch.ones(8, 4, dtype=torch.bool)
    loss_mask[2] = False
    found = credited(judged(tiny_rollout, rewards, loss_mask=loss_mask), std=std, ddof=0)
    assert torch.equal(found[2], torch.zeros(4))
    expected = group_relative(REWARDS[kept], GROUP[kept], std=std, ddof=0)
    torch.testing.assert_close(found[kept, 0], expected)


def test_one_sample_left_of_a_group_gets_zero(tiny_rollout: Build) -> None:
    loss_mask = torch.ones(8, 4, dtype=torch.bool)
    loss_mask[1:4] = False
    for std in ("group", "batch", None):
        found = credited(judged(tiny_rollout, loss_mask=loss_mask), std=std)
        assert torch.equal(found[:4], torch.zeros(4, 4))
        assert (found[4] < 0).all()


def test_one_group_of_one_among_others_gets_zero() -> None:
    found = group_relative(torch.tensor([5.0, 1.0, 0.0]), torch.tensor([0, 1, 1]))
    assert float(found[0]) == 0
    assert float(found[1]) == pytest.approx(0.7071, abs=2e-4)


def test_nothing_left_is_zero(tiny_rollout: Build) -> None:
    none = torch.zeros(8, 4, dtype=torch.bool)
    for std in ("group", "batch", None):
        assert torch.equal(credited(judged(tiny_rollout, loss_mask=none), std=std), torch.zeros(8, 4))


def test_steps_that_are_not_learned_from_get_zero(tiny_rollout: Build) -> None:
    loss_mask = torch.ones(8, 4, dtype=torch.bool)
    loss_mask[:, -1] = False
    found = credited(judged(tiny_rollout, loss_mask=loss_mask), ddof=0)
    torch.testing.assert_close(found[:, :3], BY_GROUP[:, None].expand(8, 3), atol=1e-5, rtol=0)
    assert torch.equal(found[:, 3], torch.zeros(8))


def test_reward_per_step_is_summed_over_existing_steps(tiny_rollout: Build) -> None:
    reward = (REWARDS / 2)[:, None].repeat(1, 4)
    reward[:, 2:] = 100.0
    mask = torch.tensor([True, True, False, False]).expand(8, 4).clone()
    found = credited(judged(tiny_rollout, reward, mask=mask, loss_mask=mask), ddof=0)
    torch.testing.assert_close(found[:, 0], BY_GROUP, atol=1e-5, rtol=0)


def test_groups_may_be_interleaved_and_have_any_number(tiny_rollout: Build) -> None:
    order = torch.tensor([0, 4, 1, 5, 6, 2, 7, 3])
    found = group_relative(REWARDS[order], 1000 - 77 * GROUP[order], ddof=0)
    torch.testing.assert_close(found, BY_GROUP[order], atol=1e-5, rtol=0)


@given(st.lists(st.floats(-10, 10, width=32), min_size=6, max_size=6), st.floats(-5, 5), st.floats(0.5, 4))
def test_only_differences_within_a_group_count(values: list[float], shift: float, scale: float) -> None:
    """Adding a number to a group changes nothing, scaling all cancels against the deviation, and groups sum to 0."""
    rewards, group = torch.tensor(values, dtype=torch.float64), torch.arange(6) // 3
    base = group_relative(rewards, group, std=None)
    moved = group_relative(rewards + shift * group, group, std=None)
    torch.testing.assert_close(moved, base, atol=1e-9, rtol=0)
    torch.testing.assert_close(base.view(2, 3).sum(1), torch.zeros(2, dtype=torch.float64), atol=1e-9, rtol=0)
    if float(rewards.view(2, 3).std(1).min()) > 1e-3:
        settings: dict[str, Any] = {"std": "group", "eps": 0.0}
        torch.testing.assert_close(
            group_relative(scale * rewards, group, **settings), group_relative(rewards, group, **settings)
        )


def test_passes_the_checker_for_credit() -> None:
    assert_ok(GroupRelativeAdvantage())
    assert_ok(GroupRelativeAdvantage(std="batch", ddof=0, clip=5.0))
    assert_ok(GroupRelativeAdvantage(std="task"))


def test_bad_inputs_are_named(tiny_rollout: Build) -> None:
    for std in ("group", "batch", None):
        with pytest.raises(ValueError, match="all 3 groups have one sample.*ask the task for group_size >= 2"):
            group_relative(torch.ones(3), torch.arange(3), std=std)
    with pytest.raises(ValueError, match="all 1 groups have one sample"):
        credited(judged(tiny_rollout)[:1])
    with pytest.raises(ValueError, match=r"rewards \[3\] and group \[2\], expected \[B\]"):
        group_relative(torch.ones(3), torch.arange(2))
    with pytest.raises(ValueError, match="std 'global' is not one of group, batch, task, None"):
        GroupRelativeAdvantage(std="global")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="std 'task' is not one of group, batch, None"):
        group_relative(torch.ones(2), torch.zeros(2, dtype=torch.int64), std="task")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ddof=2, eps=0.0001; expected ddof 0 or 1"):
        GroupRelativeAdvantage(ddof=2)
    with pytest.raises(ValueError, match="eps=-1"):
        group_relative(torch.ones(2), torch.zeros(2, dtype=torch.int64), eps=-1)
    with pytest.raises(ValueError, match="clip is 0, expected above 0"):
        GroupRelativeAdvantage(clip=0)
    with pytest.raises(ValueError, match="no reward; give the stage a reward that trains"):
        credited(tiny_rollout())
