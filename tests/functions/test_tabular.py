"""Finite decision processes in closed form: chains by hand, and the identity of values and occupancies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regimen.functions.tabular import occupancy, optimal_values, state_values


def chances(rng: torch.Generator, *shape: int) -> Tensor:
    drawn = torch.rand(*shape, generator=rng, dtype=torch.float64)
    return drawn / drawn.sum(-1, keepdim=True)


def chain() -> tuple[Tensor, Tensor]:
    """Two states; action 0 stays, action 1 switches; to be in the second pays 1."""
    eye = torch.eye(2, dtype=torch.float64)
    transitions = torch.stack([torch.stack([eye[s], eye[1 - s]]) for s in range(2)])
    return transitions, torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)


def test_the_best_is_to_go_where_it_pays_and_to_stay() -> None:
    values = optimal_values(*chain(), discount=0.5)
    assert values.flatten().tolist() == pytest.approx([0.5, 1.0, 2.0, 1.5])


def test_values_of_a_policy_by_hand() -> None:
    transitions, rewards = chain()
    always_switch = torch.tensor([[0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    # V0 = 0.5 V1, V1 = 1 + 0.5 V0.
    assert state_values(transitions, rewards, always_switch, 0.5).tolist() == pytest.approx([2 / 3, 4 / 3])


def test_an_occupancy_weighs_rewards_as_values_do() -> None:
    rng = torch.Generator().manual_seed(0)
    transitions, policy, start = chances(rng, 4, 3, 4), chances(rng, 4, 3), chances(rng, 4)
    rewards = torch.rand(4, 3, generator=rng, dtype=torch.float64)
    occupied = occupancy(transitions, policy, start, 0.9)
    assert float(occupied.sum()) == pytest.approx(1.0)
    value = (start * state_values(transitions, rewards, policy, 0.9)).sum()
    assert float((occupied * rewards).sum()) == pytest.approx(float(0.1 * value))


def test_no_discount_looks_at_the_start_alone() -> None:
    transitions, _ = chain()
    policy, start = torch.full((2, 2), 0.5, dtype=torch.float64), torch.tensor([0.25, 0.75], dtype=torch.float64)
    torch.testing.assert_close(occupancy(transitions, policy, start, 0.0), start[:, None] * policy)


def test_what_is_no_process_is_refused() -> None:
    transitions, rewards = chain()
    with pytest.raises(ValueError, match=r"rewards \[3, 2\].*expected \[S, A, S\]"):
        optimal_values(transitions, torch.zeros(3, 2), 0.5)
    with pytest.raises(ValueError, match="discount 1.0"):
        optimal_values(transitions, rewards, 1.0)
    with pytest.raises(ValueError, match="policy: expected probabilities"):
        state_values(transitions, rewards, torch.ones(2, 2, dtype=torch.float64), 0.5)
