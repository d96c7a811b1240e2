"""Supervised likelihood: worked values, sample weights, a known optimum, and a flow policy."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regimen.checkers import assert_ok
from regimen.objectives import SFTObjective
from regimen.objectives.base import Batch
from regimen.policies import FlowPolicy
from regimen.rollout import Rollout

MASK = torch.tensor([[True, True, True, True], [True, False, False, False]])


class Writer(nn.Module):
    """One distribution over words, the same at every step."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def distribution(self, rollout: Rollout, where: Tensor) -> Any:
        logprob = self.logits.log_softmax(0)[rollout.actions]
        return SimpleNamespace(logprob=torch.where(where, logprob, 0))


def text(actions: Tensor, mask: Tensor | None = None, **columns: Tensor) -> Rollout:
    mask = torch.ones_like(actions, dtype=torch.bool) if mask is None else mask
    return Rollout.create(task="t", group=torch.arange(len(mask)), mask=mask, actions=actions, columns=columns)


def loss_of(objective: SFTObjective, rollout: Rollout, policy: Any) -> Tensor:
    return objective(Batch(rollout, {"policy": policy}, {}, torch.Generator())).total


@pytest.mark.parametrize(("aggregate", "expected"), [
    ("token", (4 * math.log(4) + math.log(4 / 3)) / 5), ("sequence", (math.log(4) + math.log(4 / 3)) / 2),
    ("constant", (4 * math.log(4) + math.log(4 / 3)) / 8),
])  # fmt: skip
def test_worked_values(aggregate: Any, expected: float) -> None:
    """Words of probability 1/4 (four steps) and 3/4 (one step)."""
    rollout = text(torch.tensor([[0] * 4, [1] * 4]), MASK)
    found = loss_of(SFTObjective(aggregate), rollout, Writer(0.0, math.log(3)))
    assert float(found.detach()) == pytest.approx(expected)


def test_sample_weights_multiply_a_samples_loss() -> None:
    actions, policy = torch.tensor([[0] * 4, [1] * 4]), Writer(0.0, math.log(3))
    rollout = text(actions, MASK, confidence=torch.tensor([0.5, 2.0]))
    found = loss_of(SFTObjective("token", weight="confidence"), rollout, policy)
    assert float(found.detach()) == pytest.approx((0.5 * 4 * math.log(4) + 2 * math.log(4 / 3)) / 5)


def test_sample_of_weight_zero_has_no_gradient() -> None:
    policy = Writer(0.0, 0.0, 0.0)
    rollout = text(torch.tensor([[0], [1]]), keep=torch.tensor([1.0, 0.0]))
    loss_of(SFTObjective(weight="keep"), rollout, policy).backward()
    # d(-log p_0 / 2) / d logits = (p - onehot_0) / 2
    torch.testing.assert_close(policy.logits.grad, torch.tensor([-1 / 3, 1 / 6, 1 / 6]))


@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
def test_slices_sum_to_the_whole(aggregate: Any) -> None:
    policy = Writer(0.2, -0.4)
    rollout = text(torch.tensor([[0] * 4, [1] * 4]), MASK, w=torch.tensor([0.5, 2.0]))
    objective = SFTObjective(aggregate, weight="w")
    parts = [
        objective(Batch(rollout[rows], {"policy": policy}, {}, torch.Generator(), rollout, rows)).total
        for rows in (slice(0, 1), slice(1, 2))
    ]
    torch.testing.assert_close(parts[0] + parts[1], loss_of(objective, rollout, policy))


def test_learns_the_weighted_frequencies() -> None:
    """Words 0, 1, 2 with total weights 6, 3, 1: the optimum is .6, .3, .1."""
    policy = Writer(0.0, 0.0, 0.0)
    actions, weights = torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([4.0, 2.0, 1.0, 1.0, 1.0, 1.0])
    rollout = text(actions[:, None], w=weights)
    optimizer = torch.optim.Adam(policy.parameters(), 0.1)
    for _ in range(200):
        optimizer.zero_grad()
        loss_of(SFTObjective(weight="w"), rollout, policy).backward()
        optimizer.step()
    torch.testing.assert_close(policy.logits.detach().softmax(0), torch.tensor([0.6, 0.3, 0.1]), atol=0.01, rtol=0)


def test_serves_a_flow_policy_too(sampled: Callable[..., tuple[FlowPolicy, Rollout]]) -> None:
    """Cloning a neighbour's denoising steps leads towards it."""
    policy, _ = sampled(logprob_reduce="sum")
    other, rollout = sampled(1000, seed=3, logprob_reduce="sum")
    rollout = rollout.replace(loss_mask=rollout.mask)
    before = policy.step_kl(rollout, other).detach().mean()
    optimizer = torch.optim.Adam(policy.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        loss_of(SFTObjective(), rollout, policy).backward()
        optimizer.step()
    assert float(policy.step_kl(rollout, other).detach().mean()) < 0.5 * float(before)


def test_passes_the_checker_for_objectives() -> None:
    assert_ok(SFTObjective())


def test_bad_inputs_are_named() -> None:
    rollout = text(torch.tensor([[0]]), confidence=torch.ones(1))
    with pytest.raises(KeyError, match="no column 'weight'; it has: confidence"):
        loss_of(SFTObjective(weight="weight"), rollout, Writer(0.0))
    with pytest.raises(ValueError, match="aggregate 'mean' is not one of"):
        loss_of(SFTObjective("mean"), rollout, Writer(0.0))  # type: ignore[arg-type]
