"""Kullback-Leibler divergences: exact between Gaussians, and estimated from log-probabilities."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(logprob: Tensor, reference_logprob: Tensor, estimator: KLEstimator = "k3") -> Tensor:
    """Estimate of KL(policy || reference) from samples of the policy (Schulman 2020, "Approximating KL").

    With `r = log p_ref - log p`: k1 is `-r` (unbiased, may be negative), k2 is `r^2 / 2` (biased, its gradient
    is that of the KL), k3 is `exp(r) - 1 - r` (unbiased, never negative).

    Args:
        logprob: the policy's log-probability of each sampled action, any shape.
        reference_logprob: the reference's, same shape.
        estimator: "k1", "k2" or "k3".

    Returns:
        The estimate per element, same shape.

    Raises:
        ValueError: unknown estimator or unequal shapes.
    """
    if logprob.shape != reference_logprob.shape:
        raise ValueError(f"kl_estimate: shapes {list(logprob.shape)} and {list(reference_logprob.shape)} differ")
    log_ratio = reference_logprob - logprob
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    if estimator == "k3":
        return torch.expm1(log_ratio) - log_ratio
    raise ValueError(f"KL estimator '{estimator}' is not one of {', '.join(get_args(KLEstimator))}")


def gaussian_kl(mean: Tensor, std: Tensor, reference_mean: Tensor, reference_std: Tensor) -> Tensor:
    """Exact KL(N(mean, std^2) || N(reference_mean, reference_std^2)) per dimension; arguments broadcast.

    Raises:
        ValueError: a deviation that is not positive.
    """
    if bool((std <= 0).any()) or bool((reference_std <= 0).any()):
        raise ValueError("gaussian_kl: every standard deviation must be positive")
    ratio = (std / reference_std).square()
    return 0.5 * (((mean - reference_mean) / reference_std).square() + ratio - 1 - ratio.log())
