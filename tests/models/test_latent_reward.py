"""Rewards with a user's latent: worked divergences, what plays no part, empty contexts, and bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from regimen.models.latent_reward import ConcatenatingEncoder, LatentReward, Latents, PairEncoder, Pairs

STATES, LATENT, PAIRS = 3, 4, 6


def random_pairs(users: int = 5, pairs: int = PAIRS, length: int = 2, seed: int = 0) -> Pairs:
    rng = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(users, pairs, length, STATES, generator=rng) for _ in range(2))
    label = (torch.rand(users, pairs, generator=rng) < 0.5).float()
    return Pairs(first, second, label, torch.ones(users, pairs, dtype=torch.bool))


def encoder(seed: int = 0, **options: Any) -> PairEncoder:
    torch.manual_seed(seed)
    return PairEncoder(2 * STATES, LATENT, (16,), **options)


def latents(mean: list[float], log_var: list[float]) -> Latents:
    return Latents(torch.tensor([mean]), torch.tensor([log_var]))


def same(a: Latents, b: Latents) -> bool:
    return bool(torch.allclose(a.mean, b.mean, atol=1e-6) and torch.allclose(a.log_var, b.log_var, atol=1e-6))


# The divergence


@pytest.mark.parametrize(
    ("prior", "expected"),
    [
        (([0.0, 0.0], [0.0, 0.0]), 0.670861),
        (([0.1, 0.0], [-0.2, 0.3]), 0.612326),
        (([2.0, 0.0], [-0.2, 0.3]), 1.888692),
        (([0.5, -1.0], [0.2, -0.4]), 0.0),
    ],
)
def test_the_divergence_has_the_worked_values(prior: tuple[list[float], list[float]], expected: float) -> None:
    assert float(latents([0.5, -1.0], [0.2, -0.4]).kl(latents(*prior))) == pytest.approx(expected, abs=2e-6)


def test_latents_are_drawn_from_their_gaussian() -> None:
    drawn = latents([1.0, -2.0], [0.0, -2.0])
    wide = Latents(drawn.mean.expand(40_000, -1), drawn.log_var.expand(40_000, -1))
    sample = wide.sample(torch.Generator().manual_seed(0))
    assert torch.allclose(sample.mean(0), torch.tensor([1.0, -2.0]), atol=0.02)
    assert torch.allclose(sample.std(0), torch.tensor([1.0, torch.tensor(-1.0).exp()]), atol=0.02)


def test_units_are_active_where_users_differ() -> None:
    mean = torch.tensor([[0.0, 1.0, 0.05], [0.0, -1.0, 0.0]])
    assert float(Latents(mean, torch.zeros(2, 3)).active_units()) == 1


# What an encoder heeds


@pytest.mark.parametrize("attention", [False, True])
def test_the_order_of_the_pairs_plays_no_part(attention: bool) -> None:
    pairs, order = random_pairs(), torch.tensor([3, 1, 5, 0, 2, 4])
    mixed = Pairs(pairs.first[:, order], pairs.second[:, order], pairs.label[:, order], pairs.mask)
    model = encoder(attention=attention)
    assert same(model(pairs), model(mixed))


@pytest.mark.parametrize("attention", [False, True])
def test_exchanging_a_pair_and_its_label_changes_nothing(attention: bool) -> None:
    pairs, model = random_pairs(), encoder(attention=attention)
    assert same(model(pairs), model(Pairs(pairs.second, pairs.first, 1 - pairs.label, pairs.mask)))
    assert not same(model(pairs), model(Pairs(pairs.first, pairs.second, 1 - pairs.label, pairs.mask)))


@pytest.mark.parametrize("attention", [False, True])
def test_pairs_that_do_not_exist_are_not_read(attention: bool) -> None:
    pairs, model = random_pairs(), encoder(attention=attention)
    mask = torch.arange(PAIRS).expand(5, -1) < 3
    other = Pairs(torch.where(mask[:, :, None, None], pairs.first, 7.0), pairs.second, pairs.label, mask)
    assert same(model(other), model(pairs[:3]))


def test_a_doubtful_label_says_less() -> None:
    pairs = random_pairs()
    told = Pairs(pairs.first, pairs.second, torch.full_like(pairs.label, 0.7), pairs.mask).by_preference()
    assert torch.equal(told[..., :6], pairs.first.flatten(2))
    assert torch.allclose(told[..., -1], torch.tensor(0.4))


def test_the_variance_stays_within_bounds() -> None:
    found = encoder(bounds=(-0.01, 0.01))(random_pairs())
    assert float(found.log_var.detach().abs().max()) <= 0.01


def test_a_concatenating_encoder_refuses_another_number_of_pairs() -> None:
    torch.manual_seed(0)
    model = ConcatenatingEncoder(2 * STATES, LATENT, PAIRS, (8,))
    assert model(random_pairs()).mean.shape == (5, LATENT)
    with pytest.raises(ValueError, match="made for 6 pairs and given 4"):
        model(random_pairs(pairs=4))
    pairs = random_pairs()
    with pytest.raises(ValueError, match="of which a user has 5"):
        model(Pairs(pairs.first, pairs.second, pairs.label, torch.arange(PAIRS).expand(5, -1) < 5))


# The reward


@pytest.mark.parametrize("learned_prior", [False, True])
def test_without_pairs_the_prior_is_what_is_known(learned_prior: bool) -> None:
    torch.manual_seed(0)
    model = LatentReward(STATES, encoder(), (8,), learned_prior=learned_prior)
    with torch.no_grad():
        model.prior_mean.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    pairs = random_pairs()
    mask = pairs.mask.clone()
    mask[1] = False
    found = model.infer(Pairs(pairs.first, pairs.second, pairs.label, mask))
    assert torch.equal(found.mean[1], model.prior_mean)
    assert float(found.kl(model.prior)[1].detach()) == 0
    assert not torch.equal(found.mean[0], model.prior_mean)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert ({"prior_mean", "prior_log_var"} <= trained) == learned_prior


@pytest.mark.parametrize("shape", [(5, STATES), (5, 7, STATES), (5, 2, 4, STATES)])
def test_states_of_any_number_are_scored_one_by_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, states, z = LatentReward(STATES, encoder(), (8,)), torch.randn(shape), torch.randn(5, LATENT)
    rewards = model.score(states, z)
    assert rewards.shape == shape[:-1]
    last = states[3].reshape(-1, STATES)[-1:]
    assert torch.allclose(rewards[3].reshape(-1)[-1], model.score(last, z[3:4])[0], atol=1e-6)


def test_a_segment_is_worth_the_sum_of_its_states() -> None:
    torch.manual_seed(0)
    model, pairs, z = LatentReward(STATES, encoder(), (8,)), random_pairs(), torch.randn(5, LATENT)
    worth = [model.score(part, z).sum(-1) for part in (pairs.first, pairs.second)]
    assert torch.allclose(model.compare(pairs, z), worth[0] - worth[1], atol=1e-6)


def test_without_an_encoder_the_reward_is_one_for_all() -> None:
    torch.manual_seed(0)
    model = LatentReward(STATES, widths=(8,))
    found = model.infer(random_pairs())
    assert found.mean.shape == (5, 0)
    assert torch.equal(found.kl(model.prior), torch.zeros(5))
    state = torch.randn(1, STATES).expand(5, -1)
    assert model.score(state, found.mean).std().item() == pytest.approx(0, abs=1e-6)


def test_a_soft_prompt_of_text_features_is_a_segment_of_one_state() -> None:
    """A text is a state: its features, and a latent for its reader."""
    torch.manual_seed(0)
    model = LatentReward(STATES, PairEncoder(STATES, LATENT, (8,), attention=True), (8,))
    assert model.compare(random_pairs(length=1), torch.zeros(5, LATENT)).shape == (5, PAIRS)


# Bad input


def bad(**changed: Tensor) -> dict[str, Tensor]:
    pairs = random_pairs()
    return {"first": pairs.first, "second": pairs.second, "label": pairs.label, "mask": pairs.mask, **changed}


@pytest.mark.parametrize("label", [-1.0, 2.0, float("nan")])
def test_a_label_outside_0_and_1_is_refused(label: float) -> None:
    labels = random_pairs().label
    labels[2, 3] = label
    with pytest.raises(ValueError, match=f"the label of pair 3 of user 2 is {label:g}"):
        Pairs(**bad(label=labels))
    mask = torch.ones(5, PAIRS, dtype=torch.bool)
    mask[2, 3] = False
    Pairs(**bad(label=labels, mask=mask))


def test_pairs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"second \[5, 6, 1, 3\]"):
        Pairs(**bad(second=torch.zeros(5, PAIRS, 1, STATES)))
    with pytest.raises(ValueError, match=r"mask \[5, 6\] torch.float32"):
        Pairs(**bad(mask=torch.ones(5, PAIRS)))
    model = LatentReward(STATES, encoder(), (8,))
    with pytest.raises(ValueError, match=r"latents \[5, 2\]; expected \[B, ..., 3\] and \[5, 4\]"):
        model.score(torch.zeros(5, STATES), torch.zeros(5, 2))
