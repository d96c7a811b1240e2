"""Demonstrations beside a policy's own answers, and the world of targets that has both."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch

from regimen import Cast, Knob, Regimen, Stage, Update, train
from regimen.checkers import check
from regimen.credit import GroupRelativeAdvantage
from regimen.objectives import ClippedSurrogateObjective, SFTObjective
from regimen.objectives.base import Batch
from regimen.policies.token import TokenPolicy
from regimen.rewards.answers import AnswerReward
from regimen.rollout import Rollout
from regimen.tasks.demonstrations import DemonstrationTask
from regimen.tasks.target_making import reaches_target, target_fault
from regimen.tasks.text import TextPromptTask
from regimen.tasks.worlds.targets import TargetsWorld, corrupt, prompt, same_question, solved

WORLD = TargetsWorld(3, numbers=3, demonstrated=40, held_out=20, dim=16, layers=1)


def collected(size: int = 6, answer: str = "answer") -> tuple[Rollout, TokenPolicy]:
    policy = WORLD.policy()
    task = DemonstrationTask("demonstrations", WORLD.splits["demonstrations"], prompt, answer=answer)
    knobs = {knob.name: knob.default for knob in policy.knobs}
    return task.collect({"policy": policy}, knobs, torch.Generator().manual_seed(0), size), policy


def test_demonstrations_are_laid_out_as_samples() -> None:
    rollout, policy = collected()
    own = [policy.decode([row[mask]])[0] for row, mask in zip(rollout.actions, rollout.loss_mask, strict=True)]
    assert own == rollout["text"].tolist() == rollout["answer"].tolist()
    assert [prompt({"question": q}, {}) for q in rollout["question"].tolist()] == rollout.context["prompt"].tolist()
    assert torch.equal(rollout.logprobs.isnan(), rollout.loss_mask)
    assert not bool(rollout["truncated"].any())
    assert len(rollout.group.unique()) == 6


def test_they_join_with_answers_and_each_objective_learns_from_its_own() -> None:
    given, policy = collected()
    knobs = {knob.name: knob.default for knob in policy.knobs}
    rng = torch.Generator().manual_seed(0)
    answers = WORLD.questions("questions", "train", 2).collect({"policy": policy}, knobs, rng, 4)
    both = Rollout.cat([answers, given])
    batch = Batch(both, {"policy": policy}, knobs, rng)
    loss = SFTObjective().on("demonstrations")(batch).total
    assert torch.allclose(loss, SFTObjective()(Batch(given, {"policy": policy}, knobs, rng)).total, atol=1e-6)
    assert loss.isfinite()


def test_an_objective_that_needs_their_log_probabilities_does_not_pass_unnoticed() -> None:
    given, policy = collected()
    given = given.replace(advantages=torch.ones(given.mask.shape))
    loss = ClippedSurrogateObjective()(Batch(given, {"policy": policy}, {"temperature": 1.0}, torch.Generator())).total
    assert bool(loss.isnan())


def test_a_stage_learns_from_both_and_counts_them_apart() -> None:
    mu = Knob("mu", 0.5, 0, 1)
    loss = (1 - mu) * ClippedSurrogateObjective().on("questions") + mu * SFTObjective().on("demonstrations")
    stage = Stage(
        "mixed", [WORLD.questions("questions", "train", 4), WORLD.demonstrations()], 2, 24,
        AnswerReward(reaches_target, expected="question"), GroupRelativeAdvantage(), [Update(loss)],
        knobs={"mixture/questions": 16, "mixture/demonstrations": 8},
    )  # fmt: skip
    counters = train(Regimen(Cast(policy=WORLD.policy()), [stage], evaluations=[]), seed=0).counters
    assert (counters.samples, counters.rows, counters.gradient_steps) == (32, 16, 2)


def test_the_task_passes_the_checks_of_a_users_task() -> None:
    assert check(WORLD.demonstrations(), cast={"policy": WORLD.policy()}).messages == []


def test_a_missing_answer_is_named() -> None:
    with pytest.raises(ValueError, match="no field 'solution' with the answer; they have question, answer"):
        collected(answer="solution")


# The world


def test_no_question_is_in_two_splits() -> None:
    kinds = {name: {same_question(row) for row in rows} for name, rows in WORLD.splits.items()}
    assert sum(len(kind) for kind in kinds.values()) == len(set.union(*kinds.values()))
    assert all(kinds.values())
    unseen = {row["target"] for row in WORLD._unseen}
    assert not unseen & {row["target"] for rows in WORLD.splits.values() for row in rows}


def test_equal_seeds_give_equal_worlds() -> None:
    again = TargetsWorld(3, numbers=3, demonstrated=40, held_out=20, dim=16, layers=1)
    assert again.splits == WORLD.splits
    assert all(torch.equal(a, b) for a, b in zip(again.policy().parameters(), WORLD.policy().parameters(), strict=True))


def test_a_quarter_of_the_demonstrations_is_wrong_and_uses_the_numbers_given() -> None:
    faults = [target_fault(row["answer"], row["question"]) for row in WORLD.splits["demonstrations"]]
    assert [faults.count(fault) for fault in ("value", None)] == [10, 30]
    assert all(reaches_target(row["answer"], row["question"]) for row in WORLD.splits["train"])


def test_corruption_exchanges_one_operation() -> None:
    row = {"question": "1 2 3 -> 6", "answer": "1 2 + 3 +"}
    assert corrupt(row, "+-", Random(0))["answer"] in ("1 2 - 3 +", "1 2 + 3 -")
    with pytest.raises(ValueError, match="no exchange of an operation makes '2 2 \\+' miss"):
        corrupt({"question": "2 2 -> 4", "answer": "2 2 +"}, "+*", Random(0))


def test_only_finished_answers_that_make_the_target_are_solved() -> None:
    def answered(text: str, truncated: bool = False) -> Any:
        rollout, _ = collected(1)
        return rollout.with_columns(text=[text], truncated=torch.tensor([truncated]), question=["1 2 3 -> 6"])

    assert solved(answered("1 2 + 3 +")).tolist() == [True]
    assert solved(answered("1 2 + 3 +", truncated=True)).tolist() == [False]
    assert solved(answered("1 2 + 3 -")).tolist() == [False]
    assert solved(answered("3 3 +")).tolist() == [False]


def test_the_evaluation_measures_held_out_questions() -> None:
    task = WORLD.questions("questions", "train", 1)
    policy = WORLD.policy()
    knobs = {knob.name: knob.default for knob in policy.knobs}
    found = task.evaluate({"policy": policy}, knobs, torch.Generator().manual_seed(0))
    assert found.metrics.keys() == {"solved", "sampled", "unseen"}
    assert isinstance(WORLD.questions("probe", "validation", 1), TextPromptTask)
    assert WORLD.questions("probe", "validation", 1).evaluate({}, {}, torch.Generator()).metrics == {}


def test_too_few_questions_are_named() -> None:
    with pytest.raises(ValueError, match=r"9000 demonstrations are asked for and there are \d+"):
        _ = TargetsWorld(0, numbers=3, demonstrated=9000, held_out=20).splits
