"""OneReward: the smoke test, what arms differ in, who judges and who evaluates, claims, exact resume."""

from __future__ import annotations

import dataclasses
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from regimen import papers
from regimen.checkers import check
from regimen.lab.experiment import ArmResult
from regimen.lab.results import read_results
from regimen.lab.runner import Plan, run_experiment
from regimen.loop import Interrupted, Outcome, train
from regimen.papers import onereward
from regimen.papers.onereward import (
    JUDGES,
    PAPER,
    Parts,
    Settings,
    difference,
    dynamic,
    least_gain,
    one_reward,
    supervised,
    unconditioned,
)
from regimen.progress import Event
from regimen.rollout import Rollout
from regimen.runs import read_metrics
from regimen.tasks.worlds.inpainting import (
    CRITERIA,
    TASKS,
    InpaintingWorld,
    Rater,
    border_jump,
    contexts,
    names,
    removal_quality,
    ring,
)

QUICK: Settings = PAPER.scales["quick"]
TINY = dataclasses.replace(QUICK, steps=4, batch_size=12, refresh_after=12, refresh_steps=2)
REWARDED = ("unconditioned", "onereward", "dynamic")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of scale quick."""
    out = tmp_path_factory.mktemp("onereward") / "quick"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGIMEN_CACHE", str(out.parent / "cache"))
        run_experiment(Plan(partial(papers.load, PAPER.slug), out, scale="quick"))
    return out


@pytest.fixture(scope="module")
def world() -> InpaintingWorld:
    return InpaintingWorld(0, held_out=60)


@pytest.fixture
def made_once(world: InpaintingWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every arm has the same world, whose classifiers are trained once."""
    monkeypatch.setattr(onereward, "InpaintingWorld", lambda seed, **settings: world)


# The smoke test


def test_every_arm_is_trained_and_every_claim_computed(quick: Path) -> None:
    results = read_results(quick)
    assert results["failures"] == []
    assert list(results["arms"]) == ["base", "supervised", *REWARDED]
    assert all(claim["missing"] == {} for claim in results["claims"])
    for arm in results["arms"].values():
        assert arm["0"]["final"].keys() >= {*PAPER.metrics, *names(), *(f"{task}/win" for task in TASKS)}


def test_arms_that_are_compared_spend_the_same(quick: Path) -> None:
    own = {arm: seeds["0"]["own"] for arm, seeds in read_results(quick)["arms"].items()}
    for arm in REWARDED:
        assert own[arm]["samples"] == QUICK.steps * QUICK.batch_size
        assert own[arm]["gradient_steps"] == own["onereward"]["gradient_steps"]
    assert own["supervised"]["gradient_steps"] == QUICK.steps
    assert own["supervised"]["samples"] == 0


def test_every_arm_starts_from_the_base_and_the_base_is_as_good_as_itself(quick: Path) -> None:
    arms = {name: seeds["0"] for name, seeds in read_results(quick)["arms"].items()}
    for name in ("supervised", "onereward", "dynamic"):
        assert arms[name]["evaluations"][0]["metrics"] == arms["base"]["final"]
    for task in TASKS:
        assert arms["base"]["final"][f"{task}/win"] == pytest.approx(0.5, abs=0.08)


def test_what_the_judge_says_is_logged_by_criterion(quick: Path) -> None:
    steps = [row for row in read_metrics(quick / "onereward" / "seed0" / "metrics.jsonl") if row["kind"] == "step"]
    for name in CRITERIA.names:
        assert -3 < steps[-1]["metrics"][f"policy/reward/{name}"] < 0


# What the arms differ in


def stage(build: Any) -> Any:
    return build(0, TINY).stages[0]


@pytest.mark.usefixtures("made_once")
def test_the_arms_differ_in_what_the_judge_is_told_or_in_the_reference() -> None:
    told, pooled, follows = stage(one_reward), stage(unconditioned), stage(dynamic)
    assert [update.members for update in told.updates] == [["reward_model"], ("policy",)]
    assert [update.members for update in pooled.updates] == [["pooled_judge"], ("policy",)]
    assert (told.rules[0].mode, pooled.rules[0].mode, follows.rules[0].mode) == ("fixed", "fixed", "ema")
    shapes = [[tuple(parameter.shape) for parameter in Parts(0, TINY).cast[judge].parameters()] for judge in JUDGES]
    assert shapes[0] == shapes[1]
    for other in (pooled, follows):
        assert (other.steps, other.batch_size) == (told.steps, told.batch_size)
        assert [update.batches for update in other.updates] == [update.batches for update in told.updates]


@pytest.mark.usefixtures("made_once")
def test_the_judge_s_weights_stay_in_the_policy_s_update_and_the_base_in_all() -> None:
    s = dataclasses.replace(TINY, refresh_after=10**6)
    regimen = one_reward(0, s)
    before = {name: {k: v.clone() for k, v in regimen.cast[name].state_dict().items()} for name in regimen.cast}
    train(regimen, listener=quiet)
    moved = {
        name
        for name, state in before.items()
        if any(not torch.equal(value, state[key]) for key, value in regimen.cast[name].state_dict().items())
    }
    assert moved == {"policy"}
    assert {"base", "reference"} <= set(regimen.cast)


@pytest.mark.usefixtures("made_once")
def test_each_task_has_its_own_model_in_the_supervised_arm() -> None:
    regimen = supervised(0, TINY)
    start = [value.clone() for value in regimen.cast["policy"].parameters()]
    train(regimen, listener=quiet)
    models = [list(regimen.cast[f"{task}_model"].parameters()) for task in TASKS]
    for model in models:
        assert any(not torch.equal(a, b) for a, b in zip(model, start, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(models[0], models[1], strict=True))


# The world


def test_masks_and_prompts_belong_to_their_tasks(world: InpaintingWorld) -> None:
    images, labels = world.held_out[:30], world.held_out_labels[:30]
    kinds = torch.arange(30) % 3
    asked = contexts(images, labels, kinds, torch.Generator().manual_seed(0))
    sizes = asked["mask"].flatten(1).sum(1)
    assert sizes.tolist() == [(16, 32, 9)[kind] for kind in kinds.tolist()]
    assert torch.equal(asked["condition"][kinds == 0], labels[kinds == 0])
    assert asked["condition"][kinds == 1].unique().tolist() == [10]
    assert asked["condition"][kinds == 2].unique().tolist() == [11]
    assert torch.equal(asked["masked"], images * (1 - asked["mask"]))


def test_the_border_s_jump_and_the_ring_are_the_worked_numbers() -> None:
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:6, 2:6] = 1
    image = mask * 0.75
    assert float(border_jump(image, mask)) == pytest.approx(0.75)
    assert float(ring(mask).sum()) == 20
    assert float(removal_quality(image, mask)) == pytest.approx(-0.75 - 0.03 * 0.75)
    corner = torch.zeros(1, 1, 8, 8)
    corner[..., :3, :3] = 1
    assert float(ring(corner).sum()) == 7
    assert float(removal_quality(torch.full((1, 1, 8, 8), 0.3), corner)) == pytest.approx(0, abs=1e-6)


def test_the_rater_prefers_real_digits_of_the_class_and_labels_by_another_classifier(world: InpaintingWorld) -> None:
    count = 60
    kinds = torch.zeros(count, dtype=torch.int64)
    context = contexts(world.held_out[:count], world.held_out_labels[:count], kinds, torch.Generator())
    rollout = Rollout.create(
        task="fill", group=torch.arange(count), mask=torch.ones(count, 1, dtype=torch.bool), context=context
    )
    questions = CRITERIA.questions(rollout)
    noise = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    spoilt = torch.where(context["mask"] > 0, noise, world.held_out[:count])
    for rater in (world.annotator, world.evaluator):
        assert isinstance(rater, Rater)
        real, worse = (rater(questions, images[questions.row]) for images in (world.held_out[:count], spoilt))
        for name in CRITERIA.of_tasks["fill"]:
            rows = torch.tensor([criterion == name for criterion in questions.criterion])
            assert float((real[rows] > worse[rows]).float().mean()) > 0.6
    assert type(world.annotator.classifier.estimator) is not type(world.evaluator.classifier.estimator)


# Claims, and resume


def result(**final: float) -> ArmResult:
    return ArmResult([{"stage": "reward", "step": 1, "metrics": final}], 0, 0, 0, 0.0)


def test_claims_compute_what_they_say() -> None:
    def arm(shift: float, fill: float = 0.0) -> ArmResult:
        wins = {name: 0.5 + shift for name in names()}
        tasks = {f"{task}/win": 0.5 + shift for task in TASKS}
        return result(**{**wins, **tasks, "fill/win": 0.5 + shift + fill})

    seed = {"onereward": arm(0.2, fill=-0.15), "unconditioned": arm(0.1), "base": arm(0.01)}
    assert difference("onereward", "unconditioned", seed) == pytest.approx(0.1)
    assert least_gain(seed) == pytest.approx(0.2 - 0.15 - 0.01)


def quiet(event: Event) -> None:
    """Nobody is told."""


@pytest.mark.usefixtures("made_once")
def test_an_interrupted_run_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    def run(out: Path, stop: int | None = None, resume: bool = False) -> Outcome:
        def listener(event: Event) -> None:
            if event.kind == "step" and event.step == stop:
                signal.raise_signal(signal.SIGTERM)

        return train(one_reward(0, TINY), seed=5, out=out, resume=resume, listener=listener)

    whole = run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", stop=2)
    again = run(tmp_path / "cut", resume=True)
    assert again.evaluations[-1]["metrics"] == whole.evaluations[-1]["metrics"]
    for name in ("reward_model", "policy", "reference"):
        for a, b in zip(whole.cast[name].parameters(), again.cast[name].parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.usefixtures("made_once")
def test_the_regimens_pass_the_checker() -> None:
    assert check(one_reward(0, TINY)).messages == []
