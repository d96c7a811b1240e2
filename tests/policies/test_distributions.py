"""Distributions over actions, against torch's own, finite differences and their limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, distributions

from regimen.functions.categorical import sample_tokens
from regimen.policies.distributions import Categorical, Gaussian, SquashedGaussian

LOW, HIGH = torch.tensor([-1.0, -2.0, 0.0]), torch.tensor([1.0, 2.0, 5.0])


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def categorical(seed: int = 0) -> tuple[Categorical, distributions.Categorical]:
    logits = 2 * drawn(seed, 7, 4)
    return Categorical(logits), distributions.Categorical(logits=logits)


def gaussian(seed: int = 0) -> tuple[Gaussian, distributions.Independent]:
    mean, std = drawn(seed, 7, 3), drawn(seed + 1, 7, 3).exp()
    return Gaussian(mean, std), distributions.Independent(distributions.Normal(mean, std), 1)


def squashed(seed: int = 0) -> tuple[SquashedGaussian, distributions.Distribution]:
    mean, std = drawn(seed, 7, 3) / 2, (drawn(seed + 1, 7, 3) / 4).exp() / 2
    low, high = LOW.double(), HIGH.double()
    transforms = [
        distributions.transforms.TanhTransform(),
        distributions.transforms.AffineTransform((low + high) / 2, (high - low) / 2),
    ]
    normal = distributions.Normal(mean, std)
    torchs = distributions.Independent(distributions.TransformedDistribution(normal, transforms), 1)
    return SquashedGaussian(mean, std, low, high), torchs


def test_log_probabilities_are_torchs() -> None:
    for mine, torchs in (categorical(), gaussian(), squashed()):
        actions = mine.sample(torch.Generator().manual_seed(0))
        assert torch.allclose(mine.logprob(actions), torchs.log_prob(actions), atol=1e-6)


def test_entropies_are_torchs() -> None:
    for mine, torchs in (categorical(), gaussian()):
        assert torch.allclose(mine.entropy(), torchs.entropy())


def test_divergences_are_torchs() -> None:
    for make in (categorical, gaussian):
        (p, torch_p), (q, torch_q) = make(0), make(5)
        assert torch.allclose(p.kl(q), distributions.kl_divergence(torch_p, torch_q))
        assert torch.equal(p.kl(p), torch.zeros(7, dtype=torch.float64))


def test_squashing_changes_no_divergence() -> None:
    """Estimated from samples, as torch has no formula either."""
    (p, _), (q, _) = squashed(0), squashed(5)
    rng = torch.Generator().manual_seed(0)
    samples = [p.sample(rng) for _ in range(4000)]
    estimate = torch.stack([p.logprob(x) - q.logprob(x) for x in samples])
    error = estimate.std(0) / 4000**0.5
    assert ((estimate.mean(0) - p.kl(q)).abs() < 4 * error).all()


def test_samples_have_the_moments_of_their_distribution() -> None:
    rng, mean, std = torch.Generator().manual_seed(0), torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 2.0]])
    actions = Gaussian(mean.expand(20000, 2), std.expand(20000, 2)).sample(rng)
    assert torch.allclose(actions.mean(0), mean[0], atol=0.05)
    assert torch.allclose(actions.std(0), std[0], atol=0.05)
    chosen = Categorical(torch.tensor([[0.1, 0.2, 0.7]]).log().expand(20000, 3)).sample(rng)
    assert (chosen.bincount() / 20000).tolist() == pytest.approx([0.1, 0.2, 0.7], abs=0.01)


def test_the_density_in_a_box_adds_up_to_1() -> None:
    box = SquashedGaussian(torch.tensor([[0.4]]), torch.tensor([[0.8]]), torch.tensor([-1.0]), torch.tensor([3.0]))
    grid = torch.linspace(-1, 3, 40001)[1:-1, None]
    density = SquashedGaussian(
        box.mean.expand(len(grid), 1), box.std.expand(len(grid), 1), box.low, box.high
    ).logprob(grid).exp()  # fmt: skip
    assert float(density.sum()) * 4 / 40000 == pytest.approx(1, abs=1e-3)


def test_squashed_actions_stay_in_their_box_and_score_the_same_again() -> None:
    """Even where the squashing is flat: far out, in single precision."""
    mean, std = torch.full((1000, 3), 4.0), torch.full((1000, 3), 3.0)
    box = SquashedGaussian(mean, std, LOW, HIGH)
    actions = box.sample(torch.Generator().manual_seed(0))
    assert ((actions >= LOW) & (actions <= HIGH)).all()
    assert (actions == HIGH).any()
    assert box.logprob(actions).isfinite().all()
    middle, edge = box.mode()[:1], HIGH[None]
    assert torch.allclose(middle, (LOW + HIGH) / 2 + (HIGH - LOW) / 2 * math.tanh(4))
    assert torch.equal(
        SquashedGaussian(mean[:1], std[:1], LOW, HIGH).logprob(edge),
        SquashedGaussian(mean[:1], std[:1], LOW, HIGH).logprob(edge + 1),
    )


@pytest.mark.parametrize("kind", [gaussian, squashed])
def test_a_proposal_is_scored_as_any_action_with_the_same_gradient(kind: Callable[..., Any]) -> None:
    """Against the density of the action itself; of a squashed one in a box from -1 to 1, of which it is the density."""
    seen = []
    for proposed in (True, False):
        given = kind()[0]
        parameters = [given.mean.clone().requires_grad_(), given.std.clone().requires_grad_()]
        box = [-torch.ones(3).double(), torch.ones(3).double()] if kind is squashed else []
        mine, rng = type(given)(*parameters, *box), torch.Generator().manual_seed(3)
        actions, logprob = mine.propose(rng)
        scored = logprob if proposed else mine.logprob(actions)
        seen.append([actions, scored, *torch.autograd.grad((scored * actions.sum(-1)).sum(), parameters)])
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_modes() -> None:
    assert Categorical(torch.tensor([[0.0, 3.0, 1.0]])).mode().tolist() == [1]
    mean, std = torch.tensor([[0.5, -1.0, 0.0]]), torch.ones(1, 3)
    assert torch.equal(Gaussian(mean, std).mode(), mean)
    assert torch.allclose(SquashedGaussian(mean, std, -torch.ones(3), torch.ones(3)).mode(), mean.tanh())


def test_gradients_are_those_of_finite_differences() -> None:
    logits, mean, std = drawn(0, 3, 4), drawn(1, 3, 2), drawn(2, 3, 2).exp()
    chosen, taken = torch.tensor([0, 3, 1]), drawn(3, 3, 2).tanh() * 0.9
    low, high = -torch.ones(2).double(), torch.ones(2).double()

    def of_logits(x: Tensor) -> Tensor:
        this = Categorical(x)
        return torch.stack([this.logprob(chosen), this.entropy(), this.kl(Categorical(logits.flip(0)))])

    def of_numbers(m: Tensor, s: Tensor) -> Tensor:
        plain, box = Gaussian(m, s), SquashedGaussian(m, s, low, high)
        return torch.stack(
            [plain.logprob(taken), plain.entropy(), plain.kl(Gaussian(mean.flip(0), std.flip(0))), box.logprob(taken)]
        )

    assert torch.autograd.gradcheck(of_logits, (logits.requires_grad_(),))
    assert torch.autograd.gradcheck(of_numbers, (mean.requires_grad_(), std.requires_grad_()))


def test_continuous_samples_have_a_gradient() -> None:
    mean = torch.zeros(5, 2, requires_grad=True)
    Gaussian(mean, torch.ones(5, 2)).sample(torch.Generator().manual_seed(0)).sum().backward()
    assert torch.equal(mean.grad, torch.ones(5, 2))


def test_a_squashed_gaussian_says_that_it_has_no_entropy() -> None:
    with pytest.raises(NotImplementedError, match="SquashedGaussian has no entropy in closed form; use the log-prob"):
        squashed()[0].entropy()


@pytest.mark.parametrize("rows", [1, 7, 500])
def test_a_drawn_action_is_the_inverse_of_the_distribution_function(rows: int) -> None:
    """Few numbers are inverted by numpy, many by torch, to the same actions."""
    logits = 3 * drawn(5, rows, 4).float()
    logits[:, 1] = -torch.inf
    found = Categorical(logits).sample(torch.Generator().manual_seed(1))
    uniform = torch.rand(rows, generator=torch.Generator().manual_seed(1))
    assert found.dtype == torch.int64
    assert torch.equal(found, sample_tokens(logits, uniform))
    assert not (found == 1).any()
