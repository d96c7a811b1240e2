"""The entropy bonus."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical

from regimen.knobs import Knobs
from regimen.objectives.base import Batch
from regimen.objectives.entropy import EntropyBonus
from regimen.rollout import Rollout

MASK = torch.tensor([[True, True, False], [True, False, False]])


def batch_of(logits: Tensor, mask: Tensor = MASK) -> Batch:
    steps = SimpleNamespace(entropy=Categorical(logits=logits).entropy)
    policy = SimpleNamespace(distribution=lambda rollout, where: steps)
    rollout = Rollout.create(task="t", group=torch.arange(2), mask=mask)
    return Batch(rollout, {"policy": policy}, {}, torch.Generator())


def test_uniform_is_the_logarithm_of_the_number_of_actions() -> None:
    assert float(EntropyBonus()(batch_of(torch.zeros(2, 3, 7))).total) == pytest.approx(math.log(7))


def test_mean_over_steps_or_over_samples() -> None:
    logits = torch.zeros(2, 3, 2)
    logits[1, :, 1] = -torch.inf
    assert float(EntropyBonus()(batch_of(logits)).total) == pytest.approx(2 / 3 * math.log(2))
    assert float(EntropyBonus(aggregate="sequence")(batch_of(logits)).total) == pytest.approx(math.log(2) / 2)


def test_subtracting_it_spreads_the_policy() -> None:
    """Against finite differences, and no gradient reaches steps that are left out."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, generator=rng, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: EntropyBonus()(batch_of(x)).total, logits)
    objective = -0.01 * EntropyBonus()
    batch = batch_of(logits)
    batch.knobs = Knobs.of(objective)
    objective(batch).total.backward()
    assert logits.grad is not None
    assert (logits.grad[~MASK] == 0).all()
    stepped = logits.detach() - logits.grad
    assert (Categorical(logits=stepped).entropy() > Categorical(logits=logits.detach()).entropy())[MASK].all()
