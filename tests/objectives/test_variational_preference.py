"""Variational preference learning: the bound by hand, its gradient, its limits, and users told apart."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from regimen.cast import Cast
from regimen.checkers import check
from regimen.knobs import Knobs
from regimen.loop import train
from regimen.models.latent_reward import LatentReward, PairEncoder
from regimen.objectives import VariationalPreferenceObjective, preference_nll
from regimen.objectives.base import Batch
from regimen.regimen import Regimen, Stage
from regimen.rollout import Rollout
from regimen.tasks import DatasetTask
from regimen.tasks.preferences import pairs_of, personal_accuracy, preference_rows
from regimen.update import Update


def rows(users: int, pairs: int = 4, seed: int = 0) -> TensorDict:
    """Users of two kinds who want opposite things: a number is the better, the larger, or the smaller it is."""
    rng = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(users, pairs, 1, 1, generator=rng) for _ in range(2))
    user = torch.randint(2, (users,), generator=rng)
    larger = (first > second)[:, :, 0, 0]
    return preference_rows(first, second, (larger == (user[:, None] == 1)).float(), user=user)


def model(latent: int = 2, seed: int = 0, **options: Any) -> LatentReward:
    torch.manual_seed(seed)
    return LatentReward(1, PairEncoder(1, latent, (16, 16)) if latent else None, (16, 16), **options)


def rollout(table: TensorDict) -> Rollout:
    return DatasetTask("pairs", table, order="sequential").collect({}, {}, torch.Generator(), len(table))


def loss_of(
    table: Rollout, member: LatentReward, objective: VariationalPreferenceObjective, seed: int = 0, **knobs: float
) -> tuple[Tensor, dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    return objective.loss(Batch(table, {"reward_model": member}, Knobs.of(objective, **knobs), rng))


def learned(
    table: TensorDict, member: LatentReward, steps: int = 250, seed: int = 0, batch: int = 64, **knobs: float
) -> LatentReward:
    update = Update(VariationalPreferenceObjective(), ["reward_model"], learning_rate=3e-3, optimizer=torch.optim.Adam)
    stage = Stage("reward", [DatasetTask("pairs", table)], steps, batch, updates=[update], knobs=knobs)
    train(Regimen(Cast(reward_model=member), [stage]), seed=seed, listener=lambda event: None)
    return member


def accuracy(member: LatentReward, seed: int = 9) -> float:
    return personal_accuracy({"reward_model": member}, rows(400, 12, seed), 4)["accuracy"]


# By hand


def test_the_likelihood_is_that_of_bradley_and_terry() -> None:
    difference, label = torch.tensor([0.0, 2.0, 2.0, -1.0]), torch.tensor([1.0, 1.0, 0.0, 0.25])
    expected = [
        math.log(2),
        math.log1p(math.exp(-2)),
        math.log1p(math.exp(2)),
        0.25 * math.log1p(math.e) + 0.75 * math.log1p(1 / math.e),
    ]
    assert preference_nll(difference, label).tolist() == pytest.approx(expected, rel=1e-6)
    assert torch.allclose(preference_nll(difference, label, 4.0), preference_nll(difference / 4, label))


def test_the_bound_sums_over_pairs_and_averages_over_users() -> None:
    table, member = rollout(rows(3)), model()
    objective = VariationalPreferenceObjective(scale=2.0)
    total, metrics = loss_of(table, member, objective, kl_weight=0.3)
    pairs = pairs_of(rows(3))
    posterior = member.infer(pairs)
    z = posterior.sample(torch.Generator().manual_seed(0))
    nll = preference_nll(member.compare(pairs, z), pairs.label, 2.0).sum(1)
    assert torch.allclose(total, (nll + 0.3 * posterior.kl(member.prior)).mean())
    assert float(metrics["kl"]) == pytest.approx(float(posterior.kl(member.prior).mean().detach()))


def test_pairs_that_are_not_learned_from_are_seen_but_not_predicted() -> None:
    table, member, objective = rollout(rows(6)), model(), VariationalPreferenceObjective()
    where = torch.zeros(6, 4, dtype=torch.bool)
    where[:, 2] = True
    total, _ = loss_of(table.replace(loss_mask=where), member, objective, kl_weight=0.0)
    pairs = pairs_of(rows(6))
    z = member.infer(pairs).sample(torch.Generator().manual_seed(0))
    assert torch.allclose(total, preference_nll(member.compare(pairs, z), pairs.label)[:, 2].mean())


def test_the_encoder_sees_the_pairs_that_are_shown() -> None:
    table, member, objective = rollout(rows(6)), model(), VariationalPreferenceObjective()
    shown = torch.arange(4).expand(6, -1) < 2
    _, metrics = loss_of(table.with_step_columns(shown=shown), member, objective)
    expected = member.infer(pairs_of(rows(6))[:2]).kl(member.prior).mean()
    assert float(metrics["kl"]) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_the_gradient_is_that_of_finite_differences() -> None:
    table, member, objective = rollout(rows(8)), model().double(), VariationalPreferenceObjective()
    table = table.replace(step_columns=table.step_columns.double())
    total, _ = loss_of(table, member, objective, kl_weight=0.7)
    total.backward()
    for weight in (member.decoder[1].weight, member.encoder.out.weight):  # type: ignore[union-attr]
        with torch.no_grad():
            flat, eps = weight.view(-1), 1e-6
            found = []
            for sign in (1, -2):
                flat[1] += sign * eps
                found.append(float(loss_of(table, member, objective, kl_weight=0.7)[0]))
            flat[1] += eps
        assert (found[0] - found[1]) / (2 * eps) == pytest.approx(float(weight.grad.view(-1)[1]), rel=1e-4)


def test_users_apart_add_up_to_the_bound() -> None:
    """Without noise: of a latent whose variance is next to nothing."""
    table, member, objective = rollout(rows(8)), model(), VariationalPreferenceObjective()
    member.encoder.bounds = (-60.0, -60.0)  # type: ignore[union-attr]
    knobs, rng = Knobs.of(objective), torch.Generator()
    whole = objective(Batch(table, {"reward_model": member}, knobs, rng)).total
    slices = (slice(0, 3), slice(3, 8))
    parts = [objective(Batch(table[r], {"reward_model": member}, knobs, rng, whole=table, rows=r)) for r in slices]
    assert torch.allclose(whole, parts[0].total + parts[1].total, rtol=1e-5)


# What is learned


@pytest.fixture(scope="module")
def personal() -> LatentReward:
    """What has learned from users of both kinds."""
    return learned(rows(600), model())


def test_opposite_users_are_told_apart_by_their_labels(personal: LatentReward) -> None:
    assert accuracy(personal) > 0.85
    assert 0.4 < accuracy(learned(rows(600), model(0), 40)) < 0.6


def test_turning_all_labels_around_turns_the_preferences_around(personal: LatentReward) -> None:
    test = rows(300, 4, 3)
    pairs, states = pairs_of(test), torch.tensor([[1.0], [-1.0]]).expand(300, 2, 1)
    turned = pairs_of(preference_rows(pairs.first, pairs.second, 1 - pairs.label))
    ahead = [
        (scores[:, 0] > scores[:, 1]).float()
        for scores in (personal.score(states, personal.infer(p).mean) for p in (pairs, turned))
    ]
    assert float((ahead[0] != ahead[1]).float().mean()) > 0.9
    assert personal_accuracy({"reward_model": personal}, test, 3)["probe"] > 0.85


def test_with_one_kind_of_user_nothing_is_gained() -> None:
    table, test = rows(300), rows(400, 12, 9)
    kind, new = table[table["user"] == 1], test[test["user"] == 1]
    found = [
        personal_accuracy({"reward_model": learned(kind, member, 100)}, new, 4)["accuracy"]
        for member in (model(), model(0))
    ]
    assert found[0] == pytest.approx(found[1], abs=0.03)


def test_a_heavy_divergence_makes_the_reward_one_for_all() -> None:
    member = learned(rows(600), model(), 100, kl_weight=1e3)
    found = personal_accuracy({"reward_model": member}, rows(400, 12, 9), 4)
    assert found["kl"] < 1e-3
    assert 0.4 < found["accuracy"] < 0.6


def test_a_learned_prior_comes_to_the_users() -> None:
    member = model(learned_prior=True)
    learned(rows(200), member, steps=30)
    assert float(member.prior_log_var.detach().abs().max()) > 0.01


def test_it_trains_the_same_way_twice() -> None:
    first, second = (learned(rows(100), model(), steps=5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


# As a part


def test_the_checker_finds_nothing() -> None:
    part = VariationalPreferenceObjective()
    assert check(part, rollout(rows(6)), cast={"reward_model": model()}).messages == []


def test_a_scale_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="scale is 0, expected above 0"):
        VariationalPreferenceObjective(scale=0)
    with pytest.raises(ValueError, match=r"difference \[2\], label \[3\]"):
        preference_nll(torch.zeros(2), torch.zeros(3))
