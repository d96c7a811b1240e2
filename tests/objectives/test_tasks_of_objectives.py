"""An objective on some tasks' samples only, its parts by name, and weights that are what another leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from regimen.checkers.stand_ins import StandInPolicy, credited, stand_in_rollout
from regimen.knobs import Knob, Knobs, Weight
from regimen.objectives import ClippedSurrogateObjective, EntropyBonus, SFTObjective
from regimen.objectives.base import Batch, Objective
from regimen.rewards import FunctionReward, Scene
from regimen.rollout import Rollout

SURROGATE, SFT = ClippedSurrogateObjective(), SFTObjective()


def rollout() -> Rollout:
    return credited(stand_in_rollout())


def batch(given: Rollout, **slices: Any) -> Batch:
    return Batch(given, {"policy": StandInPolicy(3)}, {}, torch.Generator(), **slices)


@pytest.mark.parametrize("objective", [SURROGATE, SFT, EntropyBonus()])
def test_it_is_the_objective_of_those_samples_alone(objective: Objective) -> None:
    for task in ("alpha", "beta"):
        expected = objective(batch(rollout().of_task(task))).total
        assert torch.equal(objective.on(task)(batch(rollout())).total, expected)
    both = objective.on("alpha", "beta")(batch(rollout())).total
    assert torch.equal(both, objective(batch(rollout())).total)


def test_slices_of_a_minibatch_add_up() -> None:
    whole, objective = rollout(), SFT.on("beta") + SURROGATE.on("alpha")
    knobs = Knobs.of(objective)
    parts = []
    for start in range(0, len(whole), 2):
        rows = slice(start, start + 2)
        part = Batch(whole[rows], {"policy": StandInPolicy(3)}, knobs, torch.Generator(), whole=whole, rows=rows)
        parts.append(objective(part).total)
    expected = objective(Batch(whole, {"policy": StandInPolicy(3)}, knobs, torch.Generator())).total
    assert float(sum(parts).detach()) == pytest.approx(float(expected.detach()), abs=1e-6)  # type: ignore[union-attr]


def test_without_samples_of_its_tasks_it_is_0() -> None:
    loss = SURROGATE.on("gamma")(batch(rollout()))
    assert float(loss.total) == float(loss.components["surrogate"]) == 0
    assert not loss.total.requires_grad
    with pytest.raises(ValueError, match="name at least one task"):
        SURROGATE.on()


def test_terms_on_the_same_tasks_share_one_pass() -> None:
    given = batch(rollout())
    (SURROGATE.on("alpha") + SFT.on("alpha")).on("alpha", "beta")
    first, second = given.of_tasks("alpha"), given.of_tasks("alpha")
    assert first is second
    assert given.of_tasks("alpha", "beta") is given


def test_parts_are_named_and_come_without_their_weights() -> None:
    mu = Knob("mu", 0.25, 0, 1)
    loss = (1 - mu) * (SURROGATE - 0.01 * EntropyBonus()).on("alpha") + mu * SFT.on("beta")
    parts = {part.term_name: part for part in loss.parts()}
    assert list(parts) == ["surrogate+entropy+sft", "surrogate+entropy", "surrogate", "entropy", "sft"]
    knobs, given = Knobs.of(loss), rollout()
    both = Batch(given, {"policy": StandInPolicy(3)}, knobs, torch.Generator())
    entropy = parts["entropy"](both).total
    assert torch.equal(entropy, EntropyBonus()(batch(given.of_task("alpha"))).total)
    found = float(loss(both).total.detach())
    terms = [float(parts[name](both).total.detach()) for name in ("surrogate", "entropy", "sft")]
    assert found == pytest.approx(0.75 * (terms[0] - 0.01 * terms[1]) + 0.25 * terms[2], abs=1e-5)


def test_the_worked_mixture_is_1_18() -> None:
    class Given(Objective):
        def __init__(self, name: str, value: float) -> None:
            self.name, self.value = name, value

        def loss(self, batch: Batch) -> torch.Tensor:
            return torch.tensor(self.value)

    mu = Knob("mu", 0.8, 0, 1)
    loss = (1 - mu) * Given("rl", 0.7) + mu * Given("sft", 1.3)
    assert float(loss(Batch(rollout(), {}, Knobs.of(loss), torch.Generator())).total) == pytest.approx(1.18)


def test_what_a_knob_leaves_weights_rewards_too() -> None:
    share = Knob("share", 0.25, 0, 1)
    one, two = (FunctionReward(lambda r, v=value: torch.full((len(r),), v), f"c{value}") for value in (1.0, 2.0))
    reward = (1 - share) * one + share * two - (1 - share) * (one + two)
    total = reward.judge(rollout(), Scene({}, Knobs.of(reward))).total
    assert total is not None
    assert total.value.tolist() == pytest.approx([0.75 + 0.5 - 0.75 * 3] * 6)
    assert Weight.of(1 - share, "").times(2).value({"share": 0.25}) == 1.5
