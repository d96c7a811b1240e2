"""Inverse dynamics: worked values, gradients, a task that must be learned, and actions of both kinds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regimen.cast import Cast
from regimen.checkers import check
from regimen.learn import Learner
from regimen.memory import NewestRollout
from regimen.models.torsos import MLPTorso, OneHotTorso
from regimen.objectives import InverseDynamicsObjective
from regimen.objectives.base import Batch, Loss
from regimen.policies.distributions import Categorical
from regimen.policies.heads import CategoricalHead, GaussianHead
from regimen.rollout import Rollout
from regimen.update import Update


class Linear(nn.Module):
    """`x W`, perhaps read as logits."""

    def __init__(self, weight: Tensor, logits: bool = False) -> None:
        super().__init__()
        self.weight, self.logits = nn.Parameter(weight.clone()), logits

    def forward(self, x: Tensor) -> Any:
        y = x @ self.weight
        return Categorical(y) if self.logits else y


def moved(before: Tensor, after: Tensor, actions: Tensor, mask: Tensor | None = None) -> Rollout:
    mask = torch.ones(before.shape[:2], dtype=torch.bool) if mask is None else mask
    return Rollout.create(
        task="walk",
        group=torch.arange(len(mask)),
        mask=mask,
        observations=before,
        actions=actions,
        step_columns={"next_observations": after},
    )


def loss_of(objective: InverseDynamicsObjective, rollout: Rollout, **cast: Any) -> Loss:
    return objective(Batch(rollout, cast, {}, torch.Generator()))


def ring(rows: int = 8, steps: int = 6, states: int = 5, seed: int = 0) -> Rollout:
    """A ring of states: action 0 stays, 1 goes on, 2 goes back."""
    rng = torch.Generator().manual_seed(seed)
    before, actions = (
        torch.randint(states, (rows, steps), generator=rng),
        torch.randint(3, (rows, steps), generator=rng),
    )
    return moved(before, (before + torch.tensor([0, 1, -1])[actions]) % states, actions)


def sharp(before: float, after: float) -> dict[str, Any]:
    """Features are the observations; the logits are those of action 0 and 1 by a feature of each state."""
    head = Linear(torch.tensor([[0.0, before], [0.0, after]]), logits=True)
    return {"bonus_encoder": nn.Identity(), "inverse_dynamics": head}


def test_the_head_reads_the_state_before_then_the_state_after() -> None:
    rollout = moved(torch.tensor([[[1.0]]]), torch.tensor([[[2.0]]]), torch.tensor([[1]]))
    loss = loss_of(InverseDynamicsObjective(), rollout, **sharp(10.0, -4.0))
    assert float(loss.total.detach()) == pytest.approx(math.log(1 + math.exp(-2)))
    assert float(loss.metrics["inverse_accuracy"]) == 1
    loss = loss_of(InverseDynamicsObjective(), rollout, **sharp(-4.0, 1.0))
    assert float(loss.total.detach()) == pytest.approx(math.log(1 + math.exp(2)))
    assert float(loss.metrics["inverse_accuracy"]) == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 3 / 3), ({"aggregate": "sequence"}, 1), ({"aggregate": "constant", "horizon": 1}, 3 / 2)],
)
def test_uniform_guesses_cost_the_logarithm_of_the_actions(options: dict[str, Any], expected: float) -> None:
    """Two samples of two steps and one; the sum over time and the mean over samples is the paper's."""
    mask = torch.tensor([[True, True], [True, False]])
    states = torch.randn(2, 2, 1)
    loss = loss_of(InverseDynamicsObjective(**options), moved(states, states, mask.long(), mask), **sharp(0.0, 0.0))
    assert float(loss.total.detach()) == pytest.approx(expected * math.log(2))


def test_the_gradient_of_encoder_and_head_is_that_of_differences() -> None:
    rng = torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 2, 3, 4, generator=rng, dtype=torch.float64)
    rollout = moved(before, after, torch.randint(3, (2, 3), generator=rng))

    def loss(encoder: Tensor, head: Tensor) -> Tensor:
        members = {"bonus_encoder": lambda states: (states @ encoder).tanh()}
        members["inverse_dynamics"] = lambda features: Categorical(features @ head)
        return loss_of(InverseDynamicsObjective(), rollout, **members).total

    shapes = ((4, 2), (4, 3))
    weights = [torch.randn(shape, generator=rng, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(loss, weights)


def learned(cast: Cast, rollout: Rollout, steps: int) -> dict[str, float]:
    update = Update(InverseDynamicsObjective(), ["bonus_encoder", "inverse_dynamics"], learning_rate=0.02)
    memory, learner, rng = NewestRollout(), Learner(update, cast), torch.Generator().manual_seed(0)
    memory.add(rollout)
    return [learner.learn(memory, cast, {}, rng).metrics for _ in range(steps)][-1]


def test_actions_on_a_ring_are_learned_from_both_states() -> None:
    torch.manual_seed(0)
    cast = Cast(
        bonus_encoder=nn.Sequential(OneHotTorso(5), nn.Linear(5, 8)),
        inverse_dynamics=nn.Sequential(MLPTorso(16, (32,)), CategoricalHead(32, 3)),
    )
    metrics = learned(cast, ring(rows=32), 120)
    assert metrics["bonus_encoder+inverse_dynamics/inverse_accuracy"] == 1
    loss = loss_of(InverseDynamicsObjective(), ring(seed=1), **cast)
    assert float(loss.total.detach()) < 0.1 < math.log(3)


def test_continuous_actions_are_learned_by_a_gaussian_head() -> None:
    torch.manual_seed(0)
    states, actions = torch.randn(16, 4, 3), torch.rand(16, 4, 2) * 2 - 1
    pushed = states + torch.cat([actions, torch.zeros(16, 4, 1)], -1)
    cast = Cast(bonus_encoder=nn.Linear(3, 4), inverse_dynamics=GaussianHead(8, 2))
    rollout = moved(states, pushed, actions)
    before = float(loss_of(InverseDynamicsObjective(), rollout, **cast).total.detach())
    metrics = learned(cast, rollout, 200)
    assert metrics["bonus_encoder+inverse_dynamics/loss"] < before - 1.5
    assert "bonus_encoder+inverse_dynamics/inverse_accuracy" not in metrics


def test_steps_that_are_not_learned_from_do_not_matter() -> None:
    rollout = ring()
    learned_from = rollout.mask.clone()
    learned_from[:, 3:] = learned_from[5] = False
    rollout = rollout.replace(loss_mask=learned_from)
    spoilt = rollout.replace(actions=torch.where(learned_from, rollout.actions, 2))
    torch.manual_seed(0)
    cast = {"bonus_encoder": OneHotTorso(5), "inverse_dynamics": CategoricalHead(10, 3, gain=1.0)}
    a, b = (loss_of(InverseDynamicsObjective(), each, **cast) for each in (rollout, spoilt))
    assert torch.equal(a.total, b.total)
    assert torch.equal(a.metrics["inverse_accuracy"], b.metrics["inverse_accuracy"])


def test_it_passes_the_checks() -> None:
    cast = Cast(bonus_encoder=nn.Sequential(OneHotTorso(5), nn.Linear(5, 4)), inverse_dynamics=CategoricalHead(8, 3))
    assert check(InverseDynamicsObjective(), ring(), cast=cast).messages == []
    paper = InverseDynamicsObjective(aggregate="constant", horizon=1)
    assert check(paper, ring(), cast=cast).messages == []


def test_what_is_missing_is_named() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    bare = Rollout.create(task="walk", group=torch.zeros(1, dtype=torch.int64), mask=mask, actions=mask.long())
    with pytest.raises(
        ValueError, match="InverseDynamicsObjective needs 'observations', which the rollout of task wal"
    ):
        loss_of(InverseDynamicsObjective(), bare)
    with pytest.raises(KeyError, match="has no column 'next_observations'"):
        loss_of(InverseDynamicsObjective(), bare.replace(observations=mask.long()))
    with pytest.raises(KeyError, match="the cast has no member 'bonus_encoder'; it has: policy"):
        loss_of(InverseDynamicsObjective(), ring(), policy=None)
