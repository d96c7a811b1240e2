"""Destinations: worked values, limits, gradients, and what they ask of a member."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regimen.cast import Cast
from regimen.checkers import check
from regimen.knobs import Knobs
from regimen.learn import Learner
from regimen.memory import NewestRollout
from regimen.objectives import DestinationObjective, DiversityObjective, best_of_k, pairwise_repulsion
from regimen.objectives.base import Batch
from regimen.rollout import Rollout
from regimen.update import Update

POINTS, TARGET = torch.tensor([[[0.0, 0], [1, 0], [0, 2]]]), torch.tensor([[1.0, 1]])


@dataclass(frozen=True)
class Named:
    destinations: Tensor


class Guesses(nn.Module):
    """The same `K` points of any dimension for every sample: a member that is no forecaster."""

    def __init__(self, points: Tensor) -> None:
        super().__init__()
        self.points = nn.Parameter(points.clone())

    def distribution(self, rollout: Rollout, where: Tensor | None = None) -> Named:
        return Named(self.points.expand(len(rollout), -1, -1))


def ending(ends: Tensor, steps: int = 3, mask: Tensor | None = None) -> Rollout:
    actions = torch.zeros(len(ends), steps, ends.shape[1])
    actions[:, -1] = ends
    mask = torch.ones(actions.shape[:2], dtype=torch.bool) if mask is None else mask
    return Rollout.create(task="t", group=torch.arange(len(ends)), mask=mask, actions=actions)


def loss_of(objective: Any, rollout: Rollout, member: Any) -> float:
    knobs = Knobs.of(objective)
    return float(objective(Batch(rollout, {"policy": member}, knobs, torch.Generator())).total.detach())


def test_the_papers_losses_by_hand() -> None:
    assert best_of_k(POINTS, TARGET).tolist() == [1]
    assert float(pairwise_repulsion(POINTS, 1.0)) == pytest.approx(0.130978, abs=1e-6)
    total = DestinationObjective() + 100.0 * DiversityObjective(1.0)
    found = loss_of(total, ending(TARGET), Guesses(POINTS[0]))
    assert found == pytest.approx(14.097768, abs=1e-4)


def test_repulsion_is_one_where_all_coincide_and_none_far_apart() -> None:
    assert pairwise_repulsion(torch.ones(2, 5, 2), 3.0).tolist() == [1, 1]
    assert float(pairwise_repulsion(100 * POINTS, 1.0)) == 0
    assert pairwise_repulsion(torch.ones(2, 1, 2), 3.0).tolist() == [0, 0]


def test_the_scale_is_in_squares_of_the_unit() -> None:
    assert torch.allclose(pairwise_repulsion(POINTS, 1.0), pairwise_repulsion(3 * POINTS, 9.0))


def test_only_the_nearest_is_drawn_to_the_target() -> None:
    points = POINTS.clone().requires_grad_(True)
    best_of_k(points, TARGET).sum().backward()
    assert points.grad is not None
    assert points.grad[0].tolist() == [[0, 0], [0, -1], [0, 0]]
    assert float(best_of_k(POINTS, POINTS[:, 1])) == 0


def test_gradients_are_those_of_differences() -> None:
    points = torch.randn(3, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    target = torch.ones(3, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: best_of_k(x, target), points)
    assert torch.autograd.gradcheck(lambda x: pairwise_repulsion(x, 2.0), points)


def test_guesses_of_three_dimensions_settle_on_three_places() -> None:
    places = torch.tensor([[5.0, 0, 0], [-5, 0, 0], [0, 5, 5]])
    cast = Cast(policy=Guesses(0.1 * places))
    objective = DestinationObjective() + 1.0 * DiversityObjective(1.0)
    learner, memory = Learner(Update(objective, learning_rate=0.1), cast), NewestRollout()
    memory.add(ending(places.repeat(8, 1)))
    for _ in range(150):
        learner.learn(memory, cast, Knobs.of(objective), torch.Generator())
    assert float(best_of_k(cast["policy"].points.expand(3, -1, -1), places).max().detach()) < 0.3


def test_samples_whose_end_is_not_learned_from_are_left_out() -> None:
    mask = torch.tensor([[True] * 3, [True, True, False]])
    rollout = ending(torch.tensor([[1.0, 1], [50, 50]]), mask=mask)
    assert loss_of(DestinationObjective(), rollout, Guesses(POINTS[0])) == pytest.approx(0.5)


@pytest.mark.parametrize("objective", [DestinationObjective(), DiversityObjective(2.0)])
def test_they_pass_the_checks(objective: Any) -> None:
    rollout = ending(torch.randn(6, 2, generator=torch.Generator().manual_seed(0)))
    assert check(objective, rollout, cast=Cast(policy=Guesses(POINTS[0]))).messages == []


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"best_of_k: points \[1, 3, 2\], target \[2\]; expected \[B, K, D\]"):
        best_of_k(POINTS, TARGET[0])
    with pytest.raises(ValueError, match="with K at least 1"):
        best_of_k(POINTS[:, :0], TARGET)
    with pytest.raises(ValueError, match="pairwise_repulsion: scale is 0, expected above 0"):
        pairwise_repulsion(POINTS, 0)
    with pytest.raises(ValueError, match="DiversityObjective: scale is -1, expected above 0"):
        DiversityObjective(-1)


def test_a_policy_without_destinations_is_refused_by_name(sampled: Any) -> None:
    policy, rollout = sampled()
    with pytest.raises(ValueError, match="member 'policy' .FlowPolicy. names no destinations; give a Dest"):
        loss_of(DestinationObjective(), rollout, policy)
