"""Estimators in a regimen: fitted to what was collected, asked as a judge, held by checkpoints."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from regimen import Cast, Event, Regimen, ReplayMemory, Stage, train
from regimen.checkers import check
from regimen.estimators import FitEstimator, Reading, RobustMultiTaskGradientBoostingClassifier
from regimen.estimators import RobustMultiTaskGradientBoostingRegressor as Regressor
from regimen.rewards import FAILED, SCORED, ModelReward, Scene, judge, reward_from
from regimen.rollout import Rollout
from regimen.storage import load_tree
from regimen.tasks import DatasetTask

READING = Reading("features", source="user")


def rows(count: int = 240, users: int = 4) -> TensorDict:
    """Ratings of samples by users, of whom the last rates the opposite."""
    rng = torch.Generator().manual_seed(0)
    features = torch.rand(count, 3, generator=rng) * 2 - 1
    user = torch.arange(count) % users
    rating = 3 * features[:, 0] * torch.where(user == users - 1, -1, 1)
    return TensorDict({"features": features, "user": user, "rating": rating}, [count])


def rollout(**columns: Any) -> Rollout:
    given = rows(12)
    mask = torch.ones(12, 1, dtype=torch.bool)
    return Rollout.create(task="a", group=torch.arange(12), mask=mask, columns={**dict(given.items()), **columns})


def fitted() -> Regressor:
    data = rows()
    model = Regressor(n_shared=5, n_partition=40, n_task=5, random_state=0)
    return model.fit(data["features"].numpy(), data["rating"].numpy(), data["user"].numpy())


def test_known_users_are_asked_for_themselves_and_others_by_the_mean_of_the_related() -> None:
    model, asked = fitted(), rollout(user=torch.tensor([0, 3, 99] * 4))
    value = READING(model, asked).numpy()
    x = READING.features(asked)
    np.testing.assert_allclose(value[::3], model.predict(x[::3], np.zeros(4, dtype=int)), rtol=1e-6)
    np.testing.assert_allclose(value[1::3], model.predict(x[1::3], np.full(4, 3)), rtol=1e-6)
    np.testing.assert_allclose(value[2::3], model.predict_related(x[2::3]), rtol=1e-6)


def test_without_a_column_of_users_all_are_unknown() -> None:
    model, asked = fitted(), rollout()
    value = Reading("features", source="nobody")(model, asked).numpy()
    np.testing.assert_allclose(value, model.predict_related(READING.features(asked)), rtol=1e-6)


def test_the_outlier_score_is_that_of_the_samples_source() -> None:
    model = fitted()
    scores = READING.outlier_scores(model, rollout(user=torch.tensor([0, 3, 99] * 4)))
    assert (scores[::3] < 0.1).all()
    assert (scores[1::3] > 0.9).all()
    assert scores[2::3].isnan().all()


def test_a_model_reward_has_a_component_per_output_and_asks_once() -> None:
    data = rows()
    model = RobustMultiTaskGradientBoostingClassifier(n_shared=3, n_partition=3, n_task=3, random_state=0)
    model.fit(data["features"].numpy(), data["rating"].numpy() > 0, data["user"].numpy())
    calls = []

    def ask(member: Any, asked: Rollout) -> torch.Tensor:
        calls.append(len(asked))
        return READING(member, asked)

    reward = ModelReward("judge", ["bad", "good"], ask=ask)
    judged, _ = judge(reward, rollout(), Scene({"judge": model}, {"weight/bad": 0.0, "weight/good": 2.0}))
    assert calls == [12]
    np.testing.assert_allclose(judged.rewards["bad"] + judged.rewards["good"], 1, rtol=1e-6)
    assert torch.equal(judged.reward, 2 * judged.rewards["good"])


def test_a_network_is_asked_by_calling_it_and_keeps_its_mode() -> None:
    class Model(torch.nn.Module):
        def forward(self, asked: Rollout) -> torch.Tensor:
            assert not self.training
            return asked["features"][:, 0]

    model = Model().train()
    judged, _ = judge(ModelReward(), rollout(), Scene({"reward_model": model}, {"weight/model": 1.0}))
    assert torch.equal(judged.reward, rows(12)["features"][:, 0])
    assert model.training


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (ModelReward("nobody"), "needs the member 'nobody', which the cast lacks"),
        (ModelReward("judge", ["a", "b"], ask=READING), r"shape \[12, 1\] for 12 samples, and ModelReward has 2 names"),
    ],
)
def test_a_model_reward_that_does_not_fit_fails_with_the_reason(reward: ModelReward, message: str) -> None:
    weights = {knob.name: 1.0 for knob in reward.knobs}
    same = rollout().replace(group=torch.zeros(12, dtype=torch.int64))
    _, report = judge(reward, same, Scene({"judge": fitted()}, weights))
    assert report.failed == 12
    assert any(re.search(message, error) for error in report.errors)


def test_it_passes_the_checks_of_a_users_reward() -> None:
    two = rollout().replace(group=torch.arange(12) // 2)
    assert check(ModelReward("judge", ask=READING), two, cast={"judge": fitted()}).messages == []


def test_a_model_reward_needs_names() -> None:
    with pytest.raises(ValueError, match="names is 'model'; expected a list"):
        ModelReward("judge", "model")


def regimen(memory: ReplayMemory, **options: Any) -> Regimen:
    task = DatasetTask("ratings", rows(), order="sequential")
    cast = Cast(judge=Regressor(n_shared=5, n_partition=10, n_task=5, random_state=0))
    stages = [
        Stage("read", [task], 4, 60, memory=memory, **options),
        Stage("fit", [task], 0, memory=memory, prepare=[FitEstimator("judge", READING, target="rating")]),
        Stage("use", [task], 3, 60, reward=ModelReward("judge", ask=READING)),
    ]
    return Regimen(cast, stages)


def test_a_stage_fits_an_estimator_to_all_that_the_memory_holds() -> None:
    cast = train(regimen(ReplayMemory(240))).cast
    data = rows()
    alone = Regressor(n_shared=5, n_partition=10, n_task=5, random_state=0)
    alone.fit(data["features"].numpy(), data["rating"].numpy(), data["user"].numpy())
    assert np.array_equal(cast["judge"].theta_, alone.theta_)
    x, user = data["features"].numpy(), data["user"].numpy()
    assert np.array_equal(cast["judge"].predict(x, user), alone.predict(x, user))


@pytest.mark.parametrize("stop_at", [2, 4, 5, 6])
def test_an_interrupted_run_goes_on_with_what_was_read_and_fitted(stop_at: int, tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    def stopper(event: Event) -> None:
        nonlocal seen
        seen += event.kind == "step"
        if event.kind == "step" and seen == stop_at:
            raise Enough

    seen = 0
    train(regimen(ReplayMemory(240)), out=tmp_path / "whole", checkpoint_every=1)
    with pytest.raises(Enough):
        train(regimen(ReplayMemory(240)), out=tmp_path / "cut", checkpoint_every=1, listener=stopper)
    train(regimen(ReplayMemory(240)), out=tmp_path / "cut", resume=True, checkpoint_every=1)
    one, other = (load_tree(tmp_path / name / "cast-use.safetensors")["members"]["judge"] for name in ("whole", "cut"))
    assert torch.equal(one["theta"], other["theta"])
    for block in ("shared", "outlier", "own"):
        assert all(torch.equal(v, other["forest"][block][k]) for k, v in one["forest"][block].items())


def test_the_target_is_by_default_the_total_that_was_judged() -> None:
    @reward_from
    def taste(asked: Rollout) -> torch.Tensor:
        return asked["features"][:, 1]

    memory = ReplayMemory(240)
    task = DatasetTask("ratings", rows(), order="sequential")
    cast = Cast(judge=Regressor(n_shared=60, n_partition=0, n_task=0, random_state=0))
    fit = Stage("fit", [task], 0, memory=memory, prepare=[FitEstimator("judge", Reading("features"))])
    train(Regimen(cast, [Stage("read", [task], 1, 240, taste, memory=memory), fit]))
    x = rows()["features"].numpy()
    assert cast["judge"].tasks_.tolist() == ["ratings"]
    assert cast["judge"].score(x, x[:, 1]) > 0.95


def test_nothing_to_fit_to_is_an_error() -> None:
    with pytest.raises(ValueError, match="found the stage's memory empty"):
        FitEstimator("judge", READING)({}, [], ReplayMemory(4))
    memory = ReplayMemory(12)
    memory.add(rollout())
    with pytest.raises(ValueError, match="needs the reward of the samples of task a, and they were not judged"):
        FitEstimator("judge", READING)({"judge": Regressor()}, [], memory)


def test_hostile_sources_are_found_and_drawn_no_more() -> None:
    path = Path(__file__).parents[2] / "examples" / "hostile_sources.py"
    spec = importlib.util.spec_from_file_location("hostile_sources", path)
    assert spec is not None
    example = importlib.util.module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(example)
    steps: list[Event] = []
    outcome = train(
        example.regimen(0, robust=True, steps=2),
        listener=lambda event: steps.append(event) if event.kind == "step" else None,
    )
    scores = dict(zip(outcome.cast["sources"].tasks_.tolist(), outcome.cast["sources"].outlier_score_, strict=True))
    assert {name for name, score in scores.items() if score > 0.9} == {f"source{index}" for index in example.HOSTILE}
    first, second = (event.metrics for event in steps[-2:])
    assert all(first[f"knob/mixture/source{index}"] == 1 for index in range(example.SOURCES))
    for index in range(example.SOURCES):
        share = second[f"knob/mixture/source{index}"]
        assert share < 0.02 if index in example.HOSTILE else share > 0.24
        assert f"reward/source{index}/outlier_score" in first


def test_a_user_who_is_unknown_leaves_the_outlier_score_without_a_value() -> None:
    odd = ModelReward("judge", ["outlier_score"], ask=READING.outlier_scores)
    asked = rollout(user=torch.tensor([0, 99] * 6))
    judged, _ = judge(odd.logged(), asked, Scene({"judge": fitted()}, {"weight/outlier_score": 1.0}))
    assert judged.status["outlier_score"].tolist() == [SCORED, FAILED] * 6
    assert judged.reward is None
