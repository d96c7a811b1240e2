"""ReCOIL: its dual against exact occupancies, fixed points and gradients by hand, and an expert told from chance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from off_policy import Line, batch_of, numerical_gradient, steps
from torch import Tensor, nn

from regimen.cast import Cast, ReferenceRefresh
from regimen.checkers import check
from regimen.functions.tabular import occupancy
from regimen.loop import train
from regimen.models import MLPTorso, QNetwork, ValueNetwork
from regimen.objectives import (
    AdvantageWeightedObjective,
    ImplicitValueObjective,
    ReCOILCriticObjective,
    TotalVariation,
    chi_square_conjugate,
    recoil_critic_loss,
)
from regimen.policies.action import ActionPolicy
from regimen.policies.bounded import BoundedMeanHead
from regimen.regimen import Regimen, Stage
from regimen.rollout import Rollout
from regimen.tasks import DatasetTask, transition_rows
from regimen.update import Update

# The dual


def dual(
    transitions: Tensor, policy: Tensor, start: Tensor, discount: float, expert: Tensor, other: Tensor, beta: float
) -> tuple[float, Tensor]:
    """The least value of ReCOIL's objective over Q for a fixed policy, and `1 + delta / 2` there, `[S, A]`."""
    mixed = beta * expert + (1 - beta) * other

    def delta(q: Tensor) -> Tensor:
        return discount * transitions @ (policy * q).sum(1) - q

    def objective(flat: Tensor) -> Tensor:
        q = flat.view_as(policy)
        first = (start[:, None] * policy * q).sum()
        matched = (mixed * chi_square_conjugate(delta(q))).sum()
        return beta * (1 - discount) * first + matched - (1 - beta) * (other * delta(q)).sum()

    zero = torch.zeros(policy.numel(), dtype=torch.float64)
    slope = torch.autograd.functional.jacobian(objective, zero)
    curvature = torch.autograd.functional.hessian(objective, zero)
    best = torch.linalg.solve(curvature, -slope)
    return float(objective(best)), 1 + delta(best.view_as(policy)) / 2


def primal(occupied: Tensor, expert: Tensor, other: Tensor, beta: float) -> tuple[float, Tensor]:
    """Minus the chi-square divergence of the mixtures, and their ratio."""
    mixed = beta * expert + (1 - beta) * other
    ratio = (beta * occupied + (1 - beta) * other) / mixed
    return float(-(mixed * (ratio - 1).square()).sum()), ratio


def test_the_dual_is_the_divergence_of_the_mixtures_in_a_random_process() -> None:
    rng = torch.Generator().manual_seed(0)

    def chances(*shape: int) -> Tensor:
        drawn = torch.rand(*shape, generator=rng, dtype=torch.float64)
        return drawn / drawn.sum(-1, keepdim=True)

    transitions, policy, start = chances(5, 3, 5), chances(5, 3), chances(5)
    expert, other = chances(15).view(5, 3), chances(15).view(5, 3)
    occupied = occupancy(transitions, policy, start, 0.9)
    for beta in (0.3, 1.0):
        least, matched = dual(transitions, policy, start, 0.9, expert, other, beta)
        expected, ratio = primal(occupied, expert, other, beta)
        assert least == pytest.approx(expected, rel=1e-9)
        torch.testing.assert_close(matched, ratio, rtol=1e-8, atol=1e-9)


def test_the_dual_by_hand() -> None:
    """Two states; action 0 stays, action 1 switches."""
    stay, go = [[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]
    transitions = torch.tensor([[stay[0], go[0]], [stay[1], go[1]]], dtype=torch.float64)
    policy = torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=torch.float64)
    start = torch.tensor([1.0, 0.0], dtype=torch.float64)
    expert = torch.tensor([[0.1, 0.4], [0.4, 0.1]], dtype=torch.float64)
    other = torch.full((2, 2), 0.25, dtype=torch.float64)
    occupied = occupancy(transitions, policy, start, 0.9)
    assert occupied.flatten().tolist() == pytest.approx([0.112245, 0.336735, 0.275510, 0.275510], abs=1e-6)
    least, matched = dual(transitions, policy, start, 0.9, expert, other, 0.5)
    assert matched.flatten().tolist() == pytest.approx([1.034985, 0.902669, 0.808477, 1.501458], abs=1e-6)
    assert least == pytest.approx(-0.0592198, abs=1e-7)
    assert primal(occupied, expert, other, 0.5)[0] == pytest.approx(-0.0592198, abs=1e-7)


# The critic's loss


def settled(share: float, bound: float | None = None) -> float:
    """`Q - D V(s')` where the mean loss of rows is least, if that share of them is the expert's."""
    expert = torch.arange(20) < round(20 * share)
    after = torch.full((20,), 3.0, dtype=torch.float64)

    def mean(q: Tensor) -> Tensor:
        return recoil_critic_loss(q.expand(1, 20), after, expert, bound).mean()

    at = torch.zeros(1, dtype=torch.float64)
    slope = torch.autograd.functional.jacobian(mean, at)
    curvature = torch.autograd.functional.hessian(mean, at)
    return float(-slope / curvature[0]) - 3.0


@pytest.mark.parametrize(("share", "expected"), [(0.8, 1.6), (0.0, 0.0), (1.0, 2.0), (0.5, 1.0)])
def test_the_implicit_reward_is_twice_the_experts_share(share: float, expected: float) -> None:
    """With beta 0.5, d^E = 0.2 and d^S = 0.05 the share is 0.8; where both are alike it is beta."""
    assert settled(share) == pytest.approx(expected)


def test_with_a_bound_the_expert_is_drawn_to_it() -> None:
    # (3 + 4 share * 40) / (1 + 4 share)
    assert settled(0.5, bound=40.0) + 3 == pytest.approx((3 + 2 * 40) / 3)
    assert settled(0.0, bound=40.0) == pytest.approx(0.0)


def demonstrations(expert: int = 1, **fields: Any) -> Rollout:
    """The shared steps, the first `expert` of them the expert's; no rewards."""
    task = (torch.arange(3) >= expert).long()
    rollout = steps(**fields).replace(task=task)
    return Rollout(rollout.data.exclude("reward"), ("expert", "other"))


class States(nn.Module):
    """A value that is half of the observation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, rollout: Any) -> Tensor:
        return self.weight * rollout.observations[..., 0]


def test_the_objective_by_hand() -> None:
    objective = ReCOILCriticObjective()
    critic, value = Line(0.0, 1.0), States()
    loss, metrics = objective.loss(batch_of(objective, demonstrations(), critic=critic, value=value))
    # Q = observation + action, and one more; D V(s') = 0.5 * 0.5 * 10, 0, and 0.5 * 0.5 * 30.
    rows = [(1.5, 2.5, True), (2.25, 0.0, False), (3.0, 7.5, False)]
    by_hand = sum((after - q - k) ** 2 / 4 - expert * (q + k) for q, after, expert in rows for k in (0.0, 1.0)) / 3
    assert float(loss.detach()) == pytest.approx(by_hand)
    assert float(metrics["q_expert"]) == pytest.approx(2.0)
    assert float(metrics["q_other"]) == pytest.approx((2.75 + 3.5) / 2)
    loss.backward()
    assert value.weight.grad is None


@pytest.mark.parametrize("bound", [None, 5.0])
def test_its_gradient_is_that_of_differences(bound: float | None) -> None:
    objective, critic = ReCOILCriticObjective(bound=bound), Line(0.0, 0.3)

    def loss() -> Tensor:
        return objective.loss(batch_of(objective, demonstrations(), critic=critic, value=States()))[0]

    loss().backward()
    for found, parameter in zip(numerical_gradient(loss, list(critic.parameters())), critic.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, found, atol=1e-6, rtol=1e-6)


def test_a_discount_of_its_own_is_multiplied() -> None:
    objective = ReCOILCriticObjective(discount=0.9)
    rollout = demonstrations(discount=torch.tensor([[1.0], [0.0], [1.0]], dtype=torch.float64))
    rollout = Rollout(rollout.data, rollout.task_names)
    loss, _ = objective.loss(batch_of(objective, rollout, critic=Line(0.0), value=States()))
    rows = [(1.5, 4.5, 1), (2.25, 0.0, 0), (3.0, 13.5, 0)]
    assert float(loss.detach()) == pytest.approx(sum((a - q) ** 2 / 4 - e * q for q, a, e in rows) / 3)
    with pytest.raises(ValueError, match="already holds a discount"):
        objective.loss(batch_of(objective, demonstrations(), critic=Line(0.0), value=States()))


# Learning


def test_an_expert_is_told_from_chance_and_followed_without_rewards() -> None:
    """One step: the expert acts near 0.5, others uniformly in [-1, 1]; what is cloned of all data is 0.25 or below."""
    rng = torch.Generator().manual_seed(0)
    torch.manual_seed(0)

    def rows(actions: Tensor) -> Any:
        seen = torch.ones(len(actions), 1)
        return transition_rows(seen, actions, torch.zeros(len(actions)), seen)

    expert = rows(0.5 + 0.05 * torch.randn(20, 1, generator=rng))
    other = rows(2 * torch.rand(1000, 1, generator=rng) - 1)
    cast = Cast(
        policy=ActionPolicy(MLPTorso(1, (16,)), BoundedMeanHead(16, 1)),
        critic=QNetwork(MLPTorso(1, ()), 1, widths=(32,)),
        value=ValueNetwork(MLPTorso(1, (16,))),
    )
    parts = {
        "value": ImplicitValueObjective(TotalVariation(0.8)),
        "policy": AdvantageWeightedObjective(10.0),
        "critic": ReCOILCriticObjective(),
    }
    updates = [Update(part, [member], learning_rate=1e-2) for member, part in parts.items()]
    tasks = [DatasetTask(name, data, order="random") for name, data in (("expert", expert), ("other", other))]
    rule = ReferenceRefresh("critic_target", of="critic", mode="ema", decay=0.9)
    stage = Stage("imitate", tasks, 200, 128, updates=updates, rules=[rule])
    train(Regimen(cast, [stage]), listener=lambda event: None)
    act = cast["policy"].act(torch.ones(1, 1), None, torch.ones(1, dtype=torch.bool), {"temperature": 0.0}, rng)
    assert float(act.actions) == pytest.approx(0.5, abs=0.1)


# As a part


@pytest.mark.filterwarnings("ignore:ReCOILCriticObjective reads no reward")  # The checker tries it with one.
def test_the_checker_finds_nothing() -> None:
    cast = {"critic": Line(0.0, 1.0), "value": States()}
    assert check(ReCOILCriticObjective(), demonstrations(), cast=cast).messages == []


def test_data_without_an_expert_are_refused() -> None:
    objective = ReCOILCriticObjective(expert="teacher")
    with pytest.raises(ValueError, match=r"no task is called 'teacher'.*expert, other.*mixture/teacher"):
        objective.loss(batch_of(objective, demonstrations(), critic=Line(0.0), value=States()))


def test_a_reward_beside_it_is_warned_of() -> None:
    objective = ReCOILCriticObjective()
    judged = demonstrations().replace(reward=torch.ones(3, 1, dtype=torch.float64))
    with pytest.warns(UserWarning, match="reads no reward, and the stage has one"):
        objective.loss(batch_of(objective, judged, critic=Line(0.0), value=States()))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"values \[3\], after \[3\].*expected \[K, R\]"):
        recoil_critic_loss(torch.zeros(3), torch.zeros(3), torch.zeros(3, dtype=torch.bool))
