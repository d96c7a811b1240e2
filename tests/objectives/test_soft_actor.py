"""Soft actor-critic: gradients through the action, limits without entropy, the price of entropy, and the sum."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from off_policy import Line, Says, batch_of, numerical_gradient, steps
from torch import Tensor, nn

from regimen.checkers import check
from regimen.models import MLPTorso, QNetwork, Temperature
from regimen.objectives import SoftActorObjective, TDObjective, TemperatureObjective, sac
from regimen.objectives.base import Objective
from regimen.policies import ActionPolicy, GaussianHead
from regimen.rollout import Rollout


def learned(**others: Any) -> dict[str, Any]:
    """Networks in double precision, for actions of two numbers in a lopsided box."""
    torch.manual_seed(0)
    box = (torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 4.0]))
    head = GaussianHead(4, 2, learned_std=True, box=box, gain=1.0, log_std=-0.5)
    policy = ActionPolicy(MLPTorso(1, (4,)), head).double()
    critics = [QNetwork(MLPTorso(1, ()), 2, widths=(5,), box=box).double() for _ in range(2)]
    for critic in critics:
        # Without layers a torso would make single precision of everything.
        critic.torso = nn.Identity()
    cast = {"policy": policy, "critic": critics[0], "critic_target": critics[1], "temperature": Temperature(0.3)}
    return {**cast, **others}


def acted() -> Rollout:
    return steps(actions=torch.tensor([[[0.5, 1.0]], [[0.2, 3.0]], [[-0.5, 2.0]]], dtype=torch.float64))


def loss_of(objective: Objective, cast: dict[str, Any], rollout: Rollout | None = None, seed: int = 0) -> Tensor:
    return objective(batch_of(objective, rollout or acted(), seed, **cast)).total


def gradients(objective: Objective, cast: dict[str, Any], member: str) -> list[Tensor]:
    parameters = list(cast[member].parameters())
    found = torch.autograd.grad(loss_of(objective, cast), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def test_loss_by_hand() -> None:
    """Proposed is 2 s with log-probability -2; the critics say s + 2 s + 0 or + 1."""
    objective = SoftActorObjective(entropy_weight=0.5)
    loss = objective(batch_of(objective, steps(), policy=Says(), critic=Line(0.0, 1.0)))
    assert float(loss.total.detach()) == pytest.approx(0.5 * -2 - (3 + 6 + 9) / 3)
    assert float(loss.metrics["entropy"]) == pytest.approx(2)


def test_gradient_goes_through_the_action() -> None:
    """`d/dw` of `0.5 (0.5 w) - w s`, the mean of s being 2."""
    policy, critic = Says(), Line(0.0)
    loss_of(SoftActorObjective(entropy_weight=0.5), {"policy": policy, "critic": critic}, steps()).backward()
    assert float(policy.weight.grad) == pytest.approx(0.25 - 2)
    assert critic.slope.grad is None
    assert critic.slope.requires_grad


def test_gradient_is_the_finite_difference_with_the_noise_held() -> None:
    cast = learned()
    objective = SoftActorObjective(entropy_weight=0.7)
    parameters = list(cast["policy"].parameters())
    expected = numerical_gradient(lambda: loss_of(objective, cast), parameters)
    assert sum(float(gradient.abs().sum()) for gradient in expected) > 0.1
    for found, gradient in zip(gradients(objective, cast, "policy"), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-7)


def test_without_weight_it_is_the_deterministic_gradient() -> None:
    """A policy that proposes without a log-probability and one whose log-probability has no weight learn the same."""
    for logprob in (-3.0, None):
        policy = Says(logprob=logprob)
        loss_of(SoftActorObjective(), {"policy": policy, "critic": Line(0.0)}, steps()).backward()
        assert float(policy.weight.grad) == pytest.approx(-2)


@pytest.mark.parametrize(("logprob", "sign"), [(-5.0, 1), (5.0, -1)])
def test_entropy_above_the_target_gets_cheaper_and_below_it_dearer(logprob: float, sign: int) -> None:
    temperature = Temperature(0.3)
    objective = TemperatureObjective(target_entropy=0.0)
    loss_of(objective, {"policy": Says(weight=0.0, logprob=logprob), "temperature": temperature}, steps()).backward()
    assert float(temperature.log.grad) == pytest.approx(-logprob, rel=1e-6)
    assert math.copysign(1, float(temperature.log.grad)) == sign


def test_target_entropy_is_minus_the_number_of_dimensions() -> None:
    for given, two in ((steps(), -1.0), (steps(actions=torch.zeros(3, 1, 2, dtype=torch.float64)), -2.0)):
        policy = Says(weight=0.0, logprob=0.0)
        if given.actions.shape[-1] == 2:
            policy.propose = lambda seen, rng: (torch.zeros(len(seen), 2), torch.zeros(len(seen)))  # type: ignore[method-assign]
        temperature = Temperature()
        loss_of(TemperatureObjective(), {"policy": policy, "temperature": temperature}, given).backward()
        assert float(temperature.log.grad) == pytest.approx(-two)


def test_each_task_pays_its_own_price() -> None:
    data = torch.cat([steps().data, steps().replace(task=torch.ones(3, dtype=torch.int64)).data])
    temperature = Temperature(tasks=["a", "b", "c"])
    objective = TemperatureObjective(target_entropy=0.0)
    loss_of(objective, {"policy": Says(0.0, -1.0), "temperature": temperature}, Rollout(data, ("b", "a"))).backward()
    assert temperature.log.grad.tolist() == pytest.approx([0.5, 0.5, 0.0])


def test_the_sum_trains_every_member_as_its_own_objective_does() -> None:
    cast = learned()
    parts = {
        "critic": TDObjective(entropy_weight="temperature"),
        "policy": SoftActorObjective(entropy_weight="temperature"),
        "temperature": TemperatureObjective(),
    }
    for member, part in parts.items():
        # In the sum the critics' target draws its noise first.
        alone = part if member == "critic" else TDObjective(entropy_weight="temperature") + part
        for found, expected in zip(gradients(sac(), cast, member), gradients(alone, cast, member), strict=True):
            torch.testing.assert_close(found, expected)
    assert [leaf.name for leaf in sac().leaves()] == ["td", "actor", "temperature"]
    assert [leaf.name for leaf in sac(entropy_weight=0.2).leaves()] == ["td", "actor"]
    assert {"entropy_weight", "discount"} <= {knob.name for knob in sac(entropy_weight=0.2, discount=0.9).knobs}


def test_actor_and_temperature_read_the_same_proposal() -> None:
    batch = batch_of(sac(), acted(), **learned())
    assert batch.proposal() is batch.proposal()
    loss = sac()(batch)
    expected = float(loss.metrics["entropy"]) + 2
    assert float(loss.components["temperature"].detach()) == pytest.approx(math.log(0.3) * expected, rel=1e-6)


def test_proposals_of_a_policy_without_log_probabilities_have_no_price() -> None:
    with pytest.raises(ValueError, match="policy 'policy' proposes actions without log-probabilities"):
        loss_of(TemperatureObjective(), {"policy": Says(logprob=None), "temperature": Temperature()}, steps())


@pytest.mark.parametrize("objective", [sac(), SoftActorObjective(entropy_weight=0.3), TemperatureObjective()])
def test_objectives_pass_the_checker(objective: Objective) -> None:
    cast = learned()
    cast["critic_target"].requires_grad_(False)
    rollout = Rollout(torch.cat([acted().data] * 2), ("t",))
    assert check(objective, rollout, cast=cast).messages == []
