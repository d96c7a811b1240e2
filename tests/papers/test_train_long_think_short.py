"""Train Long, Think Short: its smoke test, budgets that move, prompt and judge that agree, and the path to GSM8K."""

from __future__ import annotations

import dataclasses
import json
import runpy
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import NonTensorStack, TensorDict

from regimen import papers
from regimen.cast import Cast
from regimen.controllers import Constant, Exponential, Steps
from regimen.controllers.curves import Curve
from regimen.credit import GroupRelativeAdvantage
from regimen.lab.experiment import ArmResult
from regimen.lab.jobs import run_folder
from regimen.lab.results import read_results
from regimen.lab.runner import Plan, run_experiment
from regimen.loop import Interrupted, train
from regimen.objectives import ClippedSurrogateObjective
from regimen.papers.train_long_think_short import PAPER, Parts, Settings, curriculum, difference, length_margin
from regimen.progress import Event
from regimen.regimen import Regimen
from regimen.rewards import FunctionReward
from regimen.rewards.base import Expression
from regimen.rewards.text import triangular_length
from regimen.rollout import Rollout
from regimen.runs import read_metrics
from regimen.tasks.worlds import chains, gsm8k
from regimen.tasks.worlds.budgeted import tokens
from regimen.tasks.worlds.chains import ChainsWorld
from regimen.tasks.worlds.gsm8k import GSM8KWorld, final_numbers
from regimen.update import Epochs
from tiny_language_models import language_model, save, tokenizer

QUICK: Settings = PAPER.scales["quick"]
TRAINED = ("fixed", "curriculum", "no_length")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of scale quick, all of it."""
    out = tmp_path_factory.mktemp("train-long-think-short") / "quick"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGIMEN_CACHE", str(out.parent / "cache"))
        run_experiment(Plan(partial(papers.load, PAPER.slug), out, scale="quick"))
    return out


def budgets(out: Path, arm: str) -> list[float]:
    """The budget in force, by iteration."""
    records = read_metrics(run_folder(out, arm, 0) / "metrics.jsonl")
    return [record["metrics"]["knob/token_budget"] for record in records if record["kind"] == "step"]


# The smoke test


def test_every_arm_but_the_extended_ones_is_trained_and_evaluated(quick: Path) -> None:
    results = read_results(quick)
    assert results["failures"] == []
    assert list(results["arms"]) == ["base", *TRAINED]
    for seeds in results["arms"].values():
        assert seeds["0"]["final"].keys() == PAPER.metrics.keys()
    assert [claim["name"] for claim in results["claims"]] == [c.name for c in PAPER.claims if c.name != "length_heavy"]


def test_the_budget_shrinks_to_48_38_30_24(quick: Path) -> None:
    assert budgets(quick, "curriculum") == [48, 48, 38, 38, 30, 30, 24, 24]
    assert budgets(quick, "fixed") == budgets(quick, "no_length") == [24] * 8


def test_arms_start_alike_and_spend_the_same(quick: Path) -> None:
    arms = {name: seeds["0"] for name, seeds in read_results(quick)["arms"].items()}
    for name in TRAINED:
        assert arms[name]["evaluations"][0]["metrics"] == arms["base"]["final"]
        assert arms[name]["own"]["samples"] == QUICK.steps * QUICK.batch_size
        assert arms[name]["own"]["gradient_steps"] == QUICK.steps
        assert arms[name]["rows"] == arms["base"]["own"]["rows"] > 0


def test_every_arm_is_evaluated_under_the_final_budget(quick: Path) -> None:
    for name in ("base", *TRAINED):
        shown = list((run_folder(quick, name, 0) / "samples").glob("*-questions-answers.txt"))
        assert shown
        for path in shown:
            prompts = path.read_text().split("\n")[::2]
            assert len(prompts) == 8
            assert all(prompt.endswith(" <24> <think>") for prompt in prompts)


# Budgets: what is stated is what is judged, and equal schedules are equal runs


def small(**changes: Any) -> Settings:
    return dataclasses.replace(Settings(steps=8, batch_size=8, group_size=4, max_new_tokens=12), **changes)


def reinforced(settings: Settings, curve: Curve, reward: Expression | None = None) -> tuple[Parts, Any]:
    """A short run of one arm, from random weights."""
    parts = Parts(3, settings)
    reward = parts.judged(0.6, 0.3, "triangular") if reward is None else reward
    stage = parts.reinforce(curve, reward, settings.final_budget)
    train(Regimen(parts.cast, [stage], evaluations=[]), seed=5)
    return parts, parts.cast["policy"].state_dict()


def test_the_prompt_states_the_budget_that_the_judge_uses_also_where_it_moves() -> None:
    seen: list[tuple[set[int], set[float], bool]] = []

    def probe(rollout: Rollout) -> torch.Tensor:
        stated = [int(prompt.split("<")[1].split(">")[0]) for prompt in rollout.context["prompt"].tolist()]
        expected = triangular_length(tokens(rollout).float(), torch.tensor(stated))
        agrees = torch.equal(expected, rollout_length(rollout))
        seen.append((set(stated), set(rollout.knobs["token_budget"].tolist()), agrees))
        return torch.zeros(len(rollout))

    settings = small()
    judge = Parts(3, settings).judged(0.6, 0.3, "triangular")
    length = next(leaf for leaf in judge.leaves() if leaf.name == "length")

    def rollout_length(rollout: Rollout) -> torch.Tensor:
        return length.score(rollout, None)

    curve = Steps(48, 24, 3, settings.steps)
    reinforced(settings, curve, judge + FunctionReward(probe, "probe").logged())
    assert [stated for stated, _, _ in seen] == [{48}, {48}, {38}, {38}, {30}, {30}, {24}, {24}]
    assert all(stated == in_force and agrees for stated, in_force, agrees in seen)


def test_schedules_that_are_constant_give_the_run_of_the_constant_bit_by_bit() -> None:
    settings = small(steps=4)
    _, expected = reinforced(settings, Constant(24))
    for curve in (Exponential(24, gamma=1.0, every=2, staircase=True), Steps(24, 24, 0, settings.steps)):
        _, found = reinforced(settings, curve)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    _, other = reinforced(settings, Constant(12))
    assert not all(torch.equal(other[name], expected[name]) for name in expected)


def test_a_length_weight_of_0_is_reinforcement_without_a_length_term() -> None:
    settings = small(steps=4)
    parts = Parts(3, settings)
    answer, _, form = parts.judged(0.6, 0.0, "triangular").leaves()
    _, without = reinforced(settings, Constant(24), 0.6 * answer + 0.1 * form)
    _, zero = reinforced(settings, Constant(24), parts.judged(0.6, 0.0, "triangular"))
    _, some = reinforced(settings, Constant(24))
    assert all(torch.equal(without[name], zero[name]) for name in without)
    assert not all(torch.equal(some[name], zero[name]) for name in zero)


@pytest.mark.parametrize("arm", [arm.name for arm in PAPER.arms if arm.start])
def test_every_budget_of_every_arm_is_one_word(arm: str) -> None:
    settings = small(steps=100)
    (stage,) = PAPER.arm(arm).build(0, settings).stages
    (schedule,) = stage.controllers
    policy = ChainsWorld(0).policy()
    unknown = policy.tokenizer.unk_token_id
    for budget in {int(schedule.curve(step) + 1e-9) for step in range(100)}:
        prompt = policy.encode(chains.TEMPLATE.format(question="1 + 2 - 3 + 4", token_budget=budget))
        assert len(prompt) == 1 + 7 + 2
        assert unknown not in prompt


def test_the_default_settings_are_those_of_the_page() -> None:
    s = Settings()
    assert PAPER.scales["default"] == s
    (stage,) = PAPER.arm("curriculum").build(0, dataclasses.replace(s, held_out=9)).stages
    assert (stage.steps, stage.batch_size, stage.tasks[0].group_size) == (100, 24 * 8, 8)
    assert stage.credit == GroupRelativeAdvantage(std="group", ddof=0, eps=1e-4)
    (update,) = stage.updates
    assert update.objective == ClippedSurrogateObjective(clip=0.2, aggregate="sequence")
    assert (update.learning_rate, update.batches, s.max_new_tokens, s.held_out) == (3e-4, Epochs(1, 1), 80, 500)
    (schedule,) = stage.controllers
    assert [int(schedule.curve(step) + 1e-9) for step in (0, 24, 25, 50, 75, 99)] == [48, 48, 38, 30, 24, 24]
    full = PAPER.scales["full"]
    assert (full.steps, full.group_size, full.start_budget, full.final_budget, full.drops) == (600, 8, 256, 87, 3)
    assert full.max_new_tokens == 2 * full.start_budget


def test_arms_differ_in_budget_and_reward_alone() -> None:
    settings = small()
    stages = {arm.name: arm.build(0, settings).stages[0] for arm in PAPER.arms if arm.start}
    first = stages["fixed"]
    for stage in stages.values():
        assert (stage.steps, stage.batch_size, stage.credit) == (first.steps, first.batch_size, first.credit)
        assert stage.updates == first.updates
        assert [type(c) for c in stage.controllers] == [type(c) for c in first.controllers]
    assert stages["curriculum"].controllers[0].curve == Steps(48, 24, 3, 8)
    assert stages["linear"].controllers[0].curve == Steps(48, 24, 3, 8, "linear")
    assert stages["tight_fixed"].controllers[0].curve == Constant(16)

    def weights(name: str) -> dict[str, float]:
        return {k.name: k.default for k in stages[name].reward.knobs if k.name.startswith("weight/")}

    usual = {"weight/correct": 0.6, "weight/length": 0.3, "weight/format": 0.1}
    assert weights("fixed") == weights("curriculum") == weights("band") == usual
    assert weights("no_length") == usual | {"weight/length": 0.0}
    assert (
        weights("heavy_fixed")
        == weights("heavy_curriculum")
        == usual
        | {
            "weight/correct": 0.3,
            "weight/length": 0.6,
        }
    )


# The world of chains


def test_held_out_questions_are_never_trained_on() -> None:
    world = ChainsWorld(1, held_out=300)
    tested = {row["question"] for row in world.test}
    assert len(tested) == len(world.test) == 300
    drawn = world.rows(3000, 7) + world.rows(3000, 8, restate=4)
    assert len(drawn) == 6000
    assert not tested & {row["question"] for row in drawn}


def test_announced_budgets_have_nothing_to_do_with_the_length_of_a_trace() -> None:
    world = ChainsWorld(2, held_out=50)
    table = world.traces(world.policy(), 4000).rows
    lengths = table["loss_mask"].sum(1).double()
    prompt = 1 + 7 + 2
    budget = table["actions"][:, prompt - 2].double()
    assert set(budget.long().tolist()) == set(range(int(budget.min()), int(budget.min()) + 48))
    assert abs(float(torch.corrcoef(torch.stack([lengths, budget]))[0, 1])) < 0.05
    assert (int(lengths.min()), int(lengths.max())) == (3 * 6 + 5, 4 * 3 * 6 + 5)


def answered(text: str, truncated: bool = False, answer: str = "3", length: int = 4) -> Rollout:
    return Rollout.create(
        task="questions",
        group=torch.zeros(1, dtype=torch.int64),
        mask=torch.ones(1, length, dtype=torch.bool),
        columns={
            "text": NonTensorStack(text),
            "answer": NonTensorStack(answer),
            "truncated": torch.tensor([truncated]),
        },
    )


@pytest.mark.parametrize(
    ("text", "truncated", "right"),
    [
        ("1 + 2 = 3 ; </think> <answer> 3 </answer>", False, True),
        ("1 + 2 = 3 ; </think> <answer> 3 </answer>", True, False),
        ("</think> <answer> 2 </answer>", False, False),
        ("</think> <answer> 3", False, False),
        ("<answer> 3 </answer> <answer> 1 </answer>", False, False),
        ("", False, False),
    ],
)
def test_only_a_finished_answer_that_is_right_counts(text: str, truncated: bool, right: bool) -> None:
    assert chains.solved(answered(text, truncated)).tolist() == [right]


def test_an_answer_longer_than_the_cut_does_not_survive_it() -> None:
    evaluator = ChainsWorld(0, held_out=1).questions(1, 24)._evaluate
    end = "</think> <answer> 3 </answer>"
    for length, survives in ((30, True), (31, False)):
        rollout = answered(end, length=length)
        assert evaluator.measures["accuracy"](rollout).tolist() == [True]
        assert evaluator.measures["accuracy_cut"](rollout).tolist() == [survives]
        assert evaluator.measures["tokens"](rollout).tolist() == [length]
    assert evaluator.knobs == {"token_budget": 24}


def test_the_facts_are_learned_in_the_updates_of_the_common_start() -> None:
    parts = Parts(0, Settings())
    facts = parts.world.facts(parts.cast["policy"])
    stage = parts.demonstrate(facts, Settings().fact_steps, len(facts.rows))
    losses: list[float] = []

    def listen(event: Event) -> None:
        losses.extend([event.metrics["policy/loss"]] if event.kind == "step" else [])

    train(Regimen(parts.cast, [stage], evaluations=[]), seed=0, listener=listen)
    assert losses[-1] < 0.05


# Claims


def result(accuracy: float, length: float) -> ArmResult:
    metrics = {"questions/accuracy": accuracy, "questions/tokens": length}
    return ArmResult([{"stage": "reinforce", "metrics": metrics}], 0, 0, 0, 0.0)


def test_claims_are_paired_differences() -> None:
    seed = {"curriculum": result(0.9, 22.0), "fixed": result(0.8, 20.0)}
    assert difference("accuracy", "curriculum", "fixed", seed) == pytest.approx(0.1)
    assert length_margin("curriculum", "fixed", seed) == pytest.approx(0.05)
    assert length_margin("fixed", "curriculum", {**seed, "fixed": result(0.8, 11.0)}) == pytest.approx(-0.35)
    assert [claim.name for claim in PAPER.claims if claim.judged] == ["more_accurate", "as_long"]


# GSM8K and a real model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Qwen2 with random weights, saved as a hub has it."""
    return str(
        save(tmp_path_factory.mktemp("model"), language_model("qwen2", max_position_embeddings=1024), tokenizer())
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A JSON-lines file of made-up word problems."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    made = [
        {"question": f"Ann has {a} pears and eats {b}. How many are left?", "answer": f"{a} - {b}\n#### {a - b:,}"}
        for a, b in ((9, 4), (1200, 200), (7, 7))
    ]
    path.write_text("\n".join(map(json.dumps, made)))
    return str(path)


def word_problems(model: str, rows: str, **changes: Any) -> Settings:
    settings = Settings(
        world="gsm8k", model=model, train=rows, test=rows, dtype="float32", steps=8, batch_size=4, group_size=2,
        start_budget=16, final_budget=8, max_new_tokens=20, evaluate_every=4,
    )  # fmt: skip
    return dataclasses.replace(settings, **changes)


def test_rows_of_gsm8k_become_questions_with_a_number(rows: str) -> None:
    assert [row["answer"] for row in GSM8KWorld("", rows, rows).rows] == ["5", "1,000", "0"]
    with pytest.raises(ValueError, match=r"a\.jsonl, row 2: .*expected a `question`.*'#### 18'"):
        final_numbers([{"question": "?", "answer": "#### 3"}, {"question": "?", "answer": "three"}], "a.jsonl")


def test_a_word_problem_is_judged_and_evaluated_by_its_number(model: str, rows: str) -> None:
    parts = Parts(0, word_problems(model, rows))
    judge = next(leaf for leaf in parts.judged(1.0, 0.0, "triangular").leaves() if leaf.name == "correct")
    for text, right in (
        ("<think> 1200 - 200 </think> <answer> $1000 </answer>", True),
        ("<think> 1200 - 200 </think> <answer> 1,000 pears </answer>", True),
        ("<think> 1200 - 200 </think> <answer> 100 </answer>", False),
        ("1000", False),
    ):
        rollout = answered(text, answer="1,000")
        assert judge.score(rollout, None).value.tolist() == [float(right)]
        assert gsm8k.solved(rollout).tolist() == [right]
    assert gsm8k.solved(answered("<answer> 5 </answer>", truncated=True, answer="5")).tolist() == [False]
    assert Parts(0, word_problems(model, rows, rule="math-verify")).world.verifier("1000", "1,000")


def test_a_prompt_states_the_budget_under_the_chat_template(model: str, rows: str) -> None:
    parts = Parts(0, word_problems(model, rows))
    policy = parts.cast["policy"]
    context = TensorDict({"prompt": NonTensorStack(gsm8k.TEMPLATE.format(question="Why?", token_budget=87))}, [1])
    prompt = policy.tokenizer.decode(policy.encode(context["prompt"].tolist()[0]))
    assert prompt.startswith("<|im_start|>user\nWhy?")
    assert prompt.endswith("Use exactly 87 tokens.<|im_end|>\n<|im_start|>assistant\n")


def test_the_full_scale_runs_on_a_small_model_and_goes_on_after_an_interruption(
    model: str, rows: str, tmp_path: Path
) -> None:
    settings = word_problems(model, rows)

    def weights(out: Path, **options: Any) -> dict[str, torch.Tensor]:
        outcome = train(curriculum(0, settings), seed=0, out=out, **options)
        assert [record["step"] for record in outcome.evaluations] == [0, 4, 8]
        return outcome.cast["policy"].state_dict()

    def stop(event: Event) -> None:
        if event.kind == "step" and event.step == 5:
            signal.raise_signal(signal.SIGTERM)

    whole = weights(tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(curriculum(0, settings), seed=0, out=tmp_path / "halved", listener=stop)
    halved = weights(tmp_path / "halved", resume=True)
    assert all(torch.equal(whole[name], halved[name]) for name in whole)
    records = [r["metrics"] for r in read_metrics(tmp_path / "halved" / "metrics.jsonl") if r["kind"] == "step"]
    assert [metrics["knob/token_budget"] for metrics in records] == [16, 16, 12, 12, 10, 10, 8, 8]
    assert {"reward/questions/correct", "reward/questions/length", "reward/questions/format"} <= records[0].keys()


def test_both_worlds_ask_under_one_name_and_one_knob(model: str, rows: str) -> None:
    for world in (ChainsWorld(0, held_out=1), GSM8KWorld(model, rows, rows, dtype="float32")):
        task = world.questions(2, 8)
        assert task.name == "questions"
        assert [(knob.name, knob.default) for knob in task.knobs] == [("token_budget", 8)]


def test_the_full_scale_trains_adapters_alone(model: str, rows: str) -> None:
    pytest.importorskip("peft")
    regimen = curriculum(0, word_problems(model, rows, lora_rank=2, steps=2, drops=1))
    policy = regimen.cast["policy"]
    before = {name: value.clone() for name, value in policy.named_parameters()}
    train(regimen, seed=0)
    changed = {name for name, value in policy.named_parameters() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_every_arm_of_the_full_scale_fits_together(model: str, rows: str) -> None:
    full = dataclasses.replace(
        PAPER.scales["full"], model=model, train=rows, test=rows, device="cpu", dtype="float32", lora_rank=None
    )
    for arm in PAPER.arms:
        regimen = arm.build(0, full)
        assert isinstance(regimen.cast, Cast)
        assert [task.name for task in regimen.evaluated()] == ["questions"]
    (stage,) = PAPER.arm("curriculum").build(0, full).stages
    found = [int(stage.controllers[0].curve(step) + 1e-9) for step in (0, 149, 150, 300, 450, 599)]
    assert found == [256, 256, 178, 124, 87, 87]


def test_the_example_runs_and_goes_on_where_it_was(
    model: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = Path(__file__).parents[2] / "examples" / "gsm8k.py"
    assert len(example.read_text().splitlines()) < 40
    monkeypatch.setattr(sys, "argv", [str(example), model, rows, rows, str(tmp_path / "run")])
    runpy.run_path(str(example))
    first = capsys.readouterr().out
    assert [line.split()[:2] for line in first.splitlines()] == [
        ["start", "0"],
        ["reinforce", "10"],
        ["reinforce", "20"],
    ]
    assert "questions/accuracy" in first
    runpy.run_path(str(example))
    assert capsys.readouterr().out == first


def test_more_held_out_questions_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"held_out is 256, and there are 256 questions of 3 digits below 4"):
        ChainsWorld(0, digits=3, modulus=4, held_out=256)
    world = ChainsWorld(0, digits=2, modulus=2, held_out=7)
    assert len({row["question"] for row in world.test}) == 7
    assert {row["question"] for row in world.rows(2, seed=0)}.isdisjoint(row["question"] for row in world.test)
