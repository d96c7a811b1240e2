"""Which steps are paid, and what takes the place of a final reward: worked numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regimen.functions.attribution import (
    action_ends,
    leave_one_out_contributions,
    misfit,
    redistribute,
    remaining_actions,
    uniform_contributions,
)
from regimen.functions.returns import discounted_return, gae, on_last_step

ALL = torch.ones(1, 4, dtype=torch.bool)
PAID = torch.tensor([[0.1, 0.3, 0.0, 0.4]])
FINAL = on_last_step(torch.ones(1), ALL)


def test_a_contribution_and_a_bonus_for_valid_actions_add_up() -> None:
    """The numbers of the paper's notation: c, and g = (1, 1, 0, 1) at 0.5, or g - 1."""
    valid = torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    bonus = redistribute(FINAL + 0.5 * valid, FINAL, PAID, ALL)
    assert torch.allclose(bonus, torch.tensor([[0.6, 0.8, 0.0, 0.9]]))
    assert float(bonus.sum()) == pytest.approx(2.3)
    penalty = redistribute(FINAL + 0.5 * (valid - 1), FINAL, PAID, ALL)
    assert torch.allclose(penalty, torch.tensor([[0.1, 0.3, -0.5, 0.4]]))


def test_advantages_of_fused_and_of_final_rewards() -> None:
    values, discount = torch.tensor([[0.5, 0.4, 0.3, 0.2]]), torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    fused, _ = gae(torch.tensor([[0.6, 0.8, 0.0, 0.9]]), values, discount, 0.95)
    assert torch.allclose(fused, torch.tensor([[1.6749125, 1.23675, 0.565, 0.7]]))
    sparse, _ = gae(FINAL, values, discount, 0.95)
    assert torch.allclose(sparse, torch.tensor([[0.40065, 0.527, 0.66, 0.8]]))


def test_leave_one_out_compares_with_the_mean_of_the_others() -> None:
    final, group = torch.tensor([1.0, 0.0, 0.5, 0.0]), torch.zeros(4, dtype=torch.int64)
    found = leave_one_out_contributions(final, group, torch.ones(4, 2, dtype=torch.bool))
    assert torch.allclose(found, torch.tensor([0.833333, -0.5, 0.166667, -0.5])[:, None].expand(4, 2))


def test_a_sample_that_cannot_be_paid_is_none_of_the_others() -> None:
    """Its reward, whatever stands there, is no part of the mean; of two that leaves one without others."""
    ends = torch.tensor([[True], [True], [False], [True], [False]])
    final, group = torch.tensor([1.0, 0.25, 9.0, 2.0, 0.0]), torch.tensor([0, 0, 0, 1, 1])
    found = leave_one_out_contributions(final, group, ends)
    assert found[:, 0].tolist() == [0.75, -0.75, 0.0, 0.0, 0.0]


def test_one_that_has_no_others_is_given_nothing() -> None:
    found = leave_one_out_contributions(torch.tensor([1.0, 3.0]), torch.tensor([7, 2]), torch.ones(2, 3).bool())
    assert torch.equal(found, torch.zeros(2, 3))


def test_weights_of_the_published_code_are_the_actions_still_to_come() -> None:
    paid = torch.tensor([[0.6, 0.8, 0.0, 0.9]]) * remaining_actions(ALL)
    assert torch.allclose(paid, torch.tensor([[1.8, 1.6, 0.0, 0.0]]))


def test_equal_shares_add_up_and_leave_padding_alone() -> None:
    ends = torch.tensor([[True, True, True, False], [True, False, False, False]])
    found = uniform_contributions(torch.tensor([0.6, 2.0]), ends)
    assert torch.allclose(found, torch.tensor([[0.2, 0.2, 0.2, 0.0], [2.0, 0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_an_undiscounted_return_is_kept_and_an_earlier_reward_raises_a_discounted_one(
    discount: float,
) -> None:
    contributions = torch.tensor([[0.5, 0.3, 0.2, 0.0]])
    paid = redistribute(FINAL, FINAL, contributions, ALL)
    before, after = (float(discounted_return(rewards, torch.full((1, 4), discount))[0, 0]) for rewards in (FINAL, paid))
    assert after == pytest.approx(before) if discount == 1 else after > before


def ends(segment: list[int], decided: list[int]) -> list[int]:
    mask = torch.ones(1, len(segment), dtype=torch.bool)
    found = action_ends(mask, torch.tensor([decided]).bool(), torch.tensor([segment]))
    return found[0].int().tolist()


def test_a_turn_is_paid_on_its_last_own_token() -> None:
    assert ends([0, 0, 0, 1, 1, 1], [0, 1, 1, 0, 1, 0]) == [0, 0, 1, 0, 1, 0]


def test_turns_without_words_between_them_are_two_actions() -> None:
    assert ends([0, 0, 1, 1], [1, 1, 1, 1]) == [0, 1, 0, 1]


def test_without_turns_every_decided_step_is_an_action() -> None:
    mask, decided = torch.tensor([[True, True, True, False]]), torch.tensor([[False, True, True, True]])
    assert action_ends(mask, decided).tolist() == [[False, True, True, False]]


def test_a_sample_without_steps_is_an_error() -> None:
    mask = torch.tensor([[True], [False]])
    with pytest.raises(ValueError, match="sample 1 has no steps to give its reward to; leave out empty samples"):
        action_ends(mask, mask)


@pytest.mark.parametrize("name", ["decided", "segment"])
def test_unequal_shapes_of_actions_are_named(name: str) -> None:
    given = {"decided": ALL, name: torch.ones(1, 3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=rf"{name} has shape \[1, 3\], expected \[1, 4\]"):
        action_ends(ALL, **given)


def test_unequal_shapes_of_rewards_are_named() -> None:
    with pytest.raises(ValueError, match=r"contributions has shape \[1, 3\], expected \[1, 4\]"):
        redistribute(FINAL, FINAL, torch.zeros(1, 3), ALL)


@pytest.mark.parametrize(
    ("predicted", "expected"),
    [([1.0, 2.0, 3.0], 0.0), ([2.0, 2.0, 2.0], 1.0), ([3.0, 2.0, 1.0], 4.0)],
)
def test_a_misfit_is_0_if_exact_and_1_of_a_constant(predicted: list[float], expected: float) -> None:
    assert float(misfit(torch.tensor(predicted), torch.tensor([1.0, 2.0, 3.0]))) == pytest.approx(expected)


def test_nothing_can_be_said_of_equal_rewards() -> None:
    equal: Tensor = torch.ones(3)
    assert float(misfit(equal, equal)) == torch.inf
