"""Selection by pass rate: the window, samples of one task and of two that depend on each other."""

from __future__ import annotations

import pytest
import torch

from regimen.credit import GroupRelativeAdvantage, PassRateSelector, group_relative
from regimen.rollout import Rollout


def judged(task: str, rewards: list[list[float]], rates: list[float] | None = None) -> Rollout:
    """Groups of samples of two steps, of which the second is learned from."""
    flat = torch.tensor([float(value) for group in rewards for value in group])
    group = torch.tensor([place for place, each in enumerate(rewards) for _ in each])
    mask = torch.ones(len(flat), 2, dtype=torch.bool)
    rate = flat if rates is None else torch.tensor(rates)[group]
    own = mask & torch.tensor([False, True])
    rollout = Rollout.create(task=task, group=group, mask=mask, loss_mask=own)
    return rollout.replace(reward=flat, rewards={"pass_rate": rate, "correct": flat})


def learned(rollout: Rollout) -> list[bool]:
    return rollout.loss_mask.any(1).tolist()


def test_advantages_of_the_worked_rewards_are_the_worked_ones() -> None:
    rewards = torch.tensor([0, 0, 0.9667, 0.7, 0, 0.3])
    group = torch.zeros(6, dtype=torch.int64)
    expected = torch.tensor([-0.7857, -0.7857, 1.5314, 0.8922, -0.7857, -0.0666])
    torch.testing.assert_close(group_relative(rewards, group, ddof=1, eps=1e-4), expected, atol=2e-4, rtol=0)
    centred = torch.tensor([-0.3278, -0.3278, 0.6389, 0.3722, -0.3278, -0.0278])
    torch.testing.assert_close(group_relative(rewards, group, std=None), centred, atol=1e-4, rtol=0)


def test_groups_are_kept_strictly_inside_the_window() -> None:
    rollout = judged("solver", [[1, 0], [1, 0], [1, 0], [1, 0]], [0.2, 0.21, 0.99, 1.0])
    found = PassRateSelector(low=0.2, high=1.0)(rollout, {}, {})
    assert learned(found) == [False, False, True, True, True, True, False, False]
    inner = GroupRelativeAdvantage()(rollout, {}, {})
    torch.testing.assert_close(found.advantages, inner.advantages * found.loss_mask)
    assert found.advantages[0].tolist() == [0, 0]


def test_the_pass_rate_may_be_the_mean_of_any_component() -> None:
    rollout = judged("questions", [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
    found = PassRateSelector(low=0.25, high=1.0, key="correct")(rollout, {}, {})
    assert learned(found) == [False] * 8 + [True] * 4 + [False] * 4


def test_samples_that_were_not_scored_do_not_count_in_a_rate() -> None:
    rollout = judged("questions", [[1, 0, 0, 0], [1, 0, 0, 0]])
    scores = rollout.rewards["correct"].clone()
    scores[2:4], scores[4:] = torch.nan, torch.nan
    rollout = rollout.replace(rewards={"correct": scores})
    found = PassRateSelector(low=0.4, high=1.0, key="correct")(rollout, {}, {})
    assert learned(found) == [True] * 4 + [False] * 4


def both(proposals: list[float], answers: list[list[float]], rates: list[float]) -> Rollout:
    return Rollout.cat([judged("proposer", [proposals], [0.0]), judged("solver", answers, rates)])


def test_of_two_tasks_only_the_named_one_is_selected_from() -> None:
    rollout = both([0.9, 0, 0.5], [[1, 0], [1, 1], [0, 0]], [0.5, 1, 0])
    found = PassRateSelector(of=["solver"])(rollout, {}, {})
    assert learned(found) == [True] * 3 + [True, True] + [False] * 4


@pytest.mark.parametrize(
    ("proposals", "answers", "rates"),
    [
        ([0.9, 0, 0.5], [[1, 1], [1, 1], [0, 0]], [1, 1, 0]),  # every question is too easy or too hard
        ([0.5, 0.5, 0.5], [[1, 0], [1, 0], [1, 0]], [0.5, 0.5, 0.5]),  # every proposal is worth the same
    ],
)
def test_where_one_role_has_nothing_to_learn_neither_learns(
    proposals: list[float], answers: list[list[float]], rates: list[float]
) -> None:
    found = PassRateSelector(of=["solver"])(both(proposals, answers, rates), {}, {})
    assert not any(learned(found))
    assert not bool(found.advantages.any())


def test_bad_settings_and_a_missing_component_are_named() -> None:
    with pytest.raises(ValueError, match=r"low is 0\.5 and high 0\.5"):
        PassRateSelector(low=0.5, high=0.5)
    with pytest.raises(ValueError, match="of is the text 'solver'"):
        PassRateSelector(of="solver")
    with pytest.raises(ValueError, match=r"no reward component 'rate' \(there are: pass_rate, correct\)"):
        PassRateSelector(key="rate")(judged("solver", [[1, 0]]), {}, {})
