"""Exploration bonuses in a run: nothing changes at weight 0, runs resume exactly, and a hidden goal is found."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bonus_worlds import Corridor, scored
from torch import nn

from regimen.cast import Cast
from regimen.checkers import check
from regimen.credit.gae import GAE
from regimen.knobs import Knobs
from regimen.loop import Outcome, train
from regimen.models.torsos import MLPTorso, OneHotTorso
from regimen.models.value_network import ValueNetwork
from regimen.objectives import FeatureDistillation, InverseDynamicsObjective, ppo
from regimen.policies.action import ActionPolicy
from regimen.policies.heads import CategoricalHead
from regimen.regimen import Regimen, Stage
from regimen.rewards import (
    CountBonus,
    EllipticalBonus,
    EnvironmentReward,
    Expression,
    NormalizedReward,
    RandomDistillationBonus,
)
from regimen.runs import read_metrics
from regimen.tasks.env import EnvTask
from regimen.update import Update

CELLS = 6


def counted() -> Expression:
    return CountBonus("episodic", form="first") * CountBonus()


def learned() -> Expression:
    return EllipticalBonus() * RandomDistillationBonus()


def members(cells: int = CELLS) -> dict[str, Any]:
    """A tabular policy and critic, and what learned bonuses ask."""
    torch.manual_seed(0)
    policy = ActionPolicy(OneHotTorso(cells), CategoricalHead(cells, 2))
    return {
        "policy": policy,
        "critic": ValueNetwork(OneHotTorso(cells)),
        "bonus_encoder": nn.Sequential(OneHotTorso(cells), nn.Linear(cells, 4)),
        "inverse_dynamics": CategoricalHead(8, 2),
        "bonus_target": nn.Sequential(OneHotTorso(cells), MLPTorso(cells, (8,))).requires_grad_(False),
        "bonus_predictor": nn.Sequential(OneHotTorso(cells), MLPTorso(cells, (8,))),
    }


def walking(steps: int = 7, **options: Any) -> EnvTask:
    return EnvTask("walk", partial(Corridor, length=CELLS), copies=4, steps=steps, **options)


def exploring(bonus: Expression | None, *, beta: float = 0.1, extra: bool = False, **options: Any) -> Regimen:
    """PPO on the environment's reward and a bonus; episodes go on from iteration to iteration."""
    reward: Expression = EnvironmentReward()
    if bonus is not None:
        reward = reward + beta * NormalizedReward(bonus, name="bonus")
    rate: dict[str, Any] = {"learning_rate": 0.02, "max_grad_norm": None}
    updates = [Update(ppo(), ["policy", "critic"], **rate)]
    if extra:
        updates += [
            Update(InverseDynamicsObjective(), ["bonus_encoder", "inverse_dynamics"], **rate),
            Update(FeatureDistillation(distance="norm"), ["bonus_predictor"], **rate),
        ]
    stage = Stage(
        "explore", [walking()], steps=8, batch_size=4, reward=reward, credit=GAE(), updates=updates, **options
    )
    return Regimen(Cast(**members()), [stage])


def weights(outcome: Outcome, *names: str) -> list[torch.Tensor]:
    return [p for name in names for p in outcome.cast[name].parameters()]


@pytest.mark.parametrize("bonus", [counted, learned])
def test_at_weight_zero_training_is_that_without_a_bonus(bonus: Any) -> None:
    plain = exploring(None)
    with_bonus = exploring(bonus(), beta=0.0, extra=True)
    rollouts: list[list[Any]] = [[], []]
    for regimen, kept in zip((plain, with_bonus), rollouts, strict=True):
        task = regimen.stages[0].tasks[0]
        collect = task.collect
        task.collect = lambda *given, _c=collect, _k=kept: _k.append(_c(*given)) or _k[-1]  # type: ignore[method-assign]
        outcome = train(regimen, seed=3)
        kept.append(weights(outcome, "policy", "critic"))
    for a, b in zip(rollouts[0][:-1], rollouts[1][:-1], strict=True):
        assert torch.equal(a.actions, b.actions)
        assert torch.equal(a.observations, b.observations)
        assert torch.equal(a.logprobs, b.logprobs)
    assert all(torch.equal(a, b) for a, b in zip(rollouts[0][-1], rollouts[1][-1], strict=True))


def test_at_another_weight_training_differs() -> None:
    outcomes = [train(exploring(counted(), beta=beta), seed=3) for beta in (0.0, 0.1)]
    assert not all(torch.equal(a, b) for a, b in zip(*(weights(o, "policy") for o in outcomes), strict=True))


@pytest.mark.parametrize("bonus", [counted, learned])
def test_a_resumed_run_is_the_one_that_was_not_interrupted(bonus: Any, tmp_path: Path) -> None:
    whole = train(exploring(bonus(), extra=True), seed=1, out=tmp_path / "whole", checkpoint_every=1)

    def stop_midway(event: Any) -> None:
        if event.kind == "step" and event.step == 5:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        train(exploring(bonus(), extra=True), seed=1, out=tmp_path / "cut", checkpoint_every=1, listener=stop_midway)
    resumed = train(exploring(bonus(), extra=True), seed=1, out=tmp_path / "cut", resume=True, checkpoint_every=1)
    names = ("policy", "critic", "bonus_encoder", "bonus_predictor")
    assert all(torch.equal(a, b) for a, b in zip(weights(whole, *names), weights(resumed, *names), strict=True))
    told = [[r["metrics"] for r in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("whole", "cut")]
    assert told[0] == told[1]
    assert any("reward/walk/" in name for name in told[0][1])


@pytest.mark.parametrize("bonus", [counted, learned])
def test_the_regimen_passes_the_checks_and_is_left_as_it_was(bonus: Any) -> None:
    regimen = exploring(bonus(), extra=True)
    assert regimen.stages[0].reward is not None
    assert check(regimen).messages == []
    # The reward has counted nothing that a fresh one has not.
    task, cast = walking(), members()
    rollout = task.collect(cast, Knobs.of(cast["policy"], task), torch.Generator().manual_seed(0), 8)
    used, fresh = (scored(r, rollout, cast) for r in (regimen.stages[0].reward, exploring(bonus()).stages[0].reward))
    assert torch.equal(used, fresh)


@pytest.mark.parametrize("bonus", [counted, lambda: EllipticalBonus()])
def test_two_stretches_of_a_copy_in_one_rollout_are_scored_in_their_order(bonus: Any) -> None:
    """A rollout of eight samples of four copies, and two of four, tell the bonus the same."""
    cast, values = members(), []
    for sizes in ((8,), (4, 4)):
        task, rng, reward = walking(), torch.Generator().manual_seed(0), bonus()
        board = Knobs.of(cast["policy"], task)
        values.append(torch.cat([scored(reward, task.collect(cast, board, rng, size), cast) for size in sizes]))
    assert torch.allclose(values[0], values[1])


def test_whole_episodes_start_afresh_in_every_rollout() -> None:
    task, cast, bonus = walking(episodes=True), members(), CountBonus("episodic", form="first")
    board, rng = Knobs.of(cast["policy"], task), torch.Generator().manual_seed(0)
    for _ in range(3):
        rollout = task.collect(cast, board, rng, 4)
        values = scored(bonus, rollout)
        for row in range(4):
            seen = {int(rollout.observations[row, 0])}
            for step in range(int(rollout.lengths[row])):
                state = int(rollout["next_observations"][row, step])
                assert bool(values[row, step]) == (state not in seen)
                seen.add(state)


def found(bonus: Expression | None, seed: int) -> float:
    """Success of the likeliest actions in a corridor too long for a random walk, after sixty updates."""
    cells, limit = 16, 24
    make = partial(Corridor, length=cells, limit=limit)
    task = EnvTask("walk", make, copies=16, steps=limit, episodes=True, evaluation_steps=limit)
    reward: Expression = EnvironmentReward()
    if bonus is not None:
        reward = reward + 0.1 * NormalizedReward(bonus, name="bonus")
    update = Update(ppo(), ["policy", "critic"], learning_rate=0.1, max_grad_norm=None)
    stage = Stage("s", [task], steps=60, batch_size=16, reward=reward, credit=GAE(lam=1.0), updates=[update])
    cast = Cast(**{name: member for name, member in members(cells).items() if name in ("policy", "critic")})
    return float(train(Regimen(cast, [stage]), seed=seed).evaluations[-1]["metrics"]["walk/return"])


def test_a_bonus_finds_a_goal_that_a_random_walk_does_not() -> None:
    assert found(None, seed=0) == 0
    assert found(counted(), seed=0) == 1
