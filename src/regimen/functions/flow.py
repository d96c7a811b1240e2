"""Rectified flow: the path between data and noise, its sampling grid, and its stochastic sampler.

Time is `sigma`, from 1 (noise) to 0 (data); a network predicts the velocity `v ~ noise - data`. A sigma is one
number per sample, `[B]`, and broadcasts over the sample's own dimensions.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Reduce = Literal["mean", "sum"]


def expand_as(per_sample: Tensor, like: Tensor) -> Tensor:
    """`[B]` viewed as `[B, 1, ...]` to broadcast against `like`; a single number is left alone."""
    return per_sample.view(-1, *[1] * (like.ndim - 1)) if per_sample.ndim == 1 else per_sample


def interpolate(data: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The point of the straight path, `x = (1 - sigma) data + sigma noise` (Liu et al. 2023, eq. 1)."""
    sigma = expand_as(sigma, data)
    return (1 - sigma) * data + sigma * noise


def velocity_target(data: Tensor, noise: Tensor) -> Tensor:
    """The velocity of the straight path, `noise - data`, that flow matching regresses on."""
    return noise - data


def predicted_data(x: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """The clean sample `x - sigma v` where the straight path through states `x [B, ...]` at times `sigma [B]` ends."""
    return x - expand_as(sigma, x) * velocity


def shifted_sigmas(steps: int, shift: float = 1.0) -> Tensor:
    """Sampling grid `[steps + 1]` from 1 to 0, with `u = 1 - i / steps` and `s u / (1 + (s - 1) u)`.

    A shift above 1 spends more steps near the noise (Esser et al. 2024, eq. 23; 3 for Stable Diffusion 3).

    Raises:
        ValueError: fewer than one step, or a shift that is not positive.
    """
    if steps < 1 or shift <= 0:
        raise ValueError(f"shifted_sigmas: steps={steps} and shift={shift}; expected steps >= 1 and shift > 0")
    u = 1 - torch.arange(steps + 1, dtype=torch.float64) / steps
    return (shift * u / (1 + (shift - 1) * u)).float()


def flow_sde_coefficients(
    sigma: Tensor, sigma_next: Tensor, noise_level: Tensor | float, sigma_1: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients `(keep, drift, std)` of one stochastic step: `x' = keep x + drift v + std z`.

    With `s = noise_level sqrt(sigma / (1 - sigma))` and `dt = sigma_next - sigma < 0` (Flow-GRPO, Liu et al.
    2025, eq. 9): `keep = 1 + s^2 dt / (2 sigma)`, `drift = (1 + s^2 (1 - sigma) / (2 sigma)) dt`,
    `std = s sqrt(-dt)`. Every noise level has the marginals of the ODE; level 0 is its Euler step, exactly.

    Args:
        sigma: current times, any shape, in (0, 1].
        sigma_next: next times, smaller.
        noise_level: `a` of the paper, at least 0; broadcasts.
        sigma_1: second value of the sampling grid; it replaces sigma inside `1 - sigma` where sigma is 1, and
            nowhere else; broadcasts.

    Raises:
        ValueError: a negative noise level, or times that do not decrease.
    """
    if bool((torch.as_tensor(noise_level) < 0).any()):
        lowest = float(torch.as_tensor(noise_level).min())
        raise ValueError(f"flow_sde_coefficients: noise_level is {lowest:g}, expected >= 0")
    if bool((sigma_next >= sigma).any()):
        raise ValueError("flow_sde_coefficients: sigmas must decrease from step to step")
    one_minus = 1 - torch.where(sigma >= 1, torch.as_tensor(sigma_1, dtype=sigma.dtype), sigma)
    variance_rate = noise_level**2 * sigma / one_minus
    dt = sigma_next - sigma
    half = variance_rate / (2 * sigma)
    return 1 + half * dt, (1 + half * (1 - sigma)) * dt, (variance_rate * -dt).sqrt()


def flow_sde_step(
    x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, noise_level: float, sigma_1: float
) -> tuple[Tensor, Tensor]:
    """Mean (shape of `x`) and deviation (`[B, 1, ...]`) of one stochastic step from states `x [B, ...]`.

    `sigma` and `sigma_next` are `[B]`; see `flow_sde_coefficients` for the formula and the errors.
    """
    keep, drift, std = flow_sde_coefficients(sigma, sigma_next, noise_level, sigma_1)
    return expand_as(keep, x) * x + expand_as(drift, x) * velocity, expand_as(std, x)


def gaussian_logprob(x: Tensor, mean: Tensor, std: Tensor, reduce: Reduce = "mean") -> Tensor:
    """Log-density of `x [B, ...]` under N(mean, std^2), reduced over all dimensions but the first: `[B]`.

    `"sum"` is the true log-density; `"mean"` divides it by the number of dimensions (Flow-GRPO's convention,
    which makes a clip range of 1e-4 sensible for large images). `x` carries no gradient.

    Raises:
        ValueError: a deviation that is not positive (a deterministic step has no density).
    """
    if bool((std <= 0).any()):
        raise ValueError(
            "gaussian_logprob: the step has no noise (std = 0), so it has no log-probability; "
            "sample with noise_level > 0, or use an objective that needs none"
        )
    logp = -((x.detach() - mean) / std).square() / 2 - std.log() - 0.5 * math.log(2 * math.pi)
    flat = logp.expand_as(x).flatten(1)
    return flat.mean(1) if reduce == "mean" else flat.sum(1)
