"""Flow matching: a known optimum, its gradient, noise levels, condition dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from regimen.checkers import assert_ok
from regimen.objectives import FlowMatchingObjective
from regimen.objectives.base import Batch
from regimen.objectives.flow_matching import logit_normal
from regimen.policies import FlowPolicy
from regimen.rollout import Rollout


class Affine(nn.Module):
    """v = slope x + offset."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.offset = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, sigma: Tensor, context: Any) -> Tensor:
        return self.slope * x + self.offset


def halfway(count: int, rng: torch.Generator) -> Tensor:
    return torch.full((count,), 0.5)


def data(images: Tensor, **fields: Any) -> Rollout:
    count = len(images)
    return Rollout.create(
        task="data", group=torch.arange(count), mask=torch.ones(count, 1, dtype=torch.bool), columns={"image": images},
        **fields,
    )  # fmt: skip


def batch_of(policy: FlowPolicy, rollout: Rollout, seed: int = 0, **options: Any) -> Batch:
    return Batch(rollout, {"policy": policy}, {}, torch.Generator().manual_seed(seed), **options)


def test_learns_the_known_optimum_in_one_dimension(rng: torch.Generator) -> None:
    """Data N(1, .5^2) at sigma .5: v = k (x - .5) - 1 with k = (.5 - .125) / (.0625 + .25) = 1.2."""
    policy = FlowPolicy(Affine(), (1,))
    objective = FlowMatchingObjective(times=halfway)
    optimizer = torch.optim.Adam(policy.parameters(), 0.1)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 200)
        batch = batch_of(policy, data(1 + 0.5 * torch.randn(2000, 1, generator=rng)), seed=step)
        optimizer.zero_grad()
        loss = objective(batch).total
        loss.backward()
        optimizer.step()
    assert float(policy.denoiser.slope.detach()) == pytest.approx(1.2, abs=0.03)
    assert float(policy.denoiser.offset.detach()) == pytest.approx(-1.6, abs=0.03)
    # What remains is the variance of the target given x: 1.25 - 1.2^2 (.0625 + .25).
    assert float(loss.detach()) == pytest.approx(0.8, abs=0.08)


def test_is_a_mean_over_samples_and_dimensions() -> None:
    """A zero velocity on far data: the loss is the data's mean square."""
    policy = FlowPolicy(Affine(), (2,))
    images = torch.tensor([[1000.0, 2000.0], [3000.0, 0.0]])
    assert float(FlowMatchingObjective()(batch_of(policy, data(images))).total.detach()) == pytest.approx(
        3.5e6, rel=0.01
    )


def test_slices_sum_to_the_whole() -> None:
    policy, images = FlowPolicy(Affine(), (1,)), 1000.0 * torch.arange(1.0, 6.0)[:, None]
    whole = data(images)
    total = 0.0
    for rows in (slice(0, 2), slice(2, 4), slice(4, 6)):
        batch = batch_of(policy, whole[rows], whole=whole, rows=rows)
        total += float(FlowMatchingObjective()(batch).total.detach())
    assert total == pytest.approx(float(images.square().mean()), rel=0.01)


def test_gradient_against_finite_differences(tiny_policy: Callable[..., FlowPolicy], rng: torch.Generator) -> None:
    policy = tiny_policy()
    rollout = data(torch.randn(6, 1, 2, 2, generator=rng), context={"condition": torch.arange(6) % 2})
    parameters = list(policy.parameters())
    gradient = torch.autograd.grad(FlowMatchingObjective()(batch_of(policy, rollout)).total, parameters)
    directions = [torch.randn(p.shape, generator=rng) for p in parameters]
    values = []
    for size in (1e-2, -2e-2):
        for parameter, direction in zip(parameters, directions, strict=True):
            parameter.data.add_(direction, alpha=size)
        values.append(float(FlowMatchingObjective()(batch_of(policy, rollout)).total.detach()))
    expected = sum(float((g * d).sum()) for g, d in zip(gradient, directions, strict=True))
    assert (values[0] - values[1]) / 2e-2 == pytest.approx(expected, rel=2e-2)


def test_noise_levels_are_logit_normal() -> None:
    times = logit_normal(100_000, torch.Generator().manual_seed(0))
    assert 0 < float(times.min()) < float(times.max()) < 1
    logits = times.logit()
    assert float(logits.mean()) == pytest.approx(0, abs=0.02)
    assert float(logits.std()) == pytest.approx(1, abs=0.02)


def test_draws_from_the_given_generator_alone(tiny_policy: Callable[..., FlowPolicy]) -> None:
    policy = tiny_policy()
    rollout = data(torch.zeros(6, 1, 2, 2), context={"condition": torch.arange(6) % 2})
    losses = [float(FlowMatchingObjective()(batch_of(policy, rollout, s)).total.detach()) for s in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(("dropout", "trained"), [(0.0, [True, True, False]), (1.0, [False, False, True])])
def test_condition_dropout_trains_the_null_condition(
    tiny_policy: Callable[..., FlowPolicy], dropout: float, trained: list[bool]
) -> None:
    policy = tiny_policy()
    rollout = data(torch.zeros(6, 1, 2, 2), context={"condition": torch.arange(6) % 2})
    FlowMatchingObjective(condition_dropout=dropout)(batch_of(policy, rollout)).total.backward()
    assert (policy.denoiser.condition.weight.grad.abs().sum(1) > 0).tolist() == trained


def test_condition_dropout_keeps_the_reference_image(tiny_policy: Callable[..., FlowPolicy]) -> None:
    seen: list[Any] = []
    policy = tiny_policy()
    policy.denoiser.register_forward_pre_hook(lambda _module, args: seen.append(args[2]))
    reference = torch.rand(200, 1, 2, 2)
    context = TensorDict({"condition": torch.zeros(200, dtype=torch.int64), "reference": reference}, batch_size=[200])
    rollout = data(torch.zeros(200, 1, 2, 2), context=context)
    FlowMatchingObjective(condition_dropout=0.3)(batch_of(policy, rollout))
    assert torch.equal(seen[0]["reference"], reference)
    assert float((seen[0]["condition"] == 2).float().mean()) == pytest.approx(0.3, abs=0.1)
    assert set(seen[0]["condition"].tolist()) == {0, 2}


def test_passes_the_checker_for_objectives(tiny_policy: Callable[..., FlowPolicy]) -> None:
    context = TensorDict({"condition": torch.arange(6) % 2}, batch_size=[6])
    assert_ok(FlowMatchingObjective(), data(torch.zeros(6, 1, 2, 2), context=context), cast={"policy": tiny_policy()})


def test_bad_inputs_are_named(tiny_policy: Callable[..., FlowPolicy]) -> None:
    with pytest.raises(ValueError, match=r"condition_dropout=1.5, expected in \[0, 1\]"):
        FlowMatchingObjective(condition_dropout=1.5)
    rollout = data(torch.zeros(2, 1, 2, 2), context={"condition": torch.zeros(2, dtype=torch.int64)})
    with pytest.raises(KeyError, match="task data has no column 'latents'; it has: image"):
        FlowMatchingObjective(column="latents")(batch_of(tiny_policy(), rollout))
    with pytest.raises(KeyError, match="no member 'student'; it has: policy"):
        FlowMatchingObjective(member="student")(batch_of(tiny_policy(), rollout))
