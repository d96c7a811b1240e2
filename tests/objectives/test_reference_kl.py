"""Divergence from a reference: 0 at the reference, worked numbers, estimators against the exact form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from regimen.checkers import assert_ok
from regimen.functions import gaussian_kl
from regimen.knobs import Knob, Knobs
from regimen.objectives import ReferenceKL
from regimen.objectives.base import Batch
from regimen.policies import FlowPolicy
from regimen.rollout import Rollout

Sampled = Callable[..., tuple[FlowPolicy, Rollout]]
ESTIMATORS = ["exact", "flow_grpo", "k1", "k2", "k3"]


def batch_of(rollout: Rollout, policy: Any, reference: Any) -> Batch:
    return Batch(rollout, {"policy": policy, "reference": reference}, {}, torch.Generator())


def drifted(policy: FlowPolicy, size: float) -> FlowPolicy:
    """A frozen neighbour of a policy."""
    reference = policy.reference()
    rng = torch.Generator().manual_seed(5)
    for parameter in reference.parameters():
        parameter += size * torch.randn(parameter.shape, generator=rng)
    return reference


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_is_exactly_zero_at_the_reference(sampled: Sampled, estimator: str, guidance: float) -> None:
    policy, rollout = sampled(knobs={"guidance": guidance})
    loss = ReferenceKL(estimator)(batch_of(rollout, policy, policy.reference())).total
    assert float(loss.detach()) == 0
    if estimator != "k1":
        gradients = torch.autograd.grad(loss, list(policy.parameters()))
        assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


def test_k1_pushes_even_at_the_reference(sampled: Sampled) -> None:
    """Its gradient is `grad log p`, which is 0 in the mean only."""
    policy, rollout = sampled()
    loss = ReferenceKL("k1")(batch_of(rollout, policy, policy.reference())).total
    assert float(torch.autograd.grad(loss, policy.denoiser.out.bias)[0].abs().sum()) > 1e-4


@pytest.mark.parametrize(("estimator", "expected"), [("exact", 1.58166e-5), ("flow_grpo", 3.16332e-6)])
def test_worked_numbers(estimator: str, expected: float) -> None:
    """Velocities (1.02, -.5) and (1, -.5) at (.5, -1), from sigma .8 to .6; official = exact * |dt|."""

    class Constant(torch.nn.Module):
        def __init__(self, first: float) -> None:
            super().__init__()
            self.velocity = torch.nn.Parameter(torch.tensor([first, -0.5]))

        def forward(self, x: Tensor, sigma: Tensor, context: Any) -> Tensor:
            return self.velocity.expand(x.shape)

    rollout = Rollout.create(
        task="policy", group=torch.zeros(1, dtype=torch.int64), mask=torch.ones(1, 1, dtype=torch.bool),
        observations=torch.tensor([[[0.5, -1.0]]]), actions=torch.tensor([[[0.316330, -0.755720]]]),
        columns={"sigmas": torch.tensor([[0.8, 0.6]])}, knobs={"noise_level": 0.7, "guidance": 1.0},
    )  # fmt: skip
    policy, reference = FlowPolicy(Constant(1.02), (2,)), FlowPolicy(Constant(1.0), (2,))
    loss = ReferenceKL(estimator)(batch_of(rollout, policy, reference)).total
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)


def test_exact_is_the_divergence_of_the_gaussians(sampled: Sampled) -> None:
    policy, rollout = sampled(logprob_reduce="sum")
    reference = drifted(policy, 0.05)
    steps, others = (p.distribution(rollout) for p in (policy, reference))
    std = steps.std[:, None, None, None]
    expected = gaussian_kl(steps.mean, std, others.mean, std).sum((1, 2, 3)).view(8, 4)
    torch.testing.assert_close(policy.step_kl(rollout, reference), expected, rtol=1e-4, atol=1e-6)


def test_mean_over_learned_steps_of_the_divergence_times_its_duration(sampled: Sampled) -> None:
    policy, rollout = sampled()
    reference = drifted(policy, 0.05)
    losses = [ReferenceKL(e)(batch_of(rollout, policy, reference)).total for e in ("exact", "flow_grpo")]
    per_step = policy.step_kl(rollout, reference)
    duration = -rollout["sigmas"].diff()
    learned = rollout.loss_mask
    torch.testing.assert_close(losses[0], per_step[learned].mean())
    torch.testing.assert_close(losses[1], (per_step * duration)[learned].mean())


def test_estimators_against_the_exact_divergence(sampled: Sampled) -> None:
    """On samples of the policy k1 and k3 are unbiased and k2 nearly so; k3 has the smaller spread."""
    policy, rollout = sampled(4000, logprob_reduce="sum")
    reference = drifted(policy, 0.03)
    exact = policy.step_kl(rollout, reference).detach()
    gap = {
        "k1": rollout.logprobs - reference.logprob(rollout),
        "k2": (rollout.logprobs - reference.logprob(rollout)).square() / 2,
    }
    gap["k3"] = (-gap["k1"]).expm1() + gap["k1"]
    batch = batch_of(rollout.replace(loss_mask=rollout.mask), policy, reference)
    for name in ("k1", "k3"):
        error = (gap[name] - exact).mean(1)
        assert float(error.mean()) == pytest.approx(0, abs=4 * float(error.std()) / math.sqrt(len(error)))
    assert float(gap["k2"].mean()) == pytest.approx(float(exact.mean()), rel=0.1)
    assert float(gap["k3"].std()) < float(gap["k1"].std())
    for name, expected in {**gap, "exact": exact}.items():
        loss = ReferenceKL(name)(batch).total.detach()
        torch.testing.assert_close(loss, expected.mean(), rtol=1e-3, atol=1e-6)


def test_no_gradient_reaches_the_reference(sampled: Sampled, tiny_policy: Callable[..., FlowPolicy]) -> None:
    policy, rollout = sampled()
    unfrozen = tiny_policy(seed=2)
    batch = batch_of(rollout, policy, drifted(policy, 0.05))
    ReferenceKL("exact")(batch).total.backward()
    assert not batch.distribution("reference").logprob.requires_grad
    batch = batch_of(rollout, policy, unfrozen)
    ReferenceKL("k3")(batch).total.backward()
    assert all(p.grad is None for p in unfrozen.parameters())


@pytest.mark.parametrize("estimator", ["exact", "flow_grpo", "k2", "k3"])
def test_descending_it_leads_back_to_the_reference(sampled: Sampled, estimator: str) -> None:
    policy, rollout = sampled(512, logprob_reduce="sum")
    reference = policy.reference()
    with torch.no_grad():
        policy.denoiser.out.bias += 0.3
    optimizer = torch.optim.Adam(policy.parameters(), 0.01)
    divergences = []
    for _ in range(30):
        divergences.append(float(policy.step_kl(rollout, reference).detach().mean()))
        optimizer.zero_grad()
        ReferenceKL(estimator)(batch_of(rollout, policy, reference)).total.backward()
        optimizer.step()
    assert divergences[-1] < 0.6 * divergences[0]


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_importance_weighted_gradient_is_that_of_the_divergence(sampled: Sampled, estimator: str) -> None:
    """On the samples of another policy; the gradient of plain k3 is another one."""
    policy, rollout = sampled(50_000, knobs={"sampling_steps": 2}, logprob_reduce="sum")
    reference = drifted(policy, 0.1)
    with torch.no_grad():
        policy.denoiser.out.bias += torch.tensor([0.3, -0.3, 0.0, 0.2])

    def gradient(objective: ReferenceKL) -> Tensor:
        loss = objective(batch_of(rollout, policy, reference)).total
        return torch.autograd.grad(loss, policy.denoiser.out.bias)[0]

    exact = gradient(ReferenceKL("exact"))
    found = gradient(ReferenceKL(estimator, importance_weighted=True))
    assert float((found - exact).norm()) < 0.05 * float(exact.norm())
    assert float((gradient(ReferenceKL(estimator)) - exact).norm()) > 0.1 * float(exact.norm())


def test_its_weight_is_a_knob(sampled: Sampled) -> None:
    policy, rollout = sampled()
    objective = Knob("kl_weight", 0.04) * ReferenceKL("exact")
    batch = batch_of(rollout, policy, drifted(policy, 0.05))
    batch.knobs = Knobs.of(objective)
    loss = objective(batch)
    torch.testing.assert_close(loss.total, 0.04 * loss.components["kl"])
    batch.knobs = Knobs.of(objective, kl_weight=2.0)
    torch.testing.assert_close(objective(batch).total, 2 * loss.components["kl"])


def test_passes_the_checker_for_objectives() -> None:
    assert_ok(ReferenceKL("k3"))


def test_bad_inputs_are_named(sampled: Sampled) -> None:
    policy, rollout = sampled()
    with pytest.raises(ValueError, match=r"needs the member 'reference'.*it has: policy.*rules=\[ReferenceRefresh"):
        ReferenceKL()(Batch(rollout, {"policy": policy}, {}, torch.Generator()))
    with pytest.raises(ValueError, match="'k4' is not known to a flow policy; expected exact or flow_grpo"):
        ReferenceKL("k4")(batch_of(rollout, policy, policy.reference()))
    with pytest.raises(ValueError, match="'exact' is no estimate from samples.*or importance_weighted=False"):
        ReferenceKL("exact", importance_weighted=True)
