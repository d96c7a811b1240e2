"""Tasks that make fresh rows, as hard as their knobs say."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from regimen import Cast, Knob, Knobs, Regimen, Stage
from regimen.controllers import Linear, Schedule
from regimen.iteration import Counters, StageRun
from regimen.rewards import Scene
from regimen.rewards.answers import AnswerReward
from regimen.rollout import Rollout
from regimen.tasks.arithmetic import chained_arithmetic, modular_arithmetic
from regimen.tasks.generated import GeneratedTask
from regimen.tasks.target_making import reaches_target, target_making

DIGITS = Knob("digits", 4, low=2, high=8, integer=True)


class Solver:
    """A policy that says what its prompt's part after "=>" says."""

    knobs = ()

    def sample(self, contexts: TensorDict, knobs: Mapping[str, float], rng: torch.Generator) -> Rollout:
        prompts = list(contexts["prompt"])
        return Rollout.create(
            task="policy", group=torch.arange(len(prompts)), mask=torch.ones(len(prompts), 1, dtype=torch.bool),
            context=contexts, knobs=knobs, columns={"text": [prompt.partition("=>")[2] for prompt in prompts]},
        )  # fmt: skip


CAST = {"policy": Solver()}


def chains(**settings: Any) -> GeneratedTask:
    return GeneratedTask("chains", chained_arithmetic, difficulty={"digits": DIGITS}, **settings)


def test_rows_are_as_hard_as_the_knob_says(rng: torch.Generator) -> None:
    task = chains(group_size=2, reads=[Knob("token_budget", 48)], template="{question} {token_budget}")
    assert [knob.name for knob in task.knobs] == ["digits", "token_budget"]
    board = Knobs.of(task, digits=6)
    rollout = task.collect(CAST, board, rng, 8)
    assert rollout["operands"].tolist() == [6] * 8
    assert all(len(question.split()) == 11 for question in rollout["question"])
    assert rollout.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert rollout.task_names == ("chains",)
    assert list(rollout.context["prompt"])[3] == f"{list(rollout['question'])[3]} 48"


def test_every_draw_is_fresh_and_the_stream_decides_it() -> None:
    def draws(seed: int) -> list[str]:
        task, rng = chains(), torch.Generator().manual_seed(seed)
        board = Knobs.of(task)
        return [question for _ in range(3) for question in task.collect(CAST, board, rng, 4)["question"]]

    assert draws(0) == draws(0) != draws(1)
    assert len(set(draws(0))) > 9


def test_resume_needs_the_stream_alone(rng: torch.Generator) -> None:
    task, board = chains(), Knobs.of(chains())
    task.collect(CAST, board, rng, 4)
    at = rng.get_state()
    expected = list(task.collect(CAST, board, rng, 4)["question"])
    again, stream = chains(), torch.Generator()
    again.load_state_dict(task.state_dict())
    stream.set_state(at)
    assert list(again.collect(CAST, board, stream, 4)["question"]) == expected
    assert task.state_dict() == {}


def test_a_curriculum_moves_the_difficulty() -> None:
    """The knob is a whole number, whatever the curve gives."""
    task = chains()
    stage = Stage("s", [task], 5, 4, controllers=[Schedule("digits", Linear(2, 4, 4))])
    run, seen = StageRun(Regimen(Cast(policy=Solver()), [stage]), stage), []
    run.start(fresh=True)
    rng = torch.Generator().manual_seed(0)
    for step in range(5):
        run.iterate(step, Counters(), rng)
        seen.append(run.memory.newest()["operands"].tolist())
    assert seen == [[2] * 4, [2] * 4, [3] * 4, [3] * 4, [4] * 4]


@pytest.mark.parametrize(
    ("make", "verifier", "expected"),
    [
        (partial(modular_arithmetic, modulus=13), lambda given, wanted: given.strip() == wanted, "answer"),
        (partial(target_making, operations="+-*/"), reaches_target, "question"),
    ],
)
def test_the_solution_of_a_row_is_judged_right(make: Any, verifier: Any, expected: str, rng: torch.Generator) -> None:
    task = GeneratedTask("solve", make, "{question} => {answer}")
    reward = AnswerReward(verifier, expected=expected)
    rollout = task.collect(CAST, {}, rng, 32)
    assert reward.score(rollout, Scene()).value.tolist() == [1.0] * 32
    shifted = rollout.with_columns(text=[*list(rollout["text"])[1:], "0"])
    assert reward.score(shifted, Scene()).value.mean() < 0.5


def test_wrong_settings_are_named(rng: torch.Generator) -> None:
    with pytest.raises(ValueError, match=r"task 'chains': the template names '\{budget\}'"):
        chains(template="{question} {budget}")
    with pytest.raises(ValueError, match="asked for 3 samples, expected a multiple of its group_size 2"):
        chains(group_size=2).collect(CAST, {"digits": 4.0}, rng, 3)
    with pytest.raises(ValueError, match="digits: range 1 to 1"):
        GeneratedTask("chains", chained_arithmetic, difficulty={"digits": Knob("digits", 1)})
