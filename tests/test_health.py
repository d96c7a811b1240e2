"""Health: every warning fires when its fact is bad, and is silent when it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from regimen.credit import GroupRelativeAdvantage
from regimen.health import SILENT_AFTER, HealthMonitor, flat_groups
from regimen.rewards.base import FAILED, NOT_APPLICABLE, SCORED
from regimen.rollout import Rollout

Build = Callable[..., Rollout]
SPREAD = torch.tensor([0.0, 1, 0, 1, 0, 1])


@pytest.fixture
def monitor() -> HealthMonitor:
    return HealthMonitor()


def judged(build: Build, reward: Tensor = SPREAD, **fields: Any) -> Rollout:
    """Three groups of two with a reward."""
    return build(6, reward=reward, **fields)


def component(build: Build, value: float, outcome: int = SCORED) -> Rollout:
    status = torch.full((6,), outcome, dtype=torch.uint8)
    return judged(build, rewards={"format": torch.full((6,), value)}, status={"format": status})


def test_sound_iteration_warns_of_nothing(monitor: HealthMonitor, tiny_rollout: Build) -> None:
    metrics = {"policy/grad_norm": 0.3, "policy/loss": 0.0}
    for _ in range(3 * SILENT_AFTER):
        facts = monitor.observe(
            component(tiny_rollout, 1.0), metrics, expected_tasks=("a",), first_ratio_deviation=1e-6, skipped=0
        )
        assert monitor.fresh == []
    assert monitor.warnings == {}
    assert facts == {"health/flat_groups": 0.0}


def test_missing_task(monitor: HealthMonitor, tiny_rollout: Build) -> None:
    monitor.observe(judged(tiny_rollout), {}, expected_tasks=("a", "b"))
    assert monitor.fresh == ["task 'b' has no sample in the batch; raise batch_size or the knob mixture/b"]


def test_task_that_nothing_is_learned_from(monitor: HealthMonitor, tiny_rollout: Build) -> None:
    left = judged(tiny_rollout, loss_mask=torch.zeros(6, 4, dtype=torch.bool))
    both = Rollout.cat([judged(tiny_rollout, task="b"), left])
    monitor.observe(both, {}, expected_tasks=("a", "b"))
    assert len(monitor.fresh) == 1
    assert "no sample of task 'a' is left to learn from: no reward that trains applies to it" in monitor.fresh[0]


def test_data_without_a_reward_has_nothing_to_judge(monitor: HealthMonitor, tiny_rollout: Build) -> None:
    unjudged = tiny_rollout(6, loss_mask=torch.zeros(6, 4, dtype=torch.bool))
    assert monitor.observe(unjudged, {}, expected_tasks=("a",)) == {}
    assert monitor.warnings == {}


def test_gradient_of_zero(monitor: HealthMonitor, tiny_rollout: Build) -> None:
    monitor.observe(judged(tiny_rollout), {"critic/grad_norm": 1e-12, "critic/loss": 0.0})
    assert monitor.fresh == []
    monitor.observe(judged(tiny_rollout), {"critic/grad_norm": 0.0})
    assert monitor.fresh == [
        "critic/grad_norm is 0: nothing was learned in this iteration; look at health/flat_groups"
    ]  # fmt: skip


def test_ratio_that_is_not_one_before_the_first_update(monitor: HealthMonitor, tiny_rollout: Build) -> None:
    for sound in (None, 0.0, 9e-4):
        monitor.observe(judged(tiny_rollout), {}, first_ratio_deviation=sound)
        assert monitor.fresh == []
    monitor.observe(judged(tiny_rollout), {}, first_ratio_deviation=0.0234)
    assert len(monitor.fresh) == 1
    assert monitor.fresh[0].startswith("the ratio before the first update is not 1; the policy is not scored as it was")
    assert monitor.fresh[0].endswith("(off by 0.023)")
    monitor.observe(judged(tiny_rollout), {}, first_ratio_deviation=0.5)
    assert list(monitor.warnings.values()) == [2]


def test_skipped_steps(monitor: HealthMonitor, tiny_rollout: Build) -> None:
    monitor.observe(judged(tiny_rollout), {}, skipped=2)
    assert monitor.fresh == [
        "a gradient step was skipped because its loss or gradient was not finite; lower the learning rate"
    ]


def test_groups_without_spread(monitor: HealthMonitor, tiny_rollout: Build) -> None:
    almost = torch.arange(20).float() % 2 * (torch.arange(20) < 2)
    facts = monitor.observe(tiny_rollout(20, reward=almost), {})
    assert facts["health/flat_groups"] == pytest.approx(0.9)
    assert monitor.fresh == []
    flat = judged(tiny_rollout, torch.ones(6))
    facts = monitor.observe(flat, {})
    assert facts["health/flat_groups"] == 1
    assert monitor.fresh == [], "without credit, spread teaches nothing"
    monitor.observe(flat.replace(advantages=torch.zeros(6, 4)), {})
    assert len(monitor.fresh) == 1
    assert "over 90 % of the groups have no spread of reward" in monitor.fresh[0]
    assert "noise_level" in monitor.fresh[0]


def test_samples_cut_off_at_the_limit(monitor: HealthMonitor, tiny_rollout: Build) -> None:
    for cut, share, warned in ((3, 0.5, 0), (4, 2 / 3, 1)):
        facts = monitor.observe(judged(tiny_rollout).with_columns(truncated=torch.arange(6) < cut), {})
        assert facts["health/truncated"] == pytest.approx(share)
        assert len(monitor.fresh) == warned
    assert monitor.fresh == ["over half of the samples were cut off at the length limit; raise the limit"]


def test_component_that_never_fires(monitor: HealthMonitor, tiny_rollout: Build) -> None:
    for _ in range(SILENT_AFTER - 1):
        monitor.observe(component(tiny_rollout, 0.0), {})
        assert monitor.fresh == []
    monitor.observe(component(tiny_rollout, 0.0), {})
    assert monitor.fresh == [f"reward component 'format' has been 0 for {SILENT_AFTER} iterations; is it ever earned?"]
    monitor.observe(component(tiny_rollout, 0.0), {})
    assert monitor.fresh == []


def test_component_that_fires_in_between_or_negatively_is_not_silent(
    monitor: HealthMonitor, tiny_rollout: Build
) -> None:
    for step in range(4 * SILENT_AFTER):
        monitor.observe(component(tiny_rollout, -0.5 if step % SILENT_AFTER == 0 else 0.0), {})
    assert monitor.warnings == {}


@pytest.mark.parametrize("outcome", [NOT_APPLICABLE, FAILED])
def test_component_that_scores_nothing_is_not_called_silent(
    monitor: HealthMonitor, tiny_rollout: Build, outcome: int
) -> None:
    for _ in range(2 * SILENT_AFTER):
        monitor.observe(component(tiny_rollout, 0.0, outcome), {})
    assert monitor.warnings == {}


def test_warning_is_shown_at_counts_1_10_100(monitor: HealthMonitor, tiny_rollout: Build) -> None:
    shown = {}
    for count in range(1, 121):
        monitor.observe(judged(tiny_rollout), {}, skipped=1)
        if monitor.fresh:
            shown[count] = monitor.fresh[0]
    assert list(shown) == [1, 10, 100]
    assert shown[10].endswith("lower the learning rate (10 times)")
    assert list(monitor.warnings.values()) == [120]


def test_state_round_trip_goes_on_counting(monitor: HealthMonitor, tiny_rollout: Build) -> None:
    for _ in range(SILENT_AFTER - 1):
        monitor.observe(component(tiny_rollout, 0.0), {}, skipped=1)
    again = HealthMonitor()
    again.load_state_dict(monitor.state_dict())
    for watched in (monitor, again):
        watched.observe(component(tiny_rollout, 0.0), {}, skipped=1)
        assert len(watched.fresh) == 1
        assert "is it ever earned?" in watched.fresh[0]
    assert again.warnings == monitor.warnings


@pytest.mark.parametrize(("reward", "expected"), [
    ([0, 1, 0, 1, 0, 1], 0.0), ([1, 1, 0, 1, 0, 1], 1 / 3), ([1, 1, 0, 0, 0, 1], 2 / 3), ([1, 1, 2, 2, 0, 0], 1.0),
    ([0.1, 0.1, 0.1, 0.1 + 1e-6, 0, 1], 1 / 3),
])  # fmt: skip
def test_share_of_flat_groups(tiny_rollout: Build, reward: list[float], expected: float) -> None:
    assert flat_groups(judged(tiny_rollout, torch.tensor(reward).float())) == pytest.approx(expected)


def test_flat_groups_leave_out_single_samples_and_those_that_left_the_loss(tiny_rollout: Build) -> None:
    rollout = judged(tiny_rollout, torch.tensor([1.0, 1, torch.nan, 1, 0, 1]))
    rollout = rollout.replace(group=torch.tensor([0, 0, 0, 1, 2, 2]))
    loss_mask = torch.ones(6, 4, dtype=torch.bool)
    loss_mask[2] = False
    assert flat_groups(rollout.replace(loss_mask=loss_mask)) == pytest.approx(0.5)
    assert flat_groups(rollout.replace(loss_mask=torch.zeros_like(loss_mask))) == 0
    assert flat_groups(rollout.replace(group=torch.arange(6))) == 0


def test_flat_groups_sum_a_reward_per_step(tiny_rollout: Build) -> None:
    per_step = torch.zeros(6, 4)
    per_step[torch.arange(6), torch.arange(6) % 4] = torch.tensor([1.0, 1, 1, 2, 0, 0])
    assert flat_groups(judged(tiny_rollout, per_step)) == pytest.approx(2 / 3)


def test_groups_with_advantages_are_flat_where_all_of_them_are_0(tiny_rollout: Build) -> None:
    """Equal rewards may teach, by a critic: an environment that pays 1 at every step."""
    advantages = torch.zeros(6, 4)
    rollout = judged(tiny_rollout, torch.ones(6), advantages=advantages)
    assert flat_groups(rollout) == 1
    advantages[0, 3] = advantages[5, 0] = -0.1
    assert flat_groups(judged(tiny_rollout, torch.ones(6), advantages=advantages)) == pytest.approx(1 / 3)
    loss_mask = torch.ones(6, 4, dtype=torch.bool)
    loss_mask[0, 3] = False
    assert flat_groups(judged(tiny_rollout, advantages=advantages, loss_mask=loss_mask)) == pytest.approx(2 / 3)
    of_regions = advantages[..., None, None].expand(6, 4, 2, 2).clone()
    assert flat_groups(judged(tiny_rollout, advantages=of_regions)) == pytest.approx(1 / 3)


@pytest.mark.parametrize("reward", [[0, 1, 0, 1, 0, 1], [1, 1, 0.1, 0.1, 0, 1], [0.7, 0.7, 0.1, 0.1, 3, 3]])
def test_group_relative_advantages_are_flat_where_the_rewards_are(tiny_rollout: Build, reward: list[float]) -> None:
    rollout = judged(tiny_rollout, torch.tensor(reward).float())
    assert flat_groups(GroupRelativeAdvantage()(rollout, {}, {})) == flat_groups(rollout)
