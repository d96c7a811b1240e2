"""Rectified flow against the worked numbers of the Flow-GRPO form (checks 1-4 and 6 of the UniPic2 notes)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from regimen.functions import (
    flow_sde_coefficients,
    flow_sde_step,
    gaussian_kl,
    gaussian_logprob,
    interpolate,
    shifted_sigmas,
    velocity_target,
)

X, V, Z = torch.tensor([[0.5, -1.0]]), torch.tensor([[1.0, -0.5]]), torch.tensor([[0.3, -0.2]])


def one(value: float) -> Tensor:
    return torch.tensor([value])


def step(velocity: Tensor = V, sigma: float = 0.8, after: float = 0.6, level: float = 0.7, sigma_1: float = 0.9):
    return flow_sde_step(X, velocity, one(sigma), one(after), level, sigma_1)


def test_step_and_its_density() -> None:
    mean, std = step()
    torch.testing.assert_close(mean, torch.tensor([[0.1285, -0.6305]]))
    assert float(std) == pytest.approx(0.626099, abs=1e-6)
    after = mean + std * Z
    torch.testing.assert_close(after, torch.tensor([[0.316330, -0.755720]]), atol=1e-6, rtol=0)
    assert float(gaussian_logprob(after, mean, std, "mean")) == pytest.approx(-0.483192, abs=2e-6)
    assert float(gaussian_logprob(after, mean, std, "sum")) == pytest.approx(-0.966384, abs=4e-6)


def test_first_step_replaces_sigma_in_the_denominator_only() -> None:
    mean, std = step(sigma=1.0, after=0.9, sigma_1=0.9)
    torch.testing.assert_close(mean, torch.tensor([[0.2775, -0.705]]))
    assert float(std) == pytest.approx(0.7, abs=1e-6)
    assert float(std) / math.sqrt(0.1) == pytest.approx(2.213594, abs=1e-5)
    assert float(gaussian_logprob(mean + std * Z, mean, std)) == pytest.approx(-0.594764, abs=2e-6)


def test_second_grid_value_matters_at_sigma_1_only() -> None:
    torch.testing.assert_close(step(sigma_1=0.9), step(sigma_1=0.5))


def test_no_noise_is_the_euler_step_and_has_no_density() -> None:
    mean, std = step(level=0.0)
    torch.testing.assert_close(mean, torch.tensor([[0.3, -0.9]]))
    assert float(std) == 0
    with pytest.raises(ValueError, match=r"no noise \(std = 0\).*noise_level > 0"):
        gaussian_logprob(mean, mean, std)


def test_ratio_and_divergence_of_a_changed_velocity() -> None:
    mean, std = step()
    after = mean + std * Z
    moved, _ = step(velocity=torch.tensor([[1.02, -0.5]]))
    torch.testing.assert_close(moved, torch.tensor([[0.12352, -0.6305]]))
    assert float(gaussian_logprob(after, moved, std)) == pytest.approx(-0.484401, abs=2e-6)
    for reduce, ratio in (("mean", 0.998792), ("sum", 0.997585)):
        logs = [gaussian_logprob(after, m, std, reduce) for m in (moved, mean)]
        assert float((logs[0] - logs[1]).exp()) == pytest.approx(ratio, abs=2e-6)
    assert float(gaussian_kl(moved, std, mean, std).mean()) == pytest.approx(1.58166e-5, rel=1e-3)


def test_grid() -> None:
    torch.testing.assert_close(shifted_sigmas(4, 3.0), torch.tensor([1, 0.9, 0.75, 0.5, 0]))
    torch.testing.assert_close(shifted_sigmas(4), torch.tensor([1, 0.75, 0.5, 0.25, 0]))


@given(st.integers(1, 60), st.floats(0.1, 20))
def test_grid_falls_from_one_to_zero(steps: int, shift: float) -> None:
    sigmas = shifted_sigmas(steps, shift)
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert bool((sigmas.diff() < 0).all())


@pytest.mark.parametrize(
    ("shift", "steps", "sde", "ode"),
    [
        (1.0, 200, 0.501028, 0.496309),
        (1.0, 10, 0.479544, 0.430783),
        (3.0, 200, 0.496595, 0.492748),
        (3.0, 10, 0.424358, 0.369692),
    ],
)
def test_marginals_of_the_exact_velocity(shift: float, steps: int, sde: float, ode: float) -> None:
    """Data N(1, .5^2): the sampler is affine, so mean and deviation follow from its coefficients."""
    for level, expected in ((0.7, sde), (0.0, ode)):
        sigmas = shifted_sigmas(steps, shift).double()
        keep, drift, std = flow_sde_coefficients(sigmas[:-1], sigmas[1:], level, float(sigmas[1]))
        mean, variance = 0.0, 1.0
        for t, a, b, s in zip(sigmas[:-1], keep, drift, std, strict=True):
            t = float(t)
            k = (t - 0.25 * (1 - t)) / ((1 - t) ** 2 * 0.25 + t**2)
            # v = k (x - (1 - t)) - 1, so that x' = (a + b k) x - b (k (1 - t) + 1) + s z.
            mean = (float(a) + float(b) * k) * mean - float(b) * (k * (1 - t) + 1)
            variance = (float(a) + float(b) * k) ** 2 * variance + float(s) ** 2
        assert math.sqrt(variance) == pytest.approx(expected, abs=2e-6)
        if shift == 1.0:
            assert mean == pytest.approx(1.0, abs=1e-5)


def test_path_runs_from_data_to_noise(rng: torch.Generator) -> None:
    data, noise = torch.randn(3, 2, 2, generator=rng), torch.randn(3, 2, 2, generator=rng)
    torch.testing.assert_close(interpolate(data, noise, torch.tensor([0.0, 1.0, 0.5]))[0], data[0])
    torch.testing.assert_close(interpolate(data, noise, torch.tensor([0.0, 1.0, 0.5]))[1], noise[1])
    # One exact Euler step along the target velocity leads back to the data.
    x = interpolate(data, noise, torch.full((3,), 0.5))
    torch.testing.assert_close(x - 0.5 * velocity_target(data, noise), data)


def test_density_is_the_normal_one_and_sends_no_gradient_to_the_sample(rng: torch.Generator) -> None:
    x, mean = torch.randn(4, 3, generator=rng).requires_grad_(), torch.randn(4, 3, generator=rng).requires_grad_()
    std = torch.tensor([0.5, 1.0, 2.0, 3.0])[:, None]
    expected = torch.distributions.Normal(mean, std).log_prob(x)
    torch.testing.assert_close(gaussian_logprob(x, mean, std, "sum"), expected.sum(1))
    torch.testing.assert_close(gaussian_logprob(x, mean, std, "mean"), expected.mean(1))
    gaussian_logprob(x, mean, std).sum().backward()
    assert x.grad is None
    assert mean.grad is not None


def test_bad_inputs_are_named() -> None:
    with pytest.raises(ValueError, match="noise_level is -0.1, expected >= 0"):
        flow_sde_coefficients(one(0.8), one(0.6), -0.1, 0.9)
    with pytest.raises(ValueError, match="sigmas must decrease"):
        flow_sde_coefficients(one(0.6), one(0.8), 0.7, 0.9)
    with pytest.raises(ValueError, match="steps=0 and shift=1.0; expected steps >= 1"):
        shifted_sigmas(0)
    with pytest.raises(ValueError, match="shift > 0"):
        shifted_sigmas(4, 0.0)
