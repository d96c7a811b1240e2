"""Dual RL: the smoke test, what arms differ in, what ReCOIL is not shown, claims, resume, and a stored data set."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from regimen import papers
from regimen.lab.experiment import ArmResult
from regimen.lab.results import read_results
from regimen.lab.runner import Plan, run_experiment
from regimen.loop import Interrupted, Outcome, train
from regimen.objectives import ChiSquare, Gumbel, TotalVariation
from regimen.papers.dual_rl import PAPER, Settings, gain, share, tamer
from regimen.progress import Event
from regimen.regimen import Regimen
from regimen.rewards import EnvironmentReward
from regimen.tasks.worlds.corner_grid import CornerGrid

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari.*")  # Of authors and descriptions.
QUICK: Settings = PAPER.scales["quick"]
TINY = dataclasses.replace(QUICK, episodes=2, steps=3, trials=2, imitation_steps=4, walks=5)
LEARNED = [arm.name for arm in PAPER.arms if not arm.name.startswith("bc")]


def built(arm: str, settings: Settings = TINY, seed: int = 0) -> Regimen:
    return PAPER.arm(arm).build(seed, settings)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of scale quick, of some arms."""
    out = tmp_path_factory.mktemp("dual-rl") / "quick"
    arms = ["bc_expert", "recoil", "bc", "xql", "tv", "xql_plain_stress", "chi2_stress"]
    run_experiment(Plan(partial(papers.load, PAPER.slug), out, scale="quick", arms=arms, workers=1))
    return out


# The smoke test


def test_arms_are_trained_and_claims_computed(quick: Path) -> None:
    results = read_results(quick)
    assert results["failures"] == []
    computed = {claim["name"]: claim for claim in results["claims"]}
    assert {"recoil-bc_expert", "share", "gradients", "tv-xql"} <= computed.keys()
    assert all(claim["missing"] == {} for claim in computed.values())
    spent = {arm: found["0"] for arm, found in results["arms"].items()}
    assert spent["recoil"]["rows"] == spent["bc_expert"]["rows"] == 60 * 256
    assert spent["recoil"]["gradient_steps"] == 3 * spent["bc_expert"]["gradient_steps"] == 180
    assert spent["tv"]["gradient_steps"] == spent["xql"]["gradient_steps"] == 90


def test_a_few_updates_of_recoil_tell_the_expert_from_chance(quick: Path) -> None:
    assert read_results(quick)["arms"]["recoil"]["0"]["final"]["expert/worth"] > 0.1


# What arms differ in


@pytest.mark.parametrize("arm", LEARNED)
def test_a_value_a_policy_and_a_critic_are_updated_in_this_order(arm: str) -> None:
    stage = built(arm).stages[0]
    assert [list(update.members) for update in stage.updates] == [["value"], ["policy"], ["critic"]]
    assert all(update.max_grad_norm is None for update in stage.updates)


def test_control_arms_differ_in_the_maximiser_alone() -> None:
    one, other = built("xql"), built("tv")
    mine, theirs = ([update for update in regimen.stages[0].updates] for regimen in (one, other))
    assert mine[1:] == theirs[1:]
    assert dataclasses.replace(mine[0], objective=theirs[0].objective) == theirs[0]
    assert mine[0].objective.f == Gumbel(0.5, clip=7.0, rescale=True)  # type: ignore[attr-defined]
    assert theirs[0].objective.f == TotalVariation(0.8)  # type: ignore[attr-defined]
    weights = [regimen.cast["policy"].state_dict() for regimen in (one, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    data = [regimen.stages[0].tasks[0].rows for regimen in (one, other)]  # type: ignore[attr-defined]
    assert bool((data[0] == data[1]).all())


def test_under_stress_rewards_grow_and_the_policys_weights_do_not() -> None:
    calm, stressed = built("chi2").stages[0], built("chi2_stress").stages[0]
    assert stressed.updates[0].objective.f == calm.updates[0].objective.f == ChiSquare(0.7)  # type: ignore[attr-defined]
    factor = stressed.updates[1].objective.inverse_temperature  # type: ignore[attr-defined]
    assert factor * TINY.stress == pytest.approx(TINY.inverse_temperature * TINY.reward_scale)


def test_recoil_is_shown_no_reward() -> None:
    stage = built("recoil").stages[0]
    assert stage.reward is None
    for task in stage.tasks:
        assert list(task.rows["step_columns"].keys()) == ["next_observations"]  # type: ignore[attr-defined]
    assert isinstance(built("tv").stages[0].reward, EnvironmentReward) is False  # It is weighted.


def test_random_walks_hold_no_step_of_the_expert() -> None:
    """They start anywhere and every move is as likely, wherever it leads."""
    world = CornerGrid()
    other = built("recoil", QUICK).stages[0].tasks[1].rows  # type: ignore[attr-defined]
    moves = world.visits(other).sum(0)
    assert moves.tolist() == pytest.approx([0.25] * 4, abs=0.02)


def test_cloning_all_data_reads_each_source_in_its_proportion() -> None:
    stage = built("bc_all", QUICK).stages[0]
    assert stage.knobs["mixture/expert"] == pytest.approx(2 / 152)
    assert built("bc_expert", QUICK).stages[0].knobs["mixture/other"] == 0


def test_a_cell_never_seen_acts_uniformly_unless_cells_share_a_bias() -> None:
    settings = dataclasses.replace(QUICK, imitation_steps=100)
    world, unseen = CornerGrid(), 56  # The expert does not pass the corner at the lower left.
    spread = {}
    for arm in ("bc_expert", "bc_shared"):
        outcome = train(built(arm, settings), listener=lambda event: None)
        chances = world.probabilities(outcome.cast["policy"])[unseen]
        spread[arm] = float(chances.max() - chances.min())
    assert spread["bc_expert"] < 0.02 < 0.3 < spread["bc_shared"]


# Claims


def test_claims_by_hand() -> None:
    def result(worth: float, gradient: float) -> ArmResult:
        metrics = {"expert/worth": worth, "expert/expert_share": worth / 0.6}
        evaluation = {"stage": "s", "metrics": metrics}
        return ArmResult([evaluation], 0, 0, 0, 0.0, gradients={"value": gradient})

    seed = {"recoil": result(0.54, 5.0), "bc_expert": result(0.3, 500.0)}
    assert gain("expert/worth", "recoil", "bc_expert", seed) == pytest.approx(0.24)
    assert share(seed) == pytest.approx(0.9)
    assert tamer("recoil", "bc_expert", seed) == pytest.approx(2.0)


# Resume


class Stop:
    """Asks the loop to stop after some steps."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __call__(self, event: Event) -> None:
        if event.kind == "step" and event.step == self.at:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("arm", ["recoil", "xql_stress"])
def test_a_run_that_was_stopped_goes_on_to_the_same_numbers(arm: str, tmp_path: Path) -> None:
    def run(name: str, **options: Any) -> Outcome:
        return train(built(arm), seed=3, out=tmp_path / name, **{"listener": lambda event: None, **options})

    whole = run("whole")
    with pytest.raises(Interrupted):
        run("parts", listener=Stop(2))
    parts = run("parts", resume=True)
    assert parts.evaluations[-1]["metrics"] == whole.evaluations[-1]["metrics"]
    for member in ("policy", "critic", "value"):
        for mine, other in zip(whole.cast[member].parameters(), parts.cast[member].parameters(), strict=True):
            assert torch.equal(mine, other)


# The real thing


@pytest.mark.skipif(importlib.util.find_spec("minari") is None, reason="needs minari")
def test_the_full_scale_reads_a_data_set_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    import minari
    from minari.data_collector import EpisodeBuffer

    rng = np.random.default_rng(0)
    episodes = [
        EpisodeBuffer(
            id=number,
            observations=rng.uniform(-1, 1, (11, 3)).astype(np.float32),
            actions=rng.uniform(-2, 2, (10, 1)).astype(np.float32),
            rewards=list(rng.uniform(-1, 0, 10)),
            terminations=[False] * 10,
            truncations=[False] * 9 + [True],
        )
        for number in range(3)
    ]
    minari.create_dataset_from_buffers("mujoco/hopper/medium-v0", episodes, env="Pendulum-v1")
    full = dataclasses.replace(PAPER.scales["full"], device="cpu", width=8, steps=2, batch=16, trials=1)
    outcome = train(built("chi2", full), listener=lambda event: None)
    assert outcome.counters.rows == 32
    assert math.isfinite(outcome.evaluations[-1]["metrics"]["control/return"])
