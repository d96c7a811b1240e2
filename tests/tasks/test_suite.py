"""Suites: as many samples of every task, means over tasks, and exact resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from regimen import Cast, Regimen, Stage, Update, train
from regimen.checkers import check
from regimen.knobs import Knob
from regimen.objectives import SFTObjective
from regimen.policies import ActionPolicy
from regimen.rewards import EnvironmentReward
from regimen.rollout import Rollout
from regimen.storage import pack_tree, unpack_tree
from regimen.tasks import EnvTask, Evaluation, Gymnasium, ParallelTask, Suite


@dataclass
class Rated:
    """A task with known metrics."""

    name: str
    metrics: dict[str, float]
    group_size: int = 2
    generates: bool = True
    knobs: tuple[Knob, ...] = (Knob("discount", 0.9),)

    def collect(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator, size: int) -> Rollout:
        return Rollout.create(
            task=self.name, group=torch.arange(size) // self.group_size, mask=torch.ones(size, 1, dtype=torch.bool)
        )

    def evaluate(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator) -> Evaluation:
        return Evaluation(self.metrics)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        return None


def test_the_mean_is_over_tasks_whatever_their_episodes() -> None:
    rates = {"a": 1.0, "b": 0.5, "c": 0.0}
    suite = Suite("three", [Rated(name, {"success": rate, "length": 7.0}) for name, rate in rates.items()])
    found = suite.evaluate({}, {}, torch.Generator()).metrics
    assert found["success"] == 0.5
    assert {name: found[f"{name}/success"] for name in rates} == rates
    assert found["length"] == 7.0


def test_a_metric_that_not_all_have_has_no_mean() -> None:
    suite = Suite("two", [Rated("a", {"success": 1.0, "kl": 3.0}), Rated("b", {"success": 0.0})])
    found = suite.evaluate({}, {}, torch.Generator()).metrics
    assert found["a/kl"] == 3.0
    assert "kl" not in found


def test_every_task_gives_as_many_samples() -> None:
    suite = Suite("two", [Rated("a", {}), Rated("b", {})])
    rollout = suite.collect({}, {}, torch.Generator(), 8)
    assert (suite.group_size, rollout.task_names, rollout.task.bincount().tolist()) == (4, ("a", "b"), [4, 4])
    assert [knob.name for knob in suite.knobs] == ["discount"]


def test_sizes_that_cannot_be_equal_are_refused() -> None:
    with pytest.raises(ValueError, match=r"suite 'odd' has the tasks \{'a': 2, 'b': 3\}"):
        Suite("odd", [Rated("a", {}), Rated("b", {}, group_size=3)])
    with pytest.raises(ValueError, match="suite 'empty' has the tasks none"):
        Suite("empty", [])
    with pytest.raises(
        ValueError, match="asked for 6 samples; expected a multiple of 4, a group of each of its 2 tasks"
    ):
        Suite("two", [Rated("a", {}), Rated("b", {})]).collect({}, {}, torch.Generator(), 6)


def test_it_keeps_the_rules_of_tasks() -> None:
    suite = Suite("two", [EnvTask(name, Gymnasium("CartPole-v1"), copies=2, steps=5) for name in ("a", "b")])
    assert check(suite, cast={"policy": ActionPolicy.for_spaces(*suite.tasks[0].spaces)}).messages == []


def test_resume_continues_every_task() -> None:
    def made() -> Suite:
        return Suite("two", [EnvTask(name, Gymnasium("CartPole-v1"), copies=2, steps=5) for name in ("a", "b")])

    suite, again, rng = made(), made(), torch.Generator().manual_seed(0)
    cast = {"policy": ActionPolicy.for_spaces(*suite.tasks[0].spaces)}
    knobs = {"temperature": 1.0, "discount": 0.9}
    suite.collect(cast, knobs, rng, 4)
    again.load_state_dict(unpack_tree(pack_tree(suite.state_dict())))
    other = torch.Generator()
    other.set_state(rng.get_state())
    one, two = suite.collect(cast, knobs, rng, 4), again.collect(cast, knobs, other, 4)
    assert torch.equal(one.observations, two.observations)


def test_a_stage_that_collects_from_a_suite_misses_no_task() -> None:
    """Its samples are of the tasks, and not of the suite, whose absence would be warned of."""
    suite = Suite("two", [EnvTask(name, Gymnasium("CartPole-v1"), copies=2, steps=5) for name in ("a", "b")])
    assert ParallelTask(lambda worker: suite, 1).collects == suite.collects == ("a", "b")
    cast = Cast(policy=ActionPolicy.for_spaces(*suite.tasks[0].spaces))
    stage = Stage("s", [suite], 1, 4, EnvironmentReward(), None, [Update(SFTObjective())])
    outcome = train(Regimen(cast, [stage], evaluations=[]), listener=lambda event: None)
    assert not [text for text in outcome.warnings if "has no sample" in text]
