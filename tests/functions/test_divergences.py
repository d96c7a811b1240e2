"""Divergences: estimators against the exact value, and limiting cases."""

from __future__ import annotations

import math

import pytest
import torch

from regimen.functions import gaussian_kl, kl_estimate


def samples(count: int = 200_000) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Log-probabilities of a policy N(0, 1) and of a reference N(.5, 1.2^2), and their exact KL."""
    policy, reference = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(0.5, 1.2)
    x = torch.randn(count, generator=torch.Generator().manual_seed(0))
    exact = float(torch.distributions.kl_divergence(policy, reference))
    return policy.log_prob(x), reference.log_prob(x), exact


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_unbiased_estimators(estimator: str) -> None:
    logprob, reference, exact = samples()
    estimates = kl_estimate(logprob, reference, estimator)
    error = float(estimates.std()) / math.sqrt(len(estimates))
    assert float(estimates.mean()) == pytest.approx(exact, abs=4 * error)


def test_k3_is_never_negative_as_k1_may_be() -> None:
    logprob, reference, _ = samples()
    assert float(kl_estimate(logprob, reference, "k3").min()) >= 0
    assert float(kl_estimate(logprob, reference, "k1").min()) < 0


def test_worked_values() -> None:
    logprob, reference = torch.tensor([-1.0]), torch.tensor([-1.2])
    assert float(kl_estimate(logprob, reference, "k1")) == pytest.approx(0.2)
    assert float(kl_estimate(logprob, reference, "k2")) == pytest.approx(0.02)
    assert float(kl_estimate(logprob, reference, "k3")) == pytest.approx(math.exp(-0.2) - 1 + 0.2)


def test_gradient_of_k2_is_that_of_the_divergence() -> None:
    """On samples of the policy itself, E grad k2 = grad KL(N(m, 1) || N(0, 1)) = m."""
    mean = torch.tensor(0.3, requires_grad=True)
    noise = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    x = (mean + noise).detach()
    logprob, reference = -((x - mean) ** 2) / 2, -(x**2) / 2
    kl_estimate(logprob, reference, "k2").mean().backward()
    assert float(mean.grad) == pytest.approx(0.3, abs=0.01)


def test_gaussian_kl_is_torchs(rng: torch.Generator) -> None:
    mean, other = torch.randn(5, generator=rng), torch.randn(5, generator=rng)
    std, other_std = torch.rand(5, generator=rng) + 0.1, torch.rand(5, generator=rng) + 0.1
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std), normal(other, other_std))
    torch.testing.assert_close(gaussian_kl(mean, std, other, other_std), expected, rtol=1e-4, atol=1e-5)
    assert float(gaussian_kl(mean, std, mean, std).abs().max()) == 0


def test_bad_inputs_are_named() -> None:
    with pytest.raises(ValueError, match="'k4' is not one of k1, k2, k3"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shapes \[1\] and \[2\] differ"):
        kl_estimate(torch.zeros(1), torch.zeros(2))
    with pytest.raises(ValueError, match="must be positive"):
        gaussian_kl(torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.ones(1))
