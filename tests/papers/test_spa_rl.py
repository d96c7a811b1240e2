"""SPA-RL: the smoke test, what arms differ in, the claims, and its parts on another task and kind of policy."""

from __future__ import annotations

import dataclasses
import math
import warnings
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from regimen import papers, train
from regimen.checkers import check
from regimen.credit import GAE, RewardRedistribution
from regimen.estimators import LinearProgress, RecordedProgress
from regimen.lab.results import read_results
from regimen.lab.runner import Plan, run_experiment
from regimen.models.progress import ProgressEstimator
from regimen.papers.spa_rl import (
    ERRANDS,
    PAPER,
    WAYS,
    Settings,
    checklist,
    cloned,
    curve,
    fitted,
    text,
    text_fitted,
    workshop,
)

QUICK = PAPER.scales["quick"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of scale quick, all of it."""
    out = tmp_path_factory.mktemp("spa-rl") / "quick"
    return run_experiment(Plan(partial(papers.load, PAPER.slug), out, scale="quick")) and read_results(out)


# The smoke test


def test_every_arm_trains_and_every_claim_is_computed(quick: dict[str, Any]) -> None:
    assert quick["failures"] == []
    assert {f"checklist_{way}" for way in WAYS} | {f"workshop_{way}" for way in ERRANDS} <= quick["arms"].keys()
    assert all(claim["missing"] == {} for claim in quick["claims"] if not claim["name"].endswith(("misfit", "credit")))


def test_arms_of_a_world_spend_as_many_episodes(quick: dict[str, Any]) -> None:
    spent = {name: seeds["0"] for name, seeds in quick["arms"].items()}
    assert {spent[f"checklist_{way}"]["samples"] for way in WAYS} == {QUICK.steps * QUICK.batch}
    episodes = (QUICK.workshop_explored + QUICK.workshop_steps) * QUICK.batch
    assert {spent[f"workshop_{way}"]["samples"] for way in ERRANDS} == {episodes}
    fit = spent["checklist_network"]["gradient_steps"] - spent["checklist_terminal"]["gradient_steps"]
    assert fit == QUICK.fit_steps


def test_a_fit_to_three_iterations_is_good_and_sums_to_the_reward() -> None:
    """The first 5 iterations at the size of the experiment: misfit below .05, and so is the error of the sums."""
    regimen = checklist("spa", 0, dataclasses.replace(Settings(), steps=5))
    run = train(regimen, seed=0)
    estimator, final = run.cast["estimator"], run.evaluations[-1]["metrics"]
    assert float(estimator.misfit) < 0.05
    assert final["attribution/misfit"] < 0.05
    assert final["attribution/correlation"] > 0.99
    task = regimen.stages[-1].tasks[0]
    knobs = {"temperature": 1.0, "discount": 1.0}
    rollout = task.collect(run.cast, knobs, torch.Generator().manual_seed(1), 64)
    error = estimator(rollout).sum(1) - rollout["env_reward"].sum(1)
    assert float(error.square().mean().sqrt()) < 0.05


# Arms and settings


def credit_of(regimen: Any) -> Any:
    return regimen.stages[-1].credit


def learning_of(regimen: Any) -> Any:
    """How PPO learns in the last stage."""
    update, *others = regimen.stages[-1].updates
    assert not others
    losses = [(term.name, weight.knob.default) for weight, term in update.objective.terms]
    return update.learning_rate, update.members, update.batches, losses


def test_arms_of_the_checklist_differ_in_the_credit_alone() -> None:
    made = {way: checklist(way, 3, QUICK) for way in WAYS}
    first = made["terminal"]
    for regimen in made.values():
        assert [stage.steps for stage in regimen.stages if stage.steps] == [3, 2]
        assert all(torch.equal(a, b) for a, b in zip(
            regimen.cast["policy"].parameters(), first.cast["policy"].parameters(), strict=True
        ))  # fmt: skip
        assert learning_of(regimen) == learning_of(first)
    assert credit_of(first) == GAE(1.0)
    assert credit_of(made["uniform"]) == dataclasses.replace(credit_of(made["spa"]), by="uniform")
    assert credit_of(made["oracle"]) == credit_of(made["spa"]) == credit_of(made["network"])
    assert credit_of(made["network_ungated"]).gate == math.inf
    kinds = {way: type(regimen.cast.get("estimator")) for way, regimen in made.items()}
    assert kinds["spa"] is LinearProgress
    assert kinds["network"] is kinds["network_ungated"] is ProgressEstimator
    assert kinds["oracle"] is RecordedProgress
    assert kinds["terminal"] is kinds["uniform"] is type(None)


def test_the_truth_is_told_to_the_oracle_alone() -> None:
    """With another credit told by the environment, no other arm moves."""

    def final(way: Any, spoilt: bool) -> Any:
        regimen = checklist(way, 0, QUICK)
        if spoilt:
            env = regimen.stages[0].tasks[0]._stand.env  # type: ignore[attr-defined]
            moved = env.move
            env.move = lambda actions: (*moved(actions)[:3], {"credit": torch.rand(env.count)})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return train(regimen, seed=0).evaluations[-1]["metrics"]["checklist/return"]

    for way in ("terminal", "uniform", "spa", "network"):
        assert final(way, True) == final(way, False)
    assert final("oracle", True) != final("oracle", False)


def test_arms_of_the_workshop_start_alike_and_train_as_long() -> None:
    s = QUICK
    starts = {arm.name.removeprefix("workshop_"): arm.start for arm in PAPER.arms if arm.name.startswith("workshop_")}
    assert starts == {
        "cloned": None, "fitted": "workshop_cloned", "terminal": "workshop_cloned", "uniform": "workshop_cloned",
        "leave_one_out": "workshop_cloned", "spa": "workshop_fitted", "spa_grounding": "workshop_fitted",
        "terminal_grounding": "workshop_cloned",
    }  # fmt: skip
    for way in ERRANDS:
        regimen = workshop(way, 0, s)
        explored = 0 if way.startswith("spa") else s.workshop_explored
        assert regimen.stages[0].steps == s.workshop_steps + explored
        assert learning_of(regimen) == learning_of(workshop("terminal", 0, s))
    assert fitted(0, s).stages[0].updates[0].members == ["estimator"]


def test_the_penalty_has_one_weight_in_both_arms() -> None:
    boards = [dict(workshop(way, 0, Settings()).stages[0].board(workshop(way, 0, Settings()).cast, {})) for way in (
        "spa_grounding", "terminal_grounding"
    )]  # fmt: skip
    assert [board["weight/grounding"] for board in boards] == [Settings().grounding] * 2


@pytest.mark.parametrize("make", [partial(checklist, "spa"), partial(workshop, "terminal_grounding"), cloned, fitted])
def test_regimens_pass_the_checks(make: Any) -> None:
    assert check(make(0, QUICK)).messages == []


def test_an_estimator_that_fits_badly_is_passed_over_with_a_warning() -> None:
    """Twenty gradient steps are too few: the gate says so, and the arm learns from the reward at the end."""
    with pytest.warns(UserWarning, match="the misfit of 'estimator' is"):
        run = train(checklist("network", 0, QUICK), seed=0)
    assert float(run.cast["estimator"].misfit) > QUICK.gate


def test_a_curve_has_one_value_for_each_iteration() -> None:
    evaluations = [
        {"iterations": number, "metrics": {"checklist/return": value}}
        for number, value in ((0, 9.0), (1, 1.0), (2, 2.0), (2, 2.5), (3, 3.0))
    ]
    assert curve(SimpleNamespace(evaluations=evaluations)) == [1.0, 2.5, 3.0]  # type: ignore[arg-type]


def test_claims_compare_arms_of_one_seed() -> None:
    def arm(value: float) -> Any:
        records = [{"iterations": number, "metrics": {"checklist/return": value}} for number in range(3)]
        return SimpleNamespace(evaluations=records, final={"workshop/success": value, "workshop/valid_share": value})

    seed = {f"checklist_{way}": arm(index) for index, way in enumerate(WAYS)}
    seed |= {f"workshop_{way}": arm(index) for index, way in enumerate(ERRANDS)}
    claims = {claim.name: claim for claim in PAPER.claims}
    assert claims["spa_terminal"].value(seed) == 2
    assert claims["spa_uniform"].value(seed) == 1
    assert claims["workshop_success_spa_terminal"].value(seed) == 3
    assert [claim.name for claim in PAPER.claims if claim.judged] == ["spa_terminal", "spa_uniform", "credit"]


# The real thing, in small


def test_the_text_arms_train_a_language_model(tmp_path: Any) -> None:
    """A model of the real class from a folder, with adapters: explore, fit, gate, PPO on turns."""
    from regimen.models.small_decoder import small_decoder, word_tokenizer
    from regimen.tasks.worlds.guess_number import GuessNumber

    tokenizer = word_tokenizer(GuessNumber().words)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    small_decoder(len(tokenizer), dim=16, layers=1, heads=2).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    s = dataclasses.replace(QUICK, model=str(tmp_path), lora_rank=2, batch=16, text_explored=1, text_steps=1)
    before = train(text_fitted(0, s), seed=0)
    assert float(before.cast["estimator"].misfit) >= 0
    regimen = text("spa", 0, s)
    regimen.cast.load_state_dict(before.cast.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = train(regimen, seed=0)
    assert run.counters.gradient_steps > 0
    assert isinstance(regimen.stages[0].credit, RewardRedistribution)
