"""The examples of combinations: each runs as papers do, and its arms differ in what its text says and nothing else."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from regimen.credit import GAE, RewardRedistribution
from regimen.lab.experiment import Paper
from regimen.lab.jobs import run_folder
from regimen.lab.results import read_results
from regimen.lab.runner import Plan, run_experiment
from regimen.papers import load
from regimen.regimen import Regimen
from regimen.rollout import Rollout
from regimen.runs import read_metrics

FOLDER = Path(__file__).parents[1] / "examples" / "combinations"
NAMES = ("personal_pictures", "learned_balance_in_mazes", "progress_under_a_budget")
Folders = dict[str, Path]


@cache
def experiment(name: str) -> Paper:
    return load(str(FOLDER / f"{name}.py"))


def built(name: str, arm: str) -> Regimen:
    paper = experiment(name)
    return paper.arm(arm).build(0, paper.settings("quick"))


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The folders of all three at scale quick."""
    out = tmp_path_factory.mktemp("combinations")
    for name in NAMES:
        run_experiment(Plan(partial(load, str(FOLDER / f"{name}.py")), out / name, scale="quick", workers=1))
    return {name: out / name for name in NAMES}


def leaves(regimen: Regimen) -> list[Any]:
    """The components of the reward that ask a member of the cast."""
    reward: Any = regimen.stages[0].reward
    return [part for part in reward.leaves() if hasattr(part, "member")]


def moved(folder: Path, arm: str, knob: str) -> list[float]:
    """A knob's values, iteration by iteration."""
    records = read_metrics(run_folder(folder, arm, 0) / "metrics.jsonl")
    return [record["metrics"][f"knob/{knob}"] for record in records if record["kind"] == "step"]


def test_there_is_no_other_combination() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_arm_is_trained_and_every_claim_computed(quick: Folders, name: str) -> None:
    results, paper = read_results(quick[name]), experiment(name)
    assert results["failures"] == []
    assert list(results["arms"]) == [arm.name for arm in paper.arms]
    assert all(claim["missing"] == {} for claim in results["claims"])
    assert all(set(paper.metrics) <= set(seeds["0"]["final"]) for seeds in results["arms"].values())


@pytest.mark.parametrize("name", NAMES)
def test_arms_spend_the_same_samples(quick: Folders, name: str) -> None:
    arms = read_results(quick[name])["arms"]
    compared = {arm for claim in experiment(name).claims for arm in claim.arms}
    assert len({arms[arm]["0"]["samples"] for arm in compared}) == 1


def test_the_policy_is_told_the_latent_and_the_judge_reads_it_only_where_the_text_says() -> None:
    name = "personal_pictures"
    arms = {arm: built(name, arm) for arm in ("combined", "shared", "untold")}
    asked: Any = arms["combined"].stages[0].tasks[0]
    contexts: TensorDict = asked.rows[:8]
    knobs = {"sampling_steps": 2.0, "noise_level": 0.7, "guidance": 1.0}
    for arm, told, judged in (("combined", True, True), ("shared", True, False), ("untold", False, True)):
        cast = arms[arm].cast
        rollout = cast["guide"].sample(contexts, knobs, torch.Generator().manual_seed(0))
        assert bool(rollout.context["latent"].any()) == told
        assert bool(rollout["latent"].any())
        judge = "personal" if judged else "shared"
        assert judge in [component.member for component in leaves(arms[arm])]
        assert cast[judge].latent == (4 if judged else 0)


def test_users_who_evaluate_taught_no_reward() -> None:
    known = built("personal_pictures", "start").stages[0].tasks[0]
    asked = built("personal_pictures", "combined").stages[0].tasks[0]
    first = asked.rows["pairs"]["first"].flatten(1)  # type: ignore[attr-defined]
    taught = known.rows["step_columns"]["first"].flatten(1)  # type: ignore[attr-defined]
    assert not bool((first[:, None] == taught[None]).all(2).any())


def test_only_the_learned_balance_moves_freely(quick: Folders) -> None:
    weights = {arm: moved(quick[NAMES[1]], arm, "cloning") for arm in ("learned", "ppo", "cloning", "half", "falling")}
    assert set(weights["ppo"]) == {0.0}
    assert set(weights["cloning"]) == {1.0}
    assert set(weights["half"]) == {0.5}
    assert weights["falling"] == sorted(weights["falling"], reverse=True)
    assert len(set(weights["learned"])) > 1
    assert all(0 <= weight <= 1 for weight in weights["learned"])


def test_lessons_are_laid_out_like_the_policys_own_episodes() -> None:
    regimen = built("learned_balance_in_mazes", "learned")
    mazes, lessons = regimen.stages[0].tasks
    knobs = {"discount": 0.99, "temperature": 1.0, "cloning": 0.5}
    own, taught = (task.collect(regimen.cast, knobs, torch.Generator().manual_seed(0), 32) for task in (mazes, lessons))
    both = type(own).cat([own, taught])
    assert both.task_counts() == {"mazes": 32, "lessons": 32}


def test_progress_and_the_budget_differ_as_the_arms_say(quick: Folders) -> None:
    name = "progress_under_a_budget"
    for arm, progress, shrinks in (
        ("combined", True, True), ("progress", True, False), ("shrinking", False, True), ("neither", False, False)
    ):  # fmt: skip
        credit = built(name, arm).stages[0].credit
        assert isinstance(credit, RewardRedistribution if progress else GAE)
        assert (len(set(moved(quick[name], arm, "token_budget"))) > 1) == shrinks


def answers() -> tuple[Regimen, Rollout]:
    """The chains' regimen, and answers of its policy."""
    regimen = built("progress_under_a_budget", "combined")
    task = regimen.stages[0].tasks[0]
    knobs = {knob.name: knob.default for knob in (*regimen.cast["policy"].knobs, *task.knobs)}
    return regimen, task.collect(regimen.cast, knobs, torch.Generator().manual_seed(0), 8)


def test_features_of_progress_have_read_the_token_of_their_step() -> None:
    regimen, rollout = answers()
    features = regimen.cast["estimator"].features
    step = int(rollout.loss_mask[0].int().argmax())
    actions = rollout.actions.clone()
    actions[0, step] = (actions[0, step] + 1) % 4
    before, after = features(rollout)[0], features(rollout.replace(actions=actions))[0]
    assert not torch.equal(before[step], after[step])
    torch.testing.assert_close(before[:step], after[:step])


def test_exact_progress_adds_up_to_the_reward() -> None:
    regimen, rollout = answers()
    estimator, exact = regimen.cast["estimator"], regimen.cast["exact"]
    estimator.weights = torch.randn(estimator.features(rollout).shape[-1], dtype=torch.float64)
    right = torch.arange(8) % 2.0
    judged = rollout.replace(rewards={"correct": right})
    torch.testing.assert_close(exact(judged).sum(1), right, atol=1e-4, rtol=0)
    last = rollout.lengths - 1
    assert torch.equal(exact(judged)[:, : int(last.min())], estimator(judged)[:, : int(last.min())])


def test_arms_begin_to_read_as_the_policy_does() -> None:
    """A start that has trained a policy alone has no reader; the reader then takes the policy's weights."""
    regimen = built("progress_under_a_budget", "fitted")
    trained = built("progress_under_a_budget", "start").cast
    with torch.no_grad():
        next(trained["policy"].parameters()).add_(1)
    regimen.cast.load_state_dict(trained.state_dict())
    for name, weights in regimen.cast["reader"].state_dict().items():
        assert torch.equal(weights, trained["policy"].state_dict()[name])
