"""Train Long, Think Short: what its arms share, what the budget does, and the way from real rows to a checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from regimen import Cast, Regimen, Rollout, Stage, train
from regimen.controllers import Constant, Curve, Exponential, Steps
from regimen.lab.experiment import ArmResult
from regimen.lab.runner import Plan, run_experiment
from regimen.papers import load
from regimen.papers import train_long_think_short as paper
from regimen.tasks.worlds.chains import ChainsWorld, solved
from regimen.tasks.worlds.gsm8k import GSM8KWorld, final_numbers
from tiny_language_models import language_model, save, tokenizer

EXAMPLE = Path(__file__).parents[2] / "examples" / "gsm8k.py"
TINY = paper.Settings(fact_steps=2, trace_steps=2, steps=8, batch_size=16, group_size=4, evaluate_every=100)
ROWS = [{"question": f"What is {a} + {a}?", "answer": f"{a} and {a} make {2 * a}.\n#### {2 * a}"} for a in range(1, 9)]


def steps_of(regimen: Regimen, seed: int = 0) -> list[dict[str, float]]:
    """The metrics of every step."""
    seen: list[dict[str, float]] = []
    train(regimen, seed=seed, listener=lambda event: seen.append(dict(event.metrics)) if event.kind == "step" else None)
    return seen


def budgets(build: Callable[[int, paper.Settings], Regimen]) -> list[float]:
    return [step["knob/token_budget"] for step in steps_of(build(0, TINY))]


def test_the_budget_falls_in_equal_factors_and_the_baseline_has_the_last_one() -> None:
    assert budgets(paper.curriculum) == [48, 48, 38, 38, 30, 30, 24, 24]
    assert budgets(paper.linear) == [48, 48, 40, 40, 32, 32, 24, 24]
    assert budgets(paper.fixed) == [24] * 8


def test_prompt_and_judge_agree_on_the_budget_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[set[str], set[float]]] = []
    regimen = paper.curriculum(0, TINY)
    task = regimen.stages[0].tasks[0]
    collect = task.collect

    def spied(*words: Any, **named: Any) -> Rollout:
        rollout = collect(*words, **named)
        stated = {prompt.split()[-2] for prompt in rollout.context["prompt"].tolist()}
        seen.append((stated, set(rollout.knobs["token_budget"].tolist())))
        return rollout

    monkeypatch.setattr(task, "collect", spied)
    train(regimen, listener=lambda event: None)
    assert seen == [({f"<{budget}>"}, {float(budget)}) for budget in (48, 48, 38, 38, 30, 30, 24, 24)]


@pytest.mark.parametrize("curve", [Exponential(24, 1.0), Steps(24, 24, 0, 8)], ids=["exponential", "no drops"])
def test_a_schedule_that_does_not_move_is_the_fixed_arm_bit_for_bit(curve: Curve) -> None:
    moved, fixed = (steps_of(paper.reinforced(0, TINY, c, 24)) for c in (curve, Constant(24)))
    assert moved == fixed


def test_without_a_length_weight_the_length_trains_nothing() -> None:
    metrics = steps_of(paper.no_length(0, TINY))
    assert all(m["knob/weight/length"] == 0 for m in metrics)
    expected = [0.6 * m["reward/questions/correct"] + 0.1 * m["reward/questions/format"] for m in metrics]
    assert [m["reward/total"] for m in metrics] == pytest.approx(expected, abs=1e-6)


def test_arms_differ_in_their_schedule_and_reward_alone() -> None:
    def sizes(build: Callable[[int, paper.Settings], Regimen]) -> tuple[Any, ...]:
        (stage,) = build(0, paper.Settings()).stages
        return stage.steps, stage.batch_size, stage.tasks[0].group_size, stage.updates[0].learning_rate

    arms = [arm for arm in load("train-long-think-short").arms if arm.start]
    assert len({sizes(arm.build) for arm in arms}) == 1
    assert all(arm.start == "base" for arm in arms)


def test_held_out_questions_are_never_trained_on() -> None:
    world = ChainsWorld(3, held_out=100)
    trained = {row["question"] for row in world.rows(2000, 0)}
    assert len({row["question"] for row in world.test}) == 100
    assert not trained & {row["question"] for row in world.test}


def test_an_answer_must_have_come_to_its_end() -> None:
    texts = ["</think> <answer> 3 </answer>", "</think> <answer> 3", "<answer> 3 </answer> 1", "<answer> 2 </answer>"]
    rollout = Rollout.create(
        task="questions",
        group=torch.arange(4),
        mask=torch.ones(4, 2, dtype=torch.bool),
        columns={"text": texts, "answer": ["3"] * 4, "truncated": torch.zeros(4, dtype=torch.bool)},
    )
    assert solved(rollout).tolist() == [True, False, False, False]
    assert not solved(rollout.with_columns(truncated=torch.ones(4, dtype=torch.bool))).any()


def result(accuracy: float, tokens: float) -> ArmResult:
    metrics = {"questions/accuracy": accuracy, "questions/tokens": tokens, "questions/accuracy_cut": accuracy}
    return ArmResult([{"stage": "reinforce", "step": 1, "iterations": 1, "metrics": metrics}], 0, 0, 0, 0.0)


def test_claims_are_computed_as_stated() -> None:
    arms = {"base": (0.8, 60), "fixed": (0.9, 25), "curriculum": (0.95, 24), "no_length": (0.97, 58)}
    seed = {name: result(*numbers) for name, numbers in arms.items()}
    values = {c.name: c.value(seed) for c in paper.PAPER.claims if set(c.arms) <= set(seed)}
    assert values == pytest.approx(
        {"more_accurate": 0.05, "as_long": 0.15 - 0.04, "shorter_than_start": 36, "length_reward_shortens": 33}
    )
    assert [claim.name for claim in paper.PAPER.claims if claim.judged] == ["more_accurate", "as_long"]


def test_quick_scale_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGIMEN_CACHE", str(tmp_path / "cache"))
    plan = Plan(partial(load, "train-long-think-short"), tmp_path / "out", scale="quick", workers=2)
    results = run_experiment(plan)
    assert not results["failures"]
    spent = {arm: seeds["0"]["samples"] for arm, seeds in results["arms"].items()}
    assert spent == {"base": 0, "fixed": 256, "curriculum": 256, "no_length": 256}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(tmp_path / "model", language_model("qwen2", max_position_embeddings=1024), tokenizer())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_full_scale_trains_only_adapters_of_a_model_from_disk(model: Path, data: Path) -> None:
    pytest.importorskip("peft")
    settings = replace(
        paper.PAPER.scales["full"], model=str(model), train=str(data), test=str(data), device="cpu", dtype="float32",
        lora_rank=2, steps=1, batch_size=4, group_size=2, max_new_tokens=8, start_budget=8, final_budget=4,
        learning_rate=1e-2,
    )  # fmt: skip
    regimen = paper.curriculum(0, settings)
    policy = regimen.cast["policy"]
    # Random answers earn nothing, so that their length is all there is to learn from.
    before = {name: value.detach().clone() for name, value in policy.named_parameters()}
    (stage,) = regimen.stages
    stage = replace(stage, reward=LengthOnly())
    train(Regimen(Cast(policy=policy), [stage], evaluations=[]), listener=lambda event: None)
    changed = {name for name, value in policy.named_parameters() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def LengthOnly() -> Any:
    from regimen.rewards import FunctionReward

    return FunctionReward(lambda rollout: torch.arange(len(rollout)).float(), "place")


def test_the_example_runs_on_rows_of_ones_own_and_goes_on(model: Path, data: Path, tmp_path: Path) -> None:
    def run() -> str:
        words = [sys.executable, str(EXAMPLE), str(model), str(data), str(tmp_path / "run")]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = run()
    assert "questions/accuracy" in first
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    told = [json.loads(line)["metrics"].get("knob/token_budget") for line in metrics.splitlines() if '"step"' in line]
    assert [b for b in told if b] == [64.0] * 5 + [40.0] * 5 + [25.0] * 5 + [16.0] * 5
    assert run() == first, "a finished run is not trained again"
    assert len(EXAMPLE.read_text().splitlines()) < 40


def test_rows_without_a_final_number_are_named() -> None:
    with pytest.raises(ValueError, match=r"mine.jsonl, row 2: .*expected a `question`"):
        final_numbers([ROWS[0], {"question": "?", "answer": "no mark"}], "mine.jsonl")
    assert final_numbers(ROWS[:1]) == [{"question": "What is 1 + 1?", "answer": "2"}]


def test_the_worlds_answer_to_one_interface(model: Path, data: Path) -> None:
    for world in (ChainsWorld(0), GSM8KWorld(str(model), str(data), str(data), dtype="float32")):
        task = world.questions(2, 8)
        assert task.name == "questions"
        assert [knob.name for knob in task.knobs] == ["token_budget"]
        assert isinstance(Stage("one", [task], 0), Stage)
