"""AMFT: its smoke test, arms that spend the same, a weight that moves within bounds, and the path to real models."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from regimen import papers
from regimen.lab.experiment import ArmResult
from regimen.lab.jobs import run_folder
from regimen.lab.results import read_results
from regimen.lab.runner import Plan, run_experiment
from regimen.loop import Interrupted, train
from regimen.papers.amft import FIXED, PAPER, Parts, Settings, ahead, amft, fixed
from regimen.progress import Event
from regimen.rewards import Scene, judge
from regimen.rollout import Rollout
from regimen.runs import read_metrics
from regimen.tasks.worlds.solved_problems import SolvedProblemsWorld
from tiny_language_models import language_model, save, tokenizer

QUICK: Settings = PAPER.scales["quick"]
MIXED = (*FIXED, "entropy_only", "amft")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of scale quick, all of it."""
    out = tmp_path_factory.mktemp("amft") / "quick"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGIMEN_CACHE", str(out.parent / "cache"))
        run_experiment(Plan(partial(papers.load, PAPER.slug), out, scale="quick"))
    return out


def logged(out: Path, arm: str) -> list[dict[str, float]]:
    records = read_metrics(run_folder(out, arm, 0) / "metrics.jsonl")
    return [record["metrics"] for record in records if record["kind"] == "step"]


def test_every_arm_is_trained_and_evaluated(quick: Path) -> None:
    results = read_results(quick)
    assert results["failures"] == []
    assert list(results["arms"]) == [arm.name for arm in PAPER.arms]
    for seeds in results["arms"].values():
        assert seeds["0"]["final"].keys() == PAPER.metrics.keys()
    assert [claim["name"] for claim in results["claims"]] == [claim.name for claim in PAPER.claims]


def test_arms_start_alike_take_as_many_steps_and_sample_as_much(quick: Path) -> None:
    arms = {name: seeds["0"] for name, seeds in read_results(quick)["arms"].items()}
    for name, arm in arms.items():
        if name != "base":
            assert arm["evaluations"][0]["metrics"] == arms["base"]["final"]
            assert arm["own"]["gradient_steps"] == QUICK.steps
    assert {arms[name]["own"]["samples"] for name in (*MIXED, "reinforcement", "sequence")} == {
        QUICK.steps * QUICK.answers
    }
    assert {arms[name]["own"]["rows"] for name in MIXED} == {QUICK.steps * QUICK.demonstrations}
    assert arms["imitation"]["own"]["samples"] == 0


def test_the_weight_moves_within_its_bounds_and_fixed_ones_stay(quick: Path) -> None:
    moved = [metrics["knob/sft_weight"] for metrics in logged(quick, "amft")]
    assert len(set(moved)) > 2
    assert all(QUICK.low <= mu <= QUICK.high for mu in moved)
    assert {metrics["knob/sft_weight"] for metrics in logged(quick, "fixed_20")} == {0.2}
    assert all("adapt/meta_gradient" in metrics for metrics in logged(quick, "amft"))
    assert all(metrics["adapt/meta_move"] == 0 for metrics in logged(quick, "entropy_only"))


def test_what_demonstrations_are_worth_does_not_scale_the_advantages_of_answers() -> None:
    """They are judged in the same batch, and most are right where few answers are."""
    regimen = fixed(0.5, 0, QUICK)
    (stage,) = regimen.stages
    board, rng = stage.board(regimen.cast, {}), torch.Generator().manual_seed(0)
    parts = [task.collect(regimen.cast, board, rng, 16) for task in stage.tasks]
    rollout, _ = judge(stage.reward, Rollout.cat(parts), Scene(regimen.cast, board))
    answers = torch.arange(len(rollout)) < 16
    rewards = torch.where(answers, torch.arange(len(rollout)) % 4 == 0, rollout.reward)
    found = []
    for shown in (rewards, torch.where(answers, rewards, 0), torch.where(answers, rewards, rewards - 7)):
        advantages = stage.credit(rollout.replace(reward=shown), board, regimen.cast).advantages
        assert not bool(advantages[~answers].any())
        found.append(advantages[answers])
    assert bool(found[0].any())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_claims_compare_solve_rates() -> None:
    def result(solved: float) -> ArmResult:
        return ArmResult([{"stage": "mixed", "metrics": {"questions/solved": solved}}], 0, 0, 0, 0.0)

    seed = {name: result(rate) for name, rate in zip(FIXED, (0.2, 0.5, 0.8), strict=True)} | {"amft": result(0.6)}
    assert ahead(FIXED, seed) == pytest.approx(0.1)
    assert ahead(("fixed_80",), seed, slack=0.03) == pytest.approx(-0.17)


def test_the_probe_asks_questions_that_no_arm_trains_or_is_evaluated_on() -> None:
    parts = Parts(0, QUICK)
    (stage,) = amft(0, QUICK).stages
    probed = set(parts.probe().task.rows["question"].tolist())
    trained = {question for task in stage.tasks for question in task.rows["question"].tolist()}
    assert not probed & trained
    assert not probed & {row["question"] for row in parts.world.splits["test"]}


# The real models


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny model of Qwen2's class and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    return str(save(folder, language_model("qwen2", max_position_embeddings=256), tokenizer()))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Problems as a JSON-lines file."""
    path = tmp_path_factory.mktemp("rows") / "problems.jsonl"
    problems = [
        {"question": f"{n} + 1", "solution": f"It is \\boxed{{{n + 1}}}", "answer": str(n + 1), "source": "test"}
        for n in range(30)
    ]
    path.write_text("\n".join(map(json.dumps, problems)))
    return str(path)


def solving(model: str, rows: str, **changes: Any) -> Settings:
    full = PAPER.scales["full"]
    return dataclasses.replace(
        full, model=model, train=rows, test=rows, device="cpu", dtype="float32", warm_up=1, steps=4, answers=8,
        group_size=2, demonstrations=4, probe=4, every=2, max_new_tokens=6, held_out=4, lora_rank=None,
        **changes,
    )  # fmt: skip


def test_the_full_scale_runs_on_a_small_model_and_goes_on_after_an_interruption(
    model: str, rows: str, tmp_path: Path
) -> None:
    pytest.importorskip("math_verify")

    def weights(out: Path, **options: Any) -> dict[str, torch.Tensor]:
        outcome = train(amft(0, solving(model, rows)), seed=0, out=out, checkpoint_every=1, **options)
        assert outcome.counters.samples == 4 * 8
        return outcome.cast["policy"].state_dict()

    def stop(event: Event) -> None:
        if event.kind == "step" and event.step == 3:
            raise Interrupted

    whole = weights(tmp_path / "whole")
    with pytest.raises(Interrupted):
        weights(tmp_path / "halved", listener=stop)
    halved = weights(tmp_path / "halved", resume=True)
    assert all(torch.equal(whole[name], halved[name]) for name in whole)


def test_the_full_scale_trains_and_asks_about_adapters_alone(model: str, rows: str) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("math_verify")
    regimen = amft(0, dataclasses.replace(solving(model, rows), lora_rank=2, steps=2))
    policy = regimen.cast["policy"]
    before = {name: value.clone() for name, value in policy.named_parameters()}
    train(regimen, seed=0)
    changed = {name for name, value in policy.named_parameters() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_every_arm_of_the_full_scale_fits_together(model: str, rows: str) -> None:
    for arm in PAPER.arms:
        regimen = arm.build(0, solving(model, rows))
        assert [task.name for task in regimen.evaluated()] == ["questions"]


def test_splits_of_real_problems_share_no_question(rows: str) -> None:
    splits = SolvedProblemsWorld("", rows, rows).splits
    questions = [{row["question"] for row in split} for split in splits.values()]
    assert len(set.union(*questions)) == sum(map(len, questions)) == 30
    assert all(questions)
