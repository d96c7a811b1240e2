"""Offline control: values by hand, gradients that go where they should, and a choice learned from data alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from off_policy import Line, steps
from tensordict import TensorDict
from torch import Tensor, nn

from regimen.cast import Cast, ReferenceRefresh
from regimen.checkers import check
from regimen.knobs import Knobs
from regimen.loop import train
from regimen.models import MLPTorso, QNetwork, ValueNetwork
from regimen.objectives import (
    AdvantageWeightedObjective,
    Expectile,
    Gumbel,
    ImplicitValueObjective,
    Maximiser,
    Objective,
    TotalVariation,
    iql,
)
from regimen.objectives.base import Batch
from regimen.policies.action import ActionPolicy
from regimen.policies.heads import GaussianHead
from regimen.regimen import Regimen, Stage
from regimen.rewards import EnvironmentReward
from regimen.rollout import Rollout
from regimen.tasks import DatasetTask
from regimen.update import Update


class States(nn.Module):
    """A value that is a weight times the observation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, rollout: Any) -> Tensor:
        return self.weight * rollout.observations[..., 0]


# By hand


def batch(objective: Objective, **members: Any) -> Batch:
    cast = {"value": States(), "critic_target": Line(0.0, -0.1), **members}
    return Batch(steps(), cast, Knobs.of(objective), torch.Generator())


def test_the_value_is_drawn_to_the_least_critic() -> None:
    objective = ImplicitValueObjective(Expectile(0.8))
    loss, metrics = objective.loss(both := batch(objective))
    # Q = observation + action - 0.1, and V = observation: the differences are 0.4, 0.15 and -0.1.
    assert float(loss.detach()) == pytest.approx((0.8 * 0.4**2 + 0.8 * 0.15**2 + 0.2 * 0.1**2) / 3)
    assert float(metrics["value_mean"]) == pytest.approx(2.0)
    assert float(metrics["value_exceeded"]) == pytest.approx(2 / 3)
    loss.backward()
    assert both.cast["critic_target"].slope.grad is None
    assert float(both.cast["value"].weight.grad) == pytest.approx(-2 * (0.8 * 0.4 + 0.8 * 0.15 * 2 - 0.2 * 0.1 * 3) / 3)


class Acts(nn.Module):
    """A policy whose log-probability of every action is a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))

    def distribution(self, rollout: Rollout, where: Tensor) -> Any:
        class Told:
            logprob = torch.where(where, self.weight, 0)

        return Told()


def test_the_likelihood_is_weighted_by_the_advantage() -> None:
    objective = AdvantageWeightedObjective(inverse_temperature=2.0, max_weight=2.0)
    loss, metrics = objective.loss(both := batch(objective, policy=Acts()))
    weights = [2.0, math.exp(0.3), math.exp(-0.2)]  # exp(0.8) is cut off.
    assert float(loss.detach()) == pytest.approx(sum(weights) / 3)
    assert float(metrics["weight_capped"]) == pytest.approx(1 / 3)
    loss.backward()
    assert both.cast["value"].weight.grad is None
    assert both.cast["critic_target"].slope.grad is None
    assert float(both.cast["policy"].weight.grad) == pytest.approx(-sum(weights) / 3)


def test_at_temperature_without_end_it_clones() -> None:
    objective = AdvantageWeightedObjective(inverse_temperature=0.0)
    loss, _ = objective.loss(batch(objective, policy=Acts()))
    assert float(loss.detach()) == pytest.approx(1.0)


# What is learned


@pytest.mark.parametrize("f", [None, TotalVariation(0.9), Gumbel(0.2)])
def test_the_better_action_is_learned_from_data_that_mostly_hold_the_worse(f: Maximiser | None) -> None:
    """One step: an action pays minus its distance from 0.5; the data's actions are uniform in [-1, 1]."""
    rng = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    actions = 2 * torch.rand(2000, 1, 1, generator=rng) - 1
    seen, pays = torch.ones(2000, 1, 1), -(actions[..., 0] - 0.5).abs()
    after = TensorDict({"next_observations": seen, "env_reward": pays}, batch_size=[2000, 1])
    fields = {"observations": seen, "actions": actions, "discount": torch.zeros(2000, 1), "step_columns": after}
    data = TensorDict(fields, batch_size=[2000])
    policy = ActionPolicy(MLPTorso(1, (16,)), GaussianHead(16, 1))
    critic = QNetwork(MLPTorso(1, ()), 1, widths=(32,))
    cast = Cast(policy=policy, critic=critic, value=ValueNetwork(MLPTorso(1, (16,))))
    update = Update(iql(f=f, inverse_temperature=10.0), ["value", "policy", "critic"], learning_rate=1e-2)
    rule = ReferenceRefresh("critic_target", of="critic", mode="ema", decay=0.95)
    task = DatasetTask("data", data, order="random")
    stage = Stage("offline", [task], 120, 256, reward=EnvironmentReward(), updates=[update], rules=[rule])
    train(Regimen(cast, [stage]), listener=lambda event: None)
    act = policy.act(torch.ones(1, 1), None, torch.ones(1, dtype=torch.bool), {"temperature": 0.0}, rng)
    assert float(act.actions) == pytest.approx(0.5, abs=0.12)
    value = float(cast["value"](stage.tasks[0].collect(cast, {}, rng, 1)).detach())
    assert -0.45 < value < -0.02  # The mean is -0.625.


# As parts


def test_the_checker_finds_nothing() -> None:
    rollout = steps().replace(knobs={"temperature": torch.ones(3)})
    cast = {"value": States(), "critic_target": Line(0.0, -0.1), "policy": Acts()}
    for part in (ImplicitValueObjective(Expectile(0.8)), AdvantageWeightedObjective(3.0)):
        assert check(part, rollout, cast=cast).messages == []


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="inverse_temperature=-1"):
        AdvantageWeightedObjective(-1.0)
