"""Q-learning: worked targets with one network's judgement or the other's, gradients, terminations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from off_policy import Line, batch_of, numerical_gradient, steps
from torch import Tensor

from regimen.checkers import check
from regimen.objectives import DQNObjective
from regimen.rollout import Rollout


def chosen() -> Rollout:
    return steps(actions=torch.tensor([[0], [1], [1]]))


def members() -> dict[str, Any]:
    """The values of two actions: 1 s and 2 s of the policy, which prefers the second; 3 s and 1 s of the target."""
    return {"policy": Line(1.0, 2.0), "policy_target": Line(3.0, 1.0)}


def loss_of(objective: DQNObjective, rollout: Rollout | None = None, cast: dict[str, Any] | None = None) -> Tensor:
    return objective(batch_of(objective, rollout or chosen(), **(cast or members()))).total


def mean_square(*errors: float) -> float:
    return sum(error**2 for error in errors) / len(errors)


def test_the_target_says_how_good_the_action_is_that_the_policy_prefers() -> None:
    expected = mean_square(1 - (0.1 + 0.5 * 10), 4 - 0.2, 6 - (0.3 + 0.5 * 30))
    assert float(loss_of(DQNObjective(distance="mse")).detach()) == pytest.approx(expected)


def test_without_double_the_target_chooses_too() -> None:
    expected = mean_square(1 - (0.1 + 0.5 * 30), 4 - 0.2, 6 - (0.3 + 0.5 * 90))
    assert float(loss_of(DQNObjective(double=False, distance="mse")).detach()) == pytest.approx(expected)


def test_a_target_that_is_the_policy_chooses_the_same_either_way() -> None:
    cast = {"policy": Line(1.0, 2.0), "policy_target": Line(1.0, 2.0)}
    one, two = (float(loss_of(DQNObjective(double=double), cast=cast).detach()) for double in (True, False))
    assert one == two


def test_huber_limits_the_gradient_of_a_step() -> None:
    cast = members()
    loss_of(DQNObjective(), cast=cast).backward()
    # Two of three steps are far below their target, one is far above: each pulls by 1, times its observation.
    assert cast["policy"].offset.grad.tolist() == pytest.approx([-1 / 3, (2 - 3) / 3])


def test_gradient_is_that_of_the_action_taken_with_the_target_held() -> None:
    cast, objective = members(), DQNObjective(distance="mse")
    loss_of(objective, cast=cast).backward()
    parameters = list(cast["policy"].parameters())
    # Which action is best does not change so near by.
    expected = numerical_gradient(lambda: loss_of(objective, cast=cast), parameters)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=1e-6)
    assert all(parameter.grad is None for parameter in cast["policy_target"].parameters())


def test_several_steps_by_hand() -> None:
    """Two steps: 1 and 2 are earned, then 0.25 times the value of what came after."""
    objective = DQNObjective(n=2, discount=0.5, distance="mse")
    rollout = Rollout.create(
        task="t", group=torch.zeros(1, dtype=torch.int64), mask=torch.ones(1, 2, dtype=torch.bool),
        loss_mask=torch.tensor([[True, False]]), observations=torch.tensor([[[1.0], [9.0]]], dtype=torch.float64),
        actions=torch.tensor([[1, 0]]), reward=torch.tensor([[1.0, 2.0]], dtype=torch.float64),
        step_columns={"next_observations": torch.tensor([[[9.0], [4.0]]], dtype=torch.float64)},
    )  # fmt: skip
    assert float(loss_of(objective, rollout).detach()) == pytest.approx(mean_square(2 - (1 + 0.5 * 2 + 0.25 * 4)))


def test_objective_passes_the_checker() -> None:
    cast = members()
    cast["policy_target"].requires_grad_(False)
    rollout = Rollout(torch.cat([chosen().data] * 2), ("t",))
    assert check(DQNObjective(), rollout, cast=cast).messages == []
