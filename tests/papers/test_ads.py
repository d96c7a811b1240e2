"""Automatic discount scheduling: the smoke test, what arms differ in and spend, the trap itself, and Meta-World."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch

from regimen import Event, papers, train
from regimen.checkers import check
from regimen.controllers import AutomaticDiscountScheduler
from regimen.lab.experiment import ArmResult
from regimen.lab.results import read_results
from regimen.lab.runner import Plan, run_experiment
from regimen.memory import ReplayMemory
from regimen.papers.ads import FIXED, PAPER, Settings, chain, hand_and_object, metaworld
from regimen.regimen import Regimen
from regimen.rewards import Scene

QUICK = PAPER.scales["quick"]
ARMS = ["ads", *FIXED, "time"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of scale quick, all of it."""
    out = tmp_path_factory.mktemp("ads") / "quick"
    return run_experiment(Plan(partial(papers.load, PAPER.slug), out, scale="quick")) and read_results(out)


def built(arm: str, s: Settings = QUICK, seed: int = 0) -> Regimen:
    regimen: Regimen = PAPER.arm(arm).build(seed, s)
    return regimen


def quiet(event: Event) -> None:
    """Show nothing."""


# The smoke test


def test_every_arm_is_trained_and_every_claim_computed(quick: dict[str, Any]) -> None:
    assert quick["failures"] == []
    assert list(quick["arms"]) == ARMS
    assert quick["left_out"] == []
    assert all(claim["missing"] == {} for claim in quick["claims"])


def test_an_arm_without_a_scheduler_has_the_episodes_that_the_others_look_at(quick: dict[str, Any]) -> None:
    looks = (60 - 1) // 5
    spent = {arm: seeds["0"]["samples"] for arm, seeds in quick["arms"].items()}
    assert spent["ads"] == spent["time"] == 60 * 16 + looks * 5
    for arm in FIXED:
        assert 0 <= spent[arm] - spent["ads"] < 16
        assert quick["arms"][arm]["0"]["gradient_steps"] >= quick["arms"]["ads"]["0"]["gradient_steps"]


# Arms and settings


def test_arms_differ_in_the_discount_alone() -> None:
    first = built("ads")
    for arm in ARMS:
        regimen, (stage,) = built(arm), built(arm).stages
        assert [u.learning_rate for u in stage.updates] == [QUICK.learning_rate, QUICK.value_rate]
        assert (stage.batch_size, stage.credit, stage.reward.scale) == (16, first.stages[0].credit, "auto")
        assert all(not bool(p.any()) for p in regimen.cast["policy"].parameters())
        board = stage.board(regimen.cast, {})
        assert board["temperature"] == board.for_evaluation()["temperature"] == 1
        start = 0.2 if arm in ("ads", "time") else FIXED[arm]
        assert board["discount"] == pytest.approx(start)


def test_the_scheduler_sees_costs_and_never_success() -> None:
    moving = built("ads").stages[0].controllers[0]
    assert isinstance(moving, AutomaticDiscountScheduler)
    assert (moving.needs.update, moving.needs.losses, moving.needs.probe.reward) == (None, (), None)
    assert (moving.threshold, built("time").stages[0].controllers[0].threshold) == (1.0, 0.0)


def test_the_default_settings_are_those_that_the_experiment_fixes() -> None:
    s = Settings()
    assert PAPER.scales["default"] == s
    assert (s.length, s.shortcut, s.steps, s.batch, s.learning_rate) == (20, 0.7, 1200, 16, 6.0)
    assert (s.alpha, s.threshold, s.start, s.delta, s.every, s.probe) == (0.2, 1.0, 0.2, 1, 20, 5)
    assert PAPER.requires == {"full": "metaworld"}
    assert built("ads", s).stages[0].controllers[0].progress == 4


def test_the_policy_gradient_is_scaled_by_what_the_discount_leaves() -> None:
    """So that an arm's step size does not grow with the size of its returns, 1 / (1 - discount)."""
    stage = built("fixed_90").stages[0]
    ((weight, _),) = stage.updates[0].objective.terms
    assert weight.value({"discount": 0.9}) == pytest.approx(0.1)


@pytest.mark.parametrize("arm", ["ads", "fixed_99"])
def test_its_regimens_pass_the_checker(arm: str) -> None:
    assert check(built(arm, dataclasses.replace(QUICK, steps=2))).messages == []


# The trap


def test_the_large_discount_takes_the_shortcut_and_the_scheduled_one_stays_on_the_track() -> None:
    s = dataclasses.replace(QUICK, length=6, steps=120, every=10)
    ends = {
        arm: train(built(arm, s, 100), seed=100, listener=quiet).evaluations[-1]["metrics"]
        for arm in ("ads", "fixed_99")
    }
    assert ends["ads"]["imitation/correct"] > 5
    assert ends["fixed_99"]["imitation/correct"] < 3


def test_for_a_clumsy_policy_the_shortcut_is_worth_more_than_the_track_under_a_large_discount() -> None:
    """The values of the first step, by hand: a right action is followed by uniformly random ones."""

    def values(discount: float) -> tuple[float, float]:
        """Of the right action and of the shortcut; dropping off costs 1 a step, the shortcut 0.7, the track nothing."""
        track, dropped, right = 0.0, 0.0, 0.0
        for _ in range(20):
            right, dropped = discount * track, 1 + discount * dropped
            track = 0.2 * right + 0.2 * 0.7 * dropped + 0.6 * dropped
        return -right, -0.7 * dropped

    track, shortcut = values(0.99)
    assert shortcut > track
    track, shortcut = values(0.5)
    assert track > shortcut


# Claims


def results(**successes: float) -> dict[str, ArmResult]:
    def ended(value: float) -> Sequence[Any]:
        return [{"stage": "imitate", "metrics": {"imitation/success": value}}]

    return {arm: ArmResult(ended(value), 0, 0, 0, 0.0) for arm, value in successes.items()}


def test_claims_compare_with_0_99_and_with_the_best_in_hindsight() -> None:
    seed = results(ads=0.9, fixed_99=0.0, fixed_90=0.4, fixed_50=0.97, time=0.8)
    values = {claim.name: claim.value(seed) for claim in PAPER.claims}
    assert values == pytest.approx({"beats_099": 0.9, "keeps_up": -0.07, "beats_time": 0.1})
    assert {claim.name: (claim.above, claim.judged) for claim in PAPER.claims} == {
        "beats_099": (0.0, True), "keeps_up": (-0.05, True), "beats_time": (0.0, False),
    }  # fmt: skip


# The worlds


def test_the_chains_demonstration_costs_nothing() -> None:
    ground = chain(3, QUICK)
    rollout = ground.task.collect(
        {"policy": built("ads", seed=3).cast["policy"]}, {"temperature": 1.0}, torch.Generator().manual_seed(0), 16
    )
    assert ground.costs.of(rollout).shape == (16, 1, 8, 8)
    between = ground.costs.of_demonstrations()[0, 0]
    assert torch.allclose(between, 1 - torch.eye(8), atol=1e-6)


def test_the_full_scale_runs_on_meta_world_with_the_packages_experts() -> None:
    """Two iterations, with a look between, on the real simulator; sums are formed when steps are drawn."""
    pytest.importorskip("metaworld")
    s = dataclasses.replace(
        PAPER.scales["full"], length=8, steps=2, batch=1, every=1, probe=1, demonstrations=1, draws=2, minibatch=8,
        hidden=8, evaluation_episodes=1, device="cpu",
    )  # fmt: skip
    regimen = built("ads", s)
    assert regimen.stages[0].controllers[0].costs.demonstrations.shape == (1, 8, 11)
    memory = regimen.stages[0].memory()
    assert isinstance(memory, ReplayMemory)
    assert memory.ahead == 2
    outcome = train(regimen, listener=quiet)
    assert outcome.counters.samples == 2 + 1
    assert outcome.counters.gradient_steps == 4
    assert {"imitation/success", "imitation/return"} <= outcome.evaluations[-1]["metrics"].keys()


def test_an_expert_of_meta_world_is_its_own_nearest_demonstration() -> None:
    pytest.importorskip("metaworld")
    from regimen.rewards import OptimalTransportReward
    from regimen.tasks.environments.metaworld_experts import ScriptedExpert

    s = dataclasses.replace(PAPER.scales["full"], length=12, demonstrations=1, probe=1, batch=1, device="cpu")
    ground = metaworld(0, s)
    shown = ground.task.collect({"policy": ScriptedExpert([s.task])}, {}, torch.Generator().manual_seed(5), 1)
    still = shown.replace(observations=shown.observations[:, :1].expand(-1, 12, -1).contiguous())
    reward = OptimalTransportReward(ground.costs, scale=1.0)
    assert hand_and_object(shown).shape == (1, 12, 11)
    assert float(reward.score(shown, Scene()).sum()) > float(reward.score(still, Scene()).sum())
