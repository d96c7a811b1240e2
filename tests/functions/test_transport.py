"""Optimal transport: worked plans, a linear program as the limit, bad input."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from regimen.functions import cosine_cost, euclidean_cost, sinkhorn, transport_rewards

AGENT = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
DEMONSTRATION = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])


def random_cost(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def with_logarithms(cost: Tensor, epsilon: float, iterations: int) -> Tensor:
    """The algorithm as it stands in a text book, in double precision."""
    kernel = (-cost.double() / epsilon).exp()
    height, width = cost.shape
    rows = torch.ones(height, dtype=torch.float64)
    for _ in range(iterations):
        columns = 1 / width / (kernel.T @ rows)
        rows = 1 / height / (kernel @ columns)
    return rows[:, None] * kernel * columns


def test_the_cosine_cost_of_a_worked_example() -> None:
    expected = torch.tensor([[0, 0.292893, 1], [0, 0.292893, 1], [1, 0.292893, 0]])
    assert torch.allclose(cosine_cost(AGENT, DEMONSTRATION), expected, atol=1e-6)


def test_a_vector_of_zeros_costs_1_by_the_cosine() -> None:
    assert torch.equal(cosine_cost(torch.zeros(1, 2), DEMONSTRATION), torch.ones(1, 3))


def test_equal_distances_are_equal_to_the_bit() -> None:
    codes = torch.eye(40) / 2**0.5
    cost = euclidean_cost(codes[:5], codes[10:])
    assert bool((cost == cost[0, 0]).all())
    assert float(cost[0, 0]) == pytest.approx(1)


def test_the_rewards_of_a_worked_example_converged_and_after_100_iterations() -> None:
    cost = cosine_cost(AGENT, DEMONSTRATION)
    converged = transport_rewards(cost, 0.1, 2000)
    assert converged.tolist() == pytest.approx([-0.049604, -0.049604, -0.000654], abs=1e-5)
    assert transport_rewards(cost, 0.1).tolist() == pytest.approx([-0.049328, -0.049328, -0.000854], abs=2e-6)
    plan = sinkhorn(cost, 0.1)
    assert plan.sum(0).tolist() == pytest.approx([0.333948, 0.333932, 0.332120], abs=2e-6)
    assert plan.sum(1).tolist() == pytest.approx([1 / 3] * 3, abs=1e-6)


@pytest.mark.parametrize("iterations", [1, 2, 9, 10, 11, 35])
def test_products_and_logarithms_are_one_algorithm(iterations: int) -> None:
    cost = random_cost(6, 4)
    found, expected = sinkhorn(cost, 0.05, iterations), with_logarithms(cost, 0.05, iterations)
    assert torch.allclose(found.double(), expected, rtol=1e-3, atol=1e-7)


def test_a_plan_of_little_entropy_is_that_of_the_linear_program() -> None:
    cost = random_cost(5, 5, seed=3)
    rows = torch.kron(torch.eye(5), torch.ones(1, 5))
    columns = torch.kron(torch.ones(1, 5), torch.eye(5))
    solved = linprog(cost.flatten().numpy(), A_eq=torch.cat([rows, columns]).numpy(), b_eq=[0.2] * 10)
    assert -float(transport_rewards(cost, 0.005, 1500).sum()) == pytest.approx(solved.fun, abs=2e-3)


def test_identical_sequences_cost_nothing() -> None:
    frames = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    assert transport_rewards(euclidean_cost(frames, frames), 0.01).abs().max() < 1e-4


def test_large_costs_neither_vanish_nor_overflow() -> None:
    """exp(-C / epsilon) is 0 for all of these, in double precision too."""
    cost = 50 + 20 * random_cost(7, 7)
    plan = sinkhorn(cost, 0.01)
    assert bool(plan.isfinite().all())
    assert plan.sum(1).tolist() == pytest.approx([1 / 7] * 7, rel=1e-2)


def test_samples_of_a_batch_are_each_on_their_own() -> None:
    cost = random_cost(3, 2, 6, 6)
    together = sinkhorn(cost, 0.05)
    assert torch.allclose(together[1, 0], sinkhorn(cost[1, 0], 0.05), atol=1e-6)


def test_bad_input_is_told() -> None:
    with pytest.raises(ValueError, match=r"sinkhorn: the cost has shape \[2, 2\] and 1 entries that are NaN or infin"):
        sinkhorn(torch.tensor([[0.0, torch.nan], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="sinkhorn: epsilon=0, iterations=5"):
        sinkhorn(torch.zeros(2, 2), 0, 5)
    with pytest.raises(ValueError, match=r"cosine_cost: features have shapes \[3, 2\] and \[3, 4\]"):
        cosine_cost(torch.zeros(3, 2), torch.zeros(3, 4))
