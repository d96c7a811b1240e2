"""ArCHer: its smoke test, arms that collect as much, a warm-up without a step, exact resume, and the real classes."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from regimen import papers
from regimen.credit import CriticAdvantage
from regimen.lab.experiment import ArmResult
from regimen.lab.jobs import run_folder
from regimen.lab.results import read_results
from regimen.lab.runner import Plan, run_experiment
from regimen.loop import Interrupted, train
from regimen.papers.archer import PAPER, Settings, ahead, archer, base, baselined, less_expected, replayed
from regimen.progress import Event
from regimen.runs import read_metrics

QUICK: Settings = PAPER.scales["quick"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of scale quick, all of it."""
    out = tmp_path_factory.mktemp("archer") / "quick"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGIMEN_CACHE", str(out.parent / "cache"))
        run_experiment(Plan(partial(papers.load, PAPER.slug), out, scale="quick"))
    return out


def logged(out: Path, arm: str) -> list[dict[str, Any]]:
    return [record for record in read_metrics(run_folder(out, arm, 0) / "metrics.jsonl") if record["kind"] == "step"]


def test_every_arm_is_trained_and_evaluated(quick: Path) -> None:
    results = read_results(quick)
    assert results["failures"] == []
    assert list(results["arms"]) == [arm.name for arm in PAPER.arms if not arm.extended]
    for seeds in results["arms"].values():
        assert PAPER.metrics.keys() <= seeds["0"]["final"].keys()
    assert [claim["name"] for claim in results["claims"]] == [claim.name for claim in PAPER.claims]


def test_arms_start_alike_and_collect_as_much(quick: Path) -> None:
    arms = {name: seeds["0"] for name, seeds in read_results(quick)["arms"].items()}
    for name, arm in arms.items():
        if name != "base":
            assert arm["evaluations"][0]["metrics"] == arms["base"]["final"]
            assert arm["own"]["samples"] == QUICK.episodes * QUICK.iterations


def test_the_actor_waits_for_the_critic(quick: Path) -> None:
    for arm in ("archer", "newest"):
        records = logged(quick, arm)
        assert ["policy/loss" in record["metrics"] for record in records] == [False] * 2 + [True] * 3
        assert all(record["metrics"]["critic/q_loss"] < 10 for record in records)
        steps = QUICK.critic_steps * 5 + QUICK.actor_steps * 3
        assert (records[-1]["gradient_steps"], records[-1]["drawn"]) == (steps, steps * QUICK.batch)


def test_the_baseline_of_tokens_is_what_is_taken_off_the_critics_advantage() -> None:
    """And drawn to that advantage, one head beside the policy, in an arm that is trained only when asked for."""
    regimen = baselined(0, QUICK)
    cast, stage = regimen.cast, regimen.stages[0]
    knobs = {knob.name: knob.default for knob in (*cast["policy"].knobs, *stage.tasks[0].knobs)}
    turns = stage.tasks[0].collect(cast, knobs, torch.Generator().manual_seed(0), 4)
    tokens = less_expected(turns, knobs, cast)
    own = tokens.loss_mask
    expected = cast["baseline"](cast["policy"].distribution(tokens).hidden)
    judged = CriticAdvantage()(turns, knobs, cast).advantages[turns.loss_mask]
    assert torch.equal(tokens["value_target"][own], judged.repeat_interleave(own.sum(1)))
    assert torch.allclose(tokens.advantages[own], (tokens["value_target"] - expected)[own])
    assert not tokens.advantages[~own].any()
    assert not tokens.advantages.requires_grad
    assert [update.members for update in stage.updates] == [["critic"], ["policy", "baseline"]]
    assert PAPER.arm("baseline").extended


def test_claims_compare_the_curves() -> None:
    def result(*returns: float) -> ArmResult:
        return ArmResult([{"stage": "s", "metrics": {"game/return": value}} for value in returns], 0, 0, 0, 0.0)

    assert ahead("archer", "ppo", {"archer": result(-4, -2), "ppo": result(-4, -3)}) == pytest.approx(0.5)


def test_an_interrupted_run_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    """The replay memory, both optimisers and the averaged critic come back."""

    def run(out: Path, stop_at: int | None, resume: bool) -> None:
        def stop(event: Event) -> None:
            if event.kind == "step" and event.step == stop_at:
                raise Interrupted

        torch.manual_seed(0)
        settings = dataclasses.replace(QUICK, iterations=4, critic_steps=2, warm_up=1)
        train(archer(replayed, 0, settings), out=out, resume=resume, checkpoint_every=2, listener=stop)

    run(tmp_path / "whole", None, False)
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", 3, False)
    run(tmp_path / "cut", None, True)
    whole, cut = (
        [{k: v for k, v in r.items() if k != "time"} for r in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "cut")
    )
    assert whole == cut


def test_imitation_learns_whom_it_imitates() -> None:
    outcome = train(base(0, dataclasses.replace(QUICK, imitation_steps=60)), listener=lambda event: None)
    first, last = (record["metrics"]["game/return"] for record in outcome.evaluations)
    assert last > first
