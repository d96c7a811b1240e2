"""Regression of actions: worked values, its likeness to a likelihood, another kind of policy, refusals."""

from __future__ import annotations

from typing import Any

import gymnasium.spaces as spaces
import numpy as np
import pytest
import torch
from torch import Tensor

from regimen.cast import Cast
from regimen.checkers import check
from regimen.learn import Learner
from regimen.memory import NewestRollout
from regimen.models import NextPositionNetwork, TrackTransformer
from regimen.objectives import RegressionObjective, SFTObjective
from regimen.objectives.base import Batch
from regimen.policies import ActionPolicy, NextPositionForecaster
from regimen.rollout import Rollout
from regimen.update import Update

BOX = spaces.Box(-1, 1, (3,), np.float32)


def controller(seed: int = 0) -> ActionPolicy:
    torch.manual_seed(seed)
    return ActionPolicy.for_spaces(BOX, spaces.Box(-1, 1, (2,), np.float32), widths=(16,))


def shown(rows: int = 6, steps: int = 4, mask: Tensor | None = None) -> Rollout:
    seen = torch.randn(rows, steps, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(rows, steps, dtype=torch.bool) if mask is None else mask
    actions = torch.stack([seen[..., 0], -seen[..., 1]], -1)
    knobs = {"temperature": 1.0}
    return Rollout.create(
        task="t", group=torch.arange(rows), mask=mask, observations=seen, actions=actions, knobs=knobs
    )


def loss_of(objective: Any, rollout: Rollout, policy: Any) -> Tensor:
    return objective(Batch(rollout, {"policy": policy}, {}, torch.Generator())).total


@pytest.mark.parametrize(("distance", "expected"), [("mse", 12.5), ("norm", 5.0)])
def test_distances_by_hand(distance: Any, expected: float) -> None:
    policy = controller()
    for parameter in policy.head.mean.parameters():
        torch.nn.init.zeros_(parameter)
    rollout = shown(1, 1).replace(actions=torch.tensor([[[3.0, 4.0]]]))
    assert float(loss_of(RegressionObjective(distance), rollout, policy).detach()) == pytest.approx(expected)


def test_the_mean_square_is_the_likelihood_of_unit_gaussians() -> None:
    torch.manual_seed(0)
    policy = NextPositionForecaster(NextPositionNetwork(TrackTransformer(8, 2, 1)))
    actions = torch.randn(4, 19, 2)
    mask = torch.ones(4, 19, dtype=torch.bool)
    past = {"past": torch.zeros(4, 1, 2)}
    rollout = Rollout.create(task="t", group=torch.arange(4), mask=mask, context=past, actions=actions)
    found = []
    for objective in (RegressionObjective("mse"), SFTObjective("token")):
        found.append(torch.autograd.grad(loss_of(objective, rollout, policy), list(policy.parameters())))
    assert all(torch.allclose(mine, theirs, atol=1e-6) for mine, theirs in zip(*found, strict=True))


def test_steps_are_weighted_as_the_aggregate_says() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False]])
    policy, rollout = controller(), shown(2, 3, mask)
    apart = (policy.distribution(rollout).described.mode() - rollout.actions[mask]).norm(dim=1).detach()
    token, sequence = (
        float(loss_of(RegressionObjective("norm", aggregate=aggregate), rollout, policy).detach())
        for aggregate in ("token", "sequence")
    )
    assert token == pytest.approx(float(apart.mean()))
    assert sequence == pytest.approx(float((apart[:3].mean() + apart[3]) / 2))


@pytest.mark.parametrize("distance", ["mse", "norm"])
def test_a_controller_learns_what_was_done(distance: Any) -> None:
    cast, rollout, memory = Cast(policy=controller()), shown(), NewestRollout()
    learner = Learner(Update(RegressionObjective(distance), learning_rate=0.02), cast)
    memory.add(rollout)
    before = float(loss_of(learner.update.objective, rollout, cast["policy"]).detach())
    for _ in range(200):
        learner.learn(memory, cast, {}, torch.Generator())
    assert float(loss_of(learner.update.objective, rollout, cast["policy"]).detach()) < 0.1 * before


@pytest.mark.parametrize("distance", ["mse", "norm"])
def test_it_passes_the_checks(distance: Any) -> None:
    mask = torch.arange(4) < torch.tensor([4, 3, 2, 1, 4, 4])[:, None]
    assert check(RegressionObjective(distance), shown(mask=mask), cast=Cast(policy=controller())).messages == []


def test_bad_input_is_refused(sampled: Any) -> None:
    with pytest.raises(ValueError, match="RegressionObjective: distance 'l1' is not one of mse, norm"):
        RegressionObjective("l1")  # type: ignore[arg-type]
    policy, rollout = sampled()
    with pytest.raises(
        ValueError, match="member 'policy' .FlowPolicy. takes actions of type torch.float32; expected a"
    ):
        loss_of(RegressionObjective(), rollout, policy)
    policy = ActionPolicy.for_spaces(BOX, spaces.Discrete(2))
    rollout = shown().replace(actions=torch.zeros(6, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="takes actions of type torch.int64; .* with SFTObjective"):
        loss_of(RegressionObjective(), rollout, policy)
