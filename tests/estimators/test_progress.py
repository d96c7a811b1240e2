"""Estimators of progress: what they recover from final rewards, what they leave out, and how they are checked."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from regimen.estimators import FitEstimator, LinearProgress, MeasureMisfit, Reading, RecordedProgress
from regimen.memory import HoldOut, ReplayMemory
from regimen.rewards import OutcomeReward, Scene, judge
from regimen.rollout import Rollout
from regimen.storage import load_tree, save_tree

SIZE = 6
TRUE = torch.randn(SIZE, generator=torch.Generator().manual_seed(1))


def seen(rollout: Rollout) -> Tensor:
    observations = rollout.observations
    assert isinstance(observations, Tensor)
    return observations


def played(count: int = 500, steps: int = 8, seed: int = 0, **columns: Any) -> Rollout:
    """Gaussian features of random lengths, whose final reward is linear in their sum."""
    rng = torch.Generator().manual_seed(seed)
    phi = torch.randn(count, steps, SIZE, generator=rng)
    mask = torch.arange(steps) < torch.randint(1, steps + 1, (count, 1), generator=rng)
    credit = torch.where(mask, phi @ TRUE, 0)
    rollout = Rollout.create(
        task="sums", group=torch.arange(count), mask=mask, observations=phi,
        step_columns={"env_reward": credit, "credit": credit}, columns=columns,
    )  # fmt: skip
    return judge(OutcomeReward(), rollout, Scene())[0]


def fitted(rollout: Rollout, ridge: float = 1e-6) -> LinearProgress:
    progress = LinearProgress(seen, ridge)
    memory = ReplayMemory(len(rollout))
    memory.add(rollout)
    FitEstimator("estimator", Reading(progress.summed))({"estimator": progress}, [], memory)
    return progress


def test_weights_are_recovered_from_final_rewards_alone() -> None:
    assert torch.allclose(fitted(played()).weights.float(), TRUE, atol=1e-3)


def test_contributions_are_those_of_the_steps_that_exist() -> None:
    rollout = played(seed=3)
    found = fitted(played())(rollout)
    assert torch.allclose(found, rollout["credit"], atol=1e-3)
    assert not bool(found[~rollout.mask].any())


def test_padding_changes_neither_the_fit_nor_the_sum() -> None:
    rollout = played()
    longer = rollout.padded(12)
    assert torch.allclose(fitted(rollout).weights, fitted(longer).weights)
    progress = fitted(rollout)
    assert torch.allclose(progress(rollout).sum(1), progress(longer).sum(1), atol=1e-5)


def test_a_ridge_draws_the_weights_to_zero() -> None:
    assert fitted(played(), 1e4).weights.norm() < fitted(played(), 1.0).weights.norm() < TRUE.norm() * 1.01


def test_a_turn_counts_once() -> None:
    """The features of a turn's last own step."""
    rollout = played(4, 6).replace(segment=torch.tensor([0, 0, 0, 1, 1, 1]).expand(4, 6))
    rollout = rollout.replace(mask=torch.ones(4, 6, dtype=torch.bool), loss_mask=torch.ones(4, 6, dtype=torch.bool))
    summed = LinearProgress(seen).summed(rollout)
    assert torch.allclose(summed, seen(rollout)[:, 2] + seen(rollout)[:, 5])


def test_a_checkpoint_holds_the_fit(tmp_path: Path) -> None:
    progress, other = fitted(played()), LinearProgress(seen)
    progress.misfit = torch.tensor(0.25)
    save_tree(tmp_path / "fit.safetensors", progress.state_dict())
    other.load_state_dict(load_tree(tmp_path / "fit.safetensors"))
    assert torch.equal(other(played(5)), progress(played(5)))
    assert float(other.misfit) == 0.25


def test_an_estimator_that_has_not_been_fitted_says_how_to() -> None:
    with pytest.raises(ValueError, match=r"has not been fitted; let a stage of no steps do it, with prepare="):
        LinearProgress(seen)(played(2))


@pytest.mark.parametrize(("x", "y"), [([[1.0]], [1.0, 2.0]), ([1.0], [1.0]), ([], [])])
def test_features_and_rewards_that_do_not_fit_are_named(x: Any, y: Any) -> None:
    with pytest.raises(ValueError, match=r"LinearProgress: features of shape .* expected \[B, D\] and \[B\]"):
        LinearProgress(seen).fit(torch.tensor(x).numpy(), torch.tensor(y).numpy())


def test_a_ridge_of_zero_is_an_error() -> None:
    with pytest.raises(ValueError, match="ridge is 0, expected above 0"):
        LinearProgress(seen, 0)


def test_what_is_recorded_is_said() -> None:
    rollout = played(3)
    assert torch.equal(RecordedProgress("credit")(rollout), rollout["credit"])


# The misfit


def apart(rollout: Rollout) -> HoldOut:
    memory = HoldOut(ReplayMemory(len(rollout)), ReplayMemory(len(rollout)), 2)
    memory.add(rollout)
    return memory


def test_the_misfit_is_measured_on_what_was_kept_apart() -> None:
    rollout, progress = played(), LinearProgress(seen)
    progress.weights = torch.zeros(SIZE, dtype=torch.float64)
    MeasureMisfit()({"estimator": progress}, [], apart(rollout))
    reward = rollout.reward[1::2]
    assert float(progress.misfit) == pytest.approx(float(reward.square().mean() / reward.var(correction=0)), rel=1e-5)
    exact = fitted(rollout)
    assert not bool(exact.misfit.isfinite())
    MeasureMisfit()({"estimator": exact}, [], apart(rollout))
    assert float(exact.misfit) < 1e-6


def test_nothing_is_learned_from_equal_rewards() -> None:
    rollout = played(10).with_step_columns(env_reward=torch.zeros(10, 8))
    rollout, progress = judge(OutcomeReward(), rollout, Scene())[0], fitted(played())
    with pytest.warns(UserWarning, match="all 5 final rewards kept apart are 0; the estimator cannot learn"):
        MeasureMisfit()({"estimator": progress}, [], apart(rollout))
    assert float(progress.misfit) == torch.inf


def test_different_rewards_are_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MeasureMisfit()({"estimator": fitted(played())}, [], apart(played(10)))


@pytest.mark.parametrize("memory", [ReplayMemory(3), HoldOut(ReplayMemory(3), ReplayMemory(3))])
def test_a_memory_that_keeps_nothing_apart_is_named(memory: Any) -> None:
    name = type(memory).__name__
    with pytest.raises(ValueError, match=f"found no samples apart from the fit in a {name}; give the stage, and those"):
        MeasureMisfit()({"estimator": LinearProgress(seen)}, [], memory)
