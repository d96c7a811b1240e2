"""REINFORCE: worked numbers, its gradient, and what it asks for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from regimen.objectives import Batch, ReinforceObjective
from regimen.rollout import Rollout

MASK = torch.tensor([[True, True, False], [True, True, True]])
ADVANTAGES = torch.tensor([[1.0, -2.0, 9.0], [0.5, 0.0, 3.0]])
LOGPROB = torch.tensor([[-1.0, -0.5, -7.0], [-2.0, -3.0, -0.25]])


def batch_of(logprob: Tensor = LOGPROB, **fields: Any) -> Batch:
    settings = {"mask": MASK, "advantages": ADVANTAGES, **fields}
    rollout = Rollout.create(task="walk", group=torch.arange(2), **settings)
    policy = SimpleNamespace(distribution=lambda r, where: SimpleNamespace(logprob=torch.where(where, logprob, 0)))
    return Batch(rollout, {"policy": policy}, {}, torch.Generator())


@pytest.mark.parametrize(("settings", "expected"), [
    ({}, ((1 - 1) / 2 + (1 + 0 + 0.75) / 3) / 2),
    ({"aggregate": "token"}, (1 - 1 + 1 + 0 + 0.75) / 5),
    ({"aggregate": "constant", "horizon": 1}, (1 - 1 + 1 + 0 + 0.75) / 2),
])  # fmt: skip
def test_worked_numbers(settings: dict[str, Any], expected: float) -> None:
    loss = ReinforceObjective(**settings)(batch_of())
    assert float(loss.total) == pytest.approx(expected)
    assert loss.metrics == {}


def test_its_gradient_is_the_advantage() -> None:
    logprob = LOGPROB.clone().requires_grad_()
    ReinforceObjective("constant", 1)(batch_of(logprob)).total.backward()
    assert torch.allclose(logprob.grad, torch.where(MASK, -ADVANTAGES / 2, 0))


def test_steps_that_are_not_learned_from_count_nowhere() -> None:
    strange = torch.where(MASK, ADVANTAGES, torch.nan)
    assert float(ReinforceObjective()(batch_of(advantages=strange)).total) == pytest.approx(1.75 / 6)


def test_it_says_how_far_the_policy_is_from_the_one_that_sampled() -> None:
    behaviour = torch.where(MASK, LOGPROB, 5.0)
    assert float(ReinforceObjective()(batch_of(logprobs=behaviour)).metrics["ratio_deviation"]) == 0
    behaviour[1, 2] -= torch.tensor(1.5).log()
    assert float(ReinforceObjective()(batch_of(logprobs=behaviour)).metrics["ratio_deviation"]) == pytest.approx(0.5)


def test_it_asks_for_advantages() -> None:
    bare = Rollout.create(task="walk", group=torch.arange(2), mask=MASK)
    with pytest.raises(ValueError, match="ReinforceObjective needs 'advantages'.*give the stage a credit"):
        ReinforceObjective()(Batch(bare, {}, {}, torch.Generator()))
