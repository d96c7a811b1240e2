"""Contributions that should add up to a reward: worked numbers, gradients, padding, and networks that learn them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from regimen.checkers import check
from regimen.models.progress import ActionEncoder, ProgressEstimator
from regimen.models.torsos import MLPTorso
from regimen.objectives import Batch, ReturnDecompositionObjective, return_decomposition_loss
from regimen.rollout import Rollout


def test_the_loss_of_four_steps_and_its_gradient() -> None:
    contributions = torch.tensor([[0.1, 0.3, 0.0, 0.4]], requires_grad=True)
    loss = return_decomposition_loss(contributions, torch.ones(1), torch.ones(1, 4, dtype=torch.bool)).mean()
    (gradient,) = torch.autograd.grad(loss, contributions)
    assert loss.item() == pytest.approx(0.04)
    assert torch.allclose(gradient, torch.full((1, 4), -0.4))


def test_masked_steps_change_neither_loss_nor_gradient() -> None:
    contributions = torch.tensor([[0.1, 0.3, 5.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    loss = return_decomposition_loss(contributions, torch.ones(1), mask).sum()
    (gradient,) = torch.autograd.grad(loss, contributions)
    assert loss.item() == pytest.approx(0.36)
    assert float(gradient[0, 2]) == 0


def test_contributions_in_half_precision_are_summed_in_single() -> None:
    """Forty times 0.1 in bfloat16 is 4.0039 in float32; a sum in bfloat16, where 4 has a step of 1/32, is not."""
    contributions = torch.full((1, 40), 0.1, dtype=torch.bfloat16)
    loss = return_decomposition_loss(contributions, torch.ones(1), torch.ones(1, 40, dtype=torch.bool))
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx((40 * float(contributions[0, 0]) - 1) ** 2, rel=1e-6)


def test_unequal_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"contributions \[1, 4\], final \[2\] and mask \[1, 4\]"):
        return_decomposition_loss(torch.zeros(1, 4), torch.zeros(2), torch.ones(1, 4, dtype=torch.bool))


def played(count: int, seed: int = 0, steps: int = 5, states: int = 3, actions: int = 2) -> Rollout:
    """A step is worth 1 where the action is the number of the state."""
    rng = torch.Generator().manual_seed(seed)
    state = torch.randint(states, (count, steps), generator=rng)
    acted = torch.randint(actions, (count, steps), generator=rng)
    mask = torch.arange(steps) < torch.randint(1, steps + 1, (count, 1), generator=rng)
    credit = ((state == acted) & mask).float()
    return Rollout.create(
        task="match", group=torch.arange(count), mask=mask, actions=acted, reward=credit.sum(1),
        observations=nn.functional.one_hot(state, states).float(), step_columns={"credit": credit},
    )  # fmt: skip


def network(recurrent: int | None = None) -> ProgressEstimator:
    torch.manual_seed(0)
    encoder = ActionEncoder(MLPTorso(3, ()), 2, (32,), recurrent=recurrent)
    return ProgressEstimator(encoder, encoder.width, hidden=16 if recurrent else None)


def loss_of(estimator: nn.Module, rollout: Rollout, whole: Rollout | None = None, rows: slice = slice(None)) -> Tensor:
    batch = Batch(rollout, {"estimator": estimator}, {}, torch.Generator(), whole, rows)
    return ReturnDecompositionObjective()(batch).total


def test_the_objective_is_the_mean_over_samples_and_slices_add_up_to_it() -> None:
    estimator, rollout = network(), played(6)
    whole = loss_of(estimator, rollout)
    expected = (estimator(rollout).sum(1) - rollout.reward).square().mean()
    assert whole.item() == pytest.approx(expected.item())
    parts = [loss_of(estimator, rollout[rows], rollout, rows) for rows in (slice(0, 4), slice(4, 6))]
    assert sum(part.item() for part in parts) == pytest.approx(whole.item(), rel=1e-5)


@pytest.mark.parametrize("recurrent", [None, 8])
def test_padding_changes_no_contribution(recurrent: int | None) -> None:
    estimator, rollout = network(recurrent), played(6)
    longer = estimator(rollout.padded(9))
    assert torch.allclose(longer[:, :5], estimator(rollout), atol=1e-6)
    assert not bool(longer[:, 5:].any())
    assert loss_of(estimator, rollout.padded(9)).item() == pytest.approx(loss_of(estimator, rollout).item(), rel=1e-5)


def test_a_network_learns_the_credit_of_steps_from_sums() -> None:
    estimator, rollout = network(), played(400)
    optimizer = torch.optim.Adam(estimator.parameters(), 1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        loss_of(estimator, rollout).backward()
        optimizer.step()
    fresh = played(50, seed=1)
    assert torch.allclose(estimator(fresh), fresh["credit"], atol=0.1)


def test_an_encoder_with_a_core_sees_the_steps_before() -> None:
    estimator, rollout = network(8), played(4)
    changed = rollout.replace(actions=torch.cat([1 - rollout.actions[:, :1], rollout.actions[:, 1:]], 1))
    later = rollout.mask[:, 1]
    assert bool((estimator(rollout) != estimator(changed))[later, 1].all())


def test_vectors_of_numbers_are_actions_too() -> None:
    encoder = ActionEncoder(MLPTorso(3, ()), 4, (8,))
    rollout = played(4).replace(actions=torch.randn(4, 5, 4))
    assert encoder(rollout).shape == (4, 5, 8)


def test_samples_without_reward_are_an_error() -> None:
    rollout = Rollout.create(task="a", group=torch.arange(1), mask=torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="ReturnDecompositionObjective needs 'reward'"):
        loss_of(network(), rollout)


def test_the_objective_passes_the_checker() -> None:
    assert check(ReturnDecompositionObjective(), played(8), cast={"estimator": network()}).messages == []
