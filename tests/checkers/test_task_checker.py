"""The checker of tasks: good ones pass, and every class of failure is explained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from regimen.checkers import StandInPolicy, check
from regimen.knobs import Knob
from regimen.rollout import Rollout
from regimen.tasks import DatasetTask, Evaluation, PromptTask


class Prompts:
    """A task written from the protocol alone: prompts in turn, answered twice each."""

    name: Any = "prompts"
    group_size: Any = 2
    generates = True
    knobs = (Knob("noise", 0.1),)

    def __init__(self) -> None:
        self.position = 0

    def collect(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator, size: int) -> Rollout:
        group = self.position + torch.arange(size) // self.group_size
        self.position += size // self.group_size
        rollout: Rollout = cast["policy"].sample(TensorDict({"condition": group % 2}, batch_size=[size]), knobs, rng)
        return Rollout(rollout.data, (self.name,)).replace(group=group)

    def evaluate(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator) -> Evaluation:
        contexts = TensorDict({"condition": torch.zeros(8, dtype=torch.int64)}, batch_size=[8])
        return Evaluation({"brightness": float(cast["policy"].sample(contexts, knobs, rng)["image"].mean())})

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position = state["position"]


def test_good_tasks_pass_and_keep_their_position() -> None:
    rows = TensorDict({"condition": torch.arange(5)}, batch_size=[5])
    mine = Prompts()
    mine.position = 3
    for task in (mine, PromptTask("p", rows, group_size=3), DatasetTask("d", rows, order="sequential")):
        assert check(task).messages == []
    assert mine.position == 3


class Alias(Prompts):
    name = "a/b"


class Fraction(Prompts):
    group_size = 1.5


class Unstorable(Prompts):
    def state_dict(self) -> dict[str, Any]:
        return {"file": object()}


class Raises(Prompts):
    def collect(self, cast: Any, knobs: Any, rng: torch.Generator, size: int) -> Rollout:
        return cast["critic"]  # type: ignore[no-any-return]


class NoRollout(Prompts):
    def collect(self, *args: Any) -> Any:
        return [super().collect(*args)]


class Short(Prompts):
    def collect(self, cast: Any, knobs: Any, rng: torch.Generator, size: int) -> Rollout:
        return super().collect(cast, knobs, rng, size - self.group_size)


class OtherName(Prompts):
    def collect(self, *args: Any) -> Rollout:
        return Rollout(super().collect(*args).data, ("policy",))


class Alone(Prompts):
    def collect(self, *args: Any) -> Rollout:
        rollout = super().collect(*args)
        return rollout.replace(group=torch.arange(len(rollout)))


class Padding(Prompts):
    def collect(self, *args: Any) -> Rollout:
        rollout = super().collect(*args)
        return rollout.replace(loss_mask=torch.ones_like(rollout.mask))


class Empty(Prompts):
    def collect(self, *args: Any) -> Rollout:
        rollout = super().collect(*args)
        return rollout.replace(mask=torch.zeros_like(rollout.mask), loss_mask=torch.zeros_like(rollout.mask))


class Forgets(Prompts):
    def collect(self, cast: Any, knobs: Any, rng: torch.Generator, size: int) -> Rollout:
        return super().collect(cast, {}, rng, size)


class GlobalDice(Prompts):
    def collect(self, *args: Any) -> Rollout:
        rollout = super().collect(*args)
        return rollout.with_columns(dice=torch.rand(len(rollout)))


class NoPosition(Prompts):
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass


class NoEvaluation(Prompts):
    def evaluate(self, *args: Any) -> Any:
        return {"score": 1.0}


class NoNumber(Prompts):
    def evaluate(self, *args: Any) -> Evaluation:
        return Evaluation({"score": float("nan"), "fine": 1.0})


class Noisy(Prompts):
    def evaluate(self, *args: Any) -> Evaluation:
        return Evaluation({"score": float(torch.rand(()))})


class Learns(Prompts):
    def evaluate(self, cast: Any, *args: Any) -> Evaluation:
        with torch.no_grad():
            cast["policy"].weight.mul_(1.5)
        return Evaluation({"score": 1.0})


class Advances(Prompts):
    def evaluate(self, *args: Any) -> Evaluation:
        self.position += 1
        return super().evaluate(*args)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Alias(), "name is 'a/b', expected a text without '/'"),
        (Fraction(), "group_size is 1.5, expected a whole number of at least 1"),
        (Unstorable(), "state_dict() cannot be stored (state at '/file' is a object"),
        (Raises(), "collect(cast, knobs, rng, size=4) raised KeyError: critic (tried on a stand-in"),
        (NoRollout(), "collect returned a list, expected a Rollout"),
        (Short(), "collect was asked for 4 samples and returned 2"),
        (OtherName(), "the rollout is of task ('policy',), expected ('prompts',); use Rollout.create(task=self.name)"),
        (Alone(), "groups have sizes [1, 1, 1, 1], expected 2 each (group_size); give siblings the same group"),
        (Padding(), "loss_mask is True at steps that do not exist (mask False); make it loss_mask & mask"),
        (Empty(), "some samples have no step at all"),
        (Forgets(), "the rollout does not record the knobs noise that were in force; pass knobs=knobs"),
        (GlobalDice(), "from the same state and generator it collects something else (columns/dice); draw from rng"),
        (NoPosition(), "it collects something else (group); draw from rng only, and keep the position in"),
        (NoEvaluation(), "evaluate returned a dict, expected an Evaluation"),
        (NoNumber(), "evaluate returned metrics that are no finite numbers: {'score': nan}"),
        (Noisy(), "evaluate draws from torch's global generator; use rng"),
        (Learns(), "evaluate changed weights or buffers (policy.weight)"),
        (Advances(), "after evaluate, which must not move the position in the data, it collects something else"),
    ],
)  # fmt: skip
def test_every_failure_is_explained(task: Any, message: str) -> None:
    result = check(task)
    assert not result.ok
    assert message in str(result)


def test_a_task_that_lacks_a_part_is_told_which() -> None:
    class Half:
        name, group_size, generates, knobs = "half", 1, True, ()

        def collect(self, *args: Any) -> Any:
            return None

        def evaluate(self, *args: Any) -> Any:
            return None

    assert "it looks like a Task (it has collect) but lacks state_dict, load_state_dict" in str(check(Half()))


def test_a_cast_of_ones_own_is_used_and_its_weights_stay() -> None:
    class Asks(Prompts):
        def collect(self, cast: Any, knobs: Any, rng: torch.Generator, size: int) -> Rollout:
            return super().collect({"policy": cast["mine"]}, knobs, rng, size)

        def evaluate(self, *args: Any) -> Evaluation:
            return Evaluation({})

    mine = StandInPolicy(3)
    before = mine.weight.clone()
    assert "raised KeyError: mine" in str(check(Asks()))
    assert check(Asks(), cast={"mine": mine}).ok
    assert torch.equal(before, mine.weight)
