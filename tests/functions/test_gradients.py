"""Gradients that disagree: PCGrad's worked numbers and limits, and the share of pairs in conflict."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regimen.functions.gradients import conflict, flat_gradient, pcgrad


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_pcgrad_of_the_worked_example() -> None:
    """g1' = (0.5, 0.5) and g2' = (0, 1)."""
    assert torch.allclose(pcgrad(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]), rng()), torch.tensor([0.5, 1.5]))


def test_gradients_without_conflict_are_summed() -> None:
    gradients = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0], [0.5, 1.0, 0.0]])
    assert torch.equal(pcgrad(gradients, rng()), gradients.sum(0))


def test_identical_tasks_give_their_sum() -> None:
    gradient = torch.randn(7, generator=rng())
    assert torch.allclose(pcgrad(gradient.expand(4, -1).clone(), rng()), 4 * gradient)


def test_opposite_gradients_cancel() -> None:
    gradient = torch.randn(5, generator=rng())
    assert torch.allclose(pcgrad(torch.stack([gradient, -2 * gradient]), rng()), torch.zeros(5), atol=1e-6)


def test_of_two_gradients_neither_undoes_the_other_and_the_given_ones_are_left_as_they_are() -> None:
    gradients = torch.randn(2, 6, generator=rng(3))
    gradients[1] -= 2 * gradients[0]
    before = gradients.clone()
    assert gradients[0] @ gradients[1] < 0
    together = pcgrad(gradients, rng())
    assert bool((gradients @ together >= -1e-5).all())
    assert torch.equal(gradients, before)


def test_the_order_is_drawn() -> None:
    gradients = torch.tensor([[1.0, 0.0], [-1.0, 0.3], [-0.3, -1.0]])
    found = {tuple(pcgrad(gradients, rng(seed)).tolist()) for seed in range(20)}
    assert len(found) > 1


def test_a_gradient_of_zero_changes_nothing() -> None:
    gradients = torch.tensor([[1.0, -2.0], [0.0, 0.0]])
    assert torch.equal(pcgrad(gradients, rng()), gradients[0])


def test_pcgrad_of_one_vector_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gradients has shape \[3\], expected \[K, P\]"):
        pcgrad(torch.ones(3), rng())


@pytest.mark.parametrize(
    ("gradients", "share"),
    [([[1.0, 0.0], [-1.0, 0.1], [0.0, 1.0]], 1 / 3), ([[1.0, 0.0], [0.0, 1.0]], 0.0), ([[1.0, 1.0]], 0.0)],
)
def test_share_of_pairs_in_conflict(gradients: list[list[float]], share: float) -> None:
    assert float(conflict(torch.tensor(gradients))) == pytest.approx(share)


def test_flat_gradient_is_zero_where_a_loss_does_not_depend_on_a_parameter() -> None:
    one, other = (torch.ones(2, requires_grad=True) for _ in range(2))
    assert torch.equal(flat_gradient((3 * one).sum(), [one, other]), torch.tensor([3.0, 3.0, 0.0, 0.0]))
    assert one.grad is None
    constant: Tensor = torch.zeros(())
    assert torch.equal(flat_gradient(constant, [one]), torch.zeros(2))
