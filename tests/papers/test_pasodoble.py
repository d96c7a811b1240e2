"""PasoDoble: its smoke test, its world, what arms have in common, exact resume, and the path to real models."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from regimen import papers
from regimen.cast import Cast
from regimen.credit import GroupRelativeAdvantage, PassRateSelector
from regimen.lab.experiment import ArmResult
from regimen.lab.jobs import run_folder
from regimen.lab.results import read_results
from regimen.lab.runner import Plan, run_experiment
from regimen.loop import Interrupted, train
from regimen.objectives import ClippedSurrogateObjective
from regimen.papers.pasodoble import PAPER, PLAYED, Parts, Settings, difference, dual, offline, unruled
from regimen.policies import FlowPolicy
from regimen.progress import Event
from regimen.regimen import Regimen, Stage
from regimen.rewards import FunctionReward
from regimen.rollout import Rollout
from regimen.runs import read_metrics
from regimen.tasks import PromptTask
from regimen.tasks.worlds.proposed_chains import ProposedChainsWorld, parse_question
from regimen.tasks.worlds.proposed_problems import ProposedProblemsWorld, parse_problem
from regimen.update import Epochs, Update
from tiny_language_models import language_model, save, tokenizer

QUICK: Settings = PAPER.scales["quick"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of scale quick, the offline variant included."""
    out = tmp_path_factory.mktemp("pasodoble") / "quick"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGIMEN_CACHE", str(out.parent / "cache"))
        arms = [arm.name for arm in PAPER.arms]
        run_experiment(Plan(partial(papers.load, PAPER.slug), out, scale="quick", arms=arms))
    return out


def test_every_arm_is_trained_and_evaluated(quick: Path) -> None:
    results = read_results(quick)
    assert results["failures"] == []
    assert list(results["arms"]) == [arm.name for arm in PAPER.arms]
    for seeds in results["arms"].values():
        assert seeds["0"]["final"].keys() >= PAPER.metrics.keys()
    assert [claim["name"] for claim in results["claims"]] == [claim.name for claim in PAPER.claims]


def test_arms_start_alike_and_sample_as_much(quick: Path) -> None:
    arms = {name: seeds["0"] for name, seeds in read_results(quick)["arms"].items()}
    samples = QUICK.steps * QUICK.pieces * QUICK.proposals * (1 + QUICK.answers)
    for name, arm in arms.items():
        if name != "base":
            assert arm["evaluations"][0]["metrics"] == arms["base"]["final"]
            assert arm["own"]["samples"] == samples


def test_the_log_tells_attempts_from_steps_taken(quick: Path) -> None:
    records = [r for r in read_metrics(run_folder(quick, "chance", 0) / "metrics.jsonl") if r["kind"] == "step"]
    taken = [r["metrics"]["solver/steps"] for r in records]
    assert len(records) == QUICK.steps
    assert taken == sorted(taken)
    assert all(b - a in (0, 1) for a, b in zip([0, *taken], taken, strict=False))


def test_arms_differ_in_what_they_name_alone() -> None:
    stages = {arm.name: arm.build(0, QUICK).stages[0] for arm in PAPER.arms if arm.start and arm.name != "offline"}
    first = stages["dual"]
    for name, stage in stages.items():
        assert (stage.steps, stage.batch_size) == (first.steps, first.batch_size)
        assert stage.updates == (first.updates if name != "frozen" else first.updates[1:])
        assert stage.credit == (first.credit if name != "unruled" else dataclasses.replace(first.credit, low=-0.01))
    proposals = {
        name: next(leaf for leaf in stage.reward.leaves() if leaf.name == "proposal") for name, stage in stages.items()
    }
    ruled = proposals["dual"]
    assert (ruled.low, ruled.diversity_floor, ruled.diversity_weight, ruled.base) == (0.2, 0.3, 0.2, 0.1)
    free = proposals["unruled"]
    assert (free.low, free.diversity_floor, free.diversity_weight, free.base) == (-0.01, -1, 0, 0.1)


def test_the_default_settings_are_those_of_the_page() -> None:
    s = Settings()
    assert PAPER.scales["default"] == s
    (stage,) = dual(0, dataclasses.replace(s, held_out=8)).stages
    assert (stage.steps, stage.batch_size) == (40, 2 * 8 * (1 + 8))
    assert stage.credit.credit == GroupRelativeAdvantage(std="group", ddof=1, eps=1e-4)
    assert (stage.credit.low, stage.credit.high, stage.credit.key) == (0.2, 1.0, "pass_rate")
    for update, role in zip(stage.updates, ("proposer", "solver"), strict=True):
        longest = 8 * s.longest + 8
        assert update.objective == ClippedSurrogateObjective(0.2, aggregate="constant", horizon=longest, member=role)
        assert (update.members, update.learning_rate, update.batches) == ([role], 1e-4, Epochs(tasks=[role]))
    assert (s.fact_steps, s.text_steps, s.text_batch, s.noise) == (120, 500, 32, 0.12)


def test_the_start_does_not_depend_on_what_it_ignores() -> None:
    fields = {field.name for field in dataclasses.fields(Settings)}
    assert set(PLAYED) < fields
    assert not set(PLAYED) & {"noise", "text_steps", "held_out", "layers", "dim", "world"}


def test_claims_are_paired_differences() -> None:
    def result(accuracy: float) -> ArmResult:
        return ArmResult([{"stage": "play", "metrics": {"play/accuracy": accuracy}}], 0, 0, 0, 0.0)

    assert difference("accuracy", "dual", "frozen", {"dual": result(0.9), "frozen": result(0.7)}) == pytest.approx(0.2)
    judged = [claim.name for claim in PAPER.claims if claim.judged]
    assert judged == ["above_start", "above_frozen", "above_unruled"]


# The world of chains


def test_held_out_questions_are_in_no_text_and_no_knowledge() -> None:
    world = ProposedChainsWorld(1, held_out=100)
    tested = {row["question"] for row in world.test}
    assert len(tested) == len(world.test)
    assert {row["operands"] for row in world.test} == {2, 3, 4, 5}
    prompts, answers = world.texts(500)
    asked = {prompt.removeprefix("<solve> ").removesuffix(" <think>") for prompt in prompts[::2]}
    proposed = {parse_question(answer)[0] for answer in answers[1::2]}
    assert not tested & (asked | proposed)


def test_texts_are_wrong_as_often_as_the_noise_says_by_length() -> None:
    world = ProposedChainsWorld(2, noise=0.1, held_out=40)
    _, answers = world.texts(4000)
    wrong: dict[int, list[bool]] = {}
    for answer in answers[1::2]:
        question, reference = parse_question(answer)
        wrong.setdefault(len(question.split()) // 2 + 1, []).append(world.value(question) != reference)
    for operands, found in wrong.items():
        assert sum(found) / len(found) == pytest.approx(0.1 * operands, abs=0.06)


@pytest.mark.parametrize(
    ("question", "value"),
    [("3 + 4 - 1", "1"), ("0 - 1", "4"), ("2", "2"), ("", None), ("3 + + 4", None), ("3 +", None), ("7 + 1", None)],
)
def test_the_true_value_of_a_question(question: str, value: str | None) -> None:
    assert ProposedChainsWorld(0).value(question) == value


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<problem> 1 + 1 </problem> 1 + 1 = 2 ; </think> <answer> 2 </answer>", ("1 + 1", "2")),
        ("<problem> 1 + 1 </problem> <answer> 2", None),
        ("<problem> </problem> <answer> 2 </answer>", None),
        ("", None),
    ],
)
def test_a_proposal_is_parsed_or_asks_nothing(text: str, found: tuple[str, str] | None) -> None:
    assert parse_question(text) == found


def test_questions_are_compared_by_the_tokens_that_the_policies_read() -> None:
    """Of chains the tokens are the words, and so are the sets."""
    parts = Parts(0, QUICK)
    one, other = "3 + 4 - 2 + 0", "3 + 4 + 4 - 1"
    assert parts.tokens(one) == [parts.cast["solver"].tokenizer.convert_tokens_to_ids(word) for word in one.split()]
    diversity = next(leaf for leaf in parts.judged().leaves() if leaf.name == "diversity")
    first, second = (frozenset(diversity.tokens(text)) for text in (one, other))
    assert (len(first & second), len(first | second)) == (4, 7)
    assert diversity.tokens("") == []


# The offline variant, and exact resume


def turns(out: Path | None = None, steps: int = 12, **options: Any) -> tuple[Regimen, Any]:
    """The offline variant from random weights, where nobody solves anything, judged by chance instead."""
    settings = dataclasses.replace(QUICK, steps=steps, writes=3, reviews=2, learning_rate=1e-3, held_out=8)
    parts = Parts(0, settings)
    parts.fork()
    stage = parts.take_turns()
    # Random weights write nothing that can be parsed.
    for task in stage.tasks:
        if task.name == "play":
            task.parse = lambda text: (f"1 + {len(text) % 5}", "2")
    stage.reward = parts.judged(chance=True)
    regimen = Regimen(parts.cast, [stage], evaluations=[])
    return regimen, train(regimen, seed=0, out=out, **options)


def test_while_one_role_learns_the_other_stays_and_the_buffer_feeds_the_solver() -> None:
    seen: list[tuple[str, float, float]] = []

    def listen(event: Event) -> None:
        if event.kind == "step":
            m = event.metrics
            phase = "write" if m["knob/mixture/play"] else "review"
            seen.append((phase, m["proposer/steps"], m["solver/steps"]))

    turns(listener=listen)
    assert {phase for phase, _, _ in seen} == {"write", "review"}
    for (_, writes, reviews), (phase, more, answered) in pairwise(seen):
        assert (more == writes) if phase == "review" else (answered == reviews)
    assert seen[-1][1] >= 3
    assert seen[-1][2] >= 1


def test_the_variant_goes_on_after_an_interruption_history_buffer_and_phases_included(tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if event.kind == "step" and event.step == 7:
            raise Interrupted

    whole, _ = turns(tmp_path / "whole", checkpoint_every=1)
    with pytest.raises(Interrupted):
        turns(tmp_path / "halved", checkpoint_every=1, listener=stop)
    halved, _ = turns(tmp_path / "halved", checkpoint_every=1, resume=True)
    for role in ("proposer", "solver"):
        states = [regimen.cast[role].state_dict() for regimen in (whole, halved)]
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    memories = [regimen.stages[0].memory for regimen in (whole, halved)]
    assert memories[0].questions == memories[1].questions
    histories = [
        next(leaf for leaf in regimen.stages[0].reward.leaves() if leaf.name == "diversity").history
        for regimen in (whole, halved)
    ]
    assert histories[0]
    assert histories[0] == histories[1]


# Selection by pass rate for another kind of policy


def test_images_of_a_flow_policy_are_learned_from_where_some_of_a_prompt_are_good(
    tiny_policy: Callable[..., FlowPolicy], contexts: Callable[[int], Any]
) -> None:
    policy = tiny_policy()
    goodness = {"of": lambda rollout: torch.arange(len(rollout)) % 2}

    def good(rollout: Rollout) -> torch.Tensor:
        return goodness["of"](rollout).float()

    stage = Stage(
        "images",
        [PromptTask("digits", contexts(2), group_size=4)],
        1,
        8,
        FunctionReward(good, "good"),
        PassRateSelector(GroupRelativeAdvantage(), 0.0, 1.0, key="good"),
        [Update(ClippedSurrogateObjective())],
    )
    regimen = Regimen(Cast(policy=policy), [stage], evaluations=[])
    assert train(regimen, seed=0).counters.gradient_steps == 1
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    goodness["of"] = lambda rollout: torch.ones(len(rollout))
    assert train(regimen, seed=0).counters.gradient_steps == 0
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


# The real models


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny model of Qwen3's class and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    return str(save(folder, language_model("qwen3", max_position_embeddings=1024), tokenizer()))


def rows(folder: Path, name: str, made: list[dict[str, str]]) -> str:
    path = folder / name
    path.write_text("\n".join(map(json.dumps, made)))
    return str(path)


def writing(model: str, folder: Path, **changes: Any) -> Settings:
    knowledge = rows(folder, "texts.jsonl", [{"text": f"Pears cost {n}.", "url": "-"} for n in range(3)])
    test = rows(folder, "test.jsonl", [{"question": f"{n} + 1", "answer": str(n + 1)} for n in range(4)])
    return dataclasses.replace(
        PAPER.scales["full"], model=model, knowledge=knowledge, test=test, device="cpu", dtype="float32", steps=2,
        proposals=2, answers=2, max_new_tokens=6, held_out=4, **changes,
    )  # fmt: skip


def test_the_full_scale_runs_on_a_small_model(model: str, tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    outcome = train(dual(0, writing(model, tmp_path)), seed=0)
    assert outcome.counters.samples == 2 * 2 * 3
    assert set(outcome.evaluations[-1]["metrics"]) == {"play/accuracy"}


def test_the_full_scale_has_the_settings_of_the_paper(model: str, tmp_path: Path) -> None:
    full = PAPER.scales["full"]
    assert (full.pieces, full.proposals, full.answers, full.steps) == (1, 6, 6, 2000)
    assert (full.learning_rate, full.clip, full.max_new_tokens) == (1e-6, 0.2, 6144)
    assert (full.low, full.high, full.base, full.diversity_weight, full.diversity_floor) == (0.2, 1.0, 0.1, 0.2, 0.3)
    assert (full.history, full.similar, full.writes, full.reviews) == (100, 0.8, 10, 5)
    parts = Parts(0, writing(model, tmp_path))
    sampled = next(knob for knob in parts.cast["solver"].knobs if knob.name == "temperature")
    assert (sampled.default, sampled.evaluation) == (0.6, 0.0)
    assert parts.tokens("Pears cost 3.") == parts.cast["solver"].tokenizer.encode(
        "Pears cost 3.", add_special_tokens=False
    )


def test_every_arm_of_the_full_scale_fits_together(model: str, tmp_path: Path) -> None:
    for arm in PAPER.arms:
        regimen = arm.build(0, writing(model, tmp_path))
        assert [task.name for task in regimen.evaluated()] == ["play"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Hm. <problem>a</problem></think> <problem>What is 3+4?</problem> <answer>It is \\boxed{7}</answer>",
         ("What is 3+4?", "7")),
        ("<problem>What is 3+4?</problem> <answer>7</answer>", None),
        ("<answer>\\boxed{7}</answer>", None),
    ],
)  # fmt: skip
def test_a_problem_is_read_after_the_thinking(text: str, found: tuple[str, str] | None) -> None:
    assert parse_problem(text) == found


def test_an_answer_that_its_writer_left_unreadable_is_equal_to_none() -> None:
    pytest.importorskip("math_verify")
    assert ProposedProblemsWorld.verifier("1/2", "0.5")
    assert not ProposedProblemsWorld.verifier("7", "")


def test_the_arms_of_the_rules_and_the_turns_are_built_from_the_same_parts() -> None:
    for build in (unruled, offline):
        assert set(build(0, QUICK).cast) == {"solver", "proposer"}
