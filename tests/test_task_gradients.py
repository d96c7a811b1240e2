"""Updates that put the gradients of tasks together: PCGrad on an objective, on a flow policy, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from regimen.cast import Cast
from regimen.functions.gradients import pcgrad
from regimen.learn import Learned, Learner
from regimen.memory import NewestRollout
from regimen.objectives import ClippedSurrogateObjective
from regimen.objectives.base import Batch, Objective
from regimen.policies import FlowPolicy
from regimen.rollout import Rollout
from regimen.update import Epochs, Update


class Pull(Objective):
    """The mean of `pull [B, P]` times the weights `[P]`: its gradient is the mean pull."""

    name = "pull"

    def loss(self, batch: Batch) -> Tensor:
        return (batch.rollout["pull"] @ batch.member("policy").weight).mean() * batch.share


class Still(Objective):
    """Depends on nothing."""

    def loss(self, batch: Batch) -> Tensor:
        return batch.rollout["pull"].mean()


class Vector(nn.Module):
    """Two weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))


def pulled(**tasks: list[tuple[float, float]]) -> Rollout:
    return Rollout.cat([of_task(name, torch.tensor(rows)) for name, rows in tasks.items()])


def of_task(name: str, pulls: Tensor) -> Rollout:
    mask = torch.ones(len(pulls), 1, dtype=torch.bool)
    return Rollout.create(task=name, group=torch.zeros(len(pulls)).long(), mask=mask, columns={"pull": pulls})


def learned(rollout: Rollout, objective: Objective, member: nn.Module, update: Callable[..., Update]) -> Learned:
    memory = NewestRollout()
    memory.add(rollout)
    cast = Cast(policy=member)
    cast.train_only(["policy"])
    found = Learner(update(objective), cast).learn(memory, cast, {}, torch.Generator().manual_seed(0))
    return found


def plain(objective: Objective) -> Update:
    return Update(objective, learning_rate=1.0, optimizer=torch.optim.SGD, max_grad_norm=None)


def projecting(objective: Objective) -> Update:
    return Update(objective, learning_rate=1.0, optimizer=torch.optim.SGD, max_grad_norm=None, gradients=pcgrad)


def test_conflicting_tasks_are_projected() -> None:
    """The worked example, halved by the tasks' shares."""
    member = Vector()
    found = learned(pulled(one=[(1.0, 0.0)], other=[(-1.0, 1.0)]), Pull(), member, projecting)
    assert torch.allclose(member.weight, -torch.tensor([0.25, 0.75]))
    assert found.metrics["policy/gradient_conflict"] == 1.0
    assert found.metrics["policy/loss/pull"] == found.metrics["policy/loss"] == 0.0


def test_tasks_that_agree_move_the_weights_as_one_loss_does() -> None:
    rollout = pulled(one=[(1.0, 0.0), (3.0, 1.0)], other=[(0.5, 2.0)], third=[(0.0, 1.0), (1.0, 1.0), (2.0, 0.0)])
    member, other = Vector(), Vector()
    found = learned(rollout, Pull(), member, projecting)
    learned(rollout, Pull(), other, plain)
    assert torch.allclose(member.weight, other.weight)
    assert found.metrics["policy/gradient_conflict"] == 0.0


def test_a_minibatch_of_one_task_is_learned_from_as_it_is() -> None:
    member = Vector()
    rollout = pulled(one=[(1.0, 2.0)], other=[(-1.0, 1.0)])
    learned(rollout[torch.tensor([0])], Pull(), member, projecting)
    assert torch.equal(member.weight, -torch.tensor([1.0, 2.0]))


def test_it_serves_a_flow_policy(sampled: Callable[..., tuple[FlowPolicy, Rollout]]) -> None:
    """Two tasks with the same samples: the same step as without."""
    policy, rollout = sampled(4)
    rollout = rollout[torch.tensor([0, 1, 0, 1])]
    halves = rollout.replace(advantages=torch.ones(rollout.mask.shape), task=torch.tensor([0, 0, 1, 1]))
    both = Rollout(halves.data, ("first", "second"))
    objective, twin = ClippedSurrogateObjective(), copy.deepcopy(policy)
    learned(both, objective, policy, projecting)
    learned(both, objective, twin, plain)
    moved = [torch.allclose(a, b, atol=1e-6) for a, b in zip(policy.parameters(), twin.parameters(), strict=True)]
    assert all(moved)


def test_a_loss_that_reaches_no_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match="the loss does not depend on any trainable parameter of policy"):
        learned(pulled(one=[(1.0, 0.0)]), Still(), Vector(), projecting)


def test_micro_batches_beside_it_are_refused() -> None:
    with pytest.raises(ValueError, match="micro_batch=2 beside gradients"):
        Update(Pull(), micro_batch=2, gradients=pcgrad, batches=Epochs())
