"""A schedule moves one knob along a curve."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from regimen import Cast, Epochs, Event, Regimen, Stage, Update, train
from regimen.checkers import assert_ok
from regimen.controllers import Constant, Controller, Curve, Exponential, Linear, Schedule, Situation, Steps
from regimen.credit import GroupRelativeAdvantage
from regimen.objectives import ClippedSurrogateObjective
from regimen.policies import FlowPolicy
from regimen.rewards import reward_from
from regimen.rollout import Rollout
from regimen.tasks import PromptTask


@reward_from
def bright(rollout: Rollout) -> Tensor:
    return rollout["image"].flatten(1).mean(1)


def stage(*controllers: Controller, steps: int = 3) -> Stage:
    rows = TensorDict({"condition": torch.arange(2)}, batch_size=[2])
    update = Update(ClippedSurrogateObjective(clip=0.01), learning_rate=3e-3, batches=Epochs(1, 2))
    return Stage(
        "reinforce", [PromptTask("prompts", rows, group_size=4)], steps, 16, reward=bright,
        credit=GroupRelativeAdvantage(), updates=[update], controllers=list(controllers),
    )  # fmt: skip


def test_gives_the_curves_value_at_the_situations_step() -> None:
    schedule = Schedule("noise_level", Linear(0.9, 0.3, 6))
    assert schedule.moves == ("noise_level",)
    assert schedule.moment == "before_collect"
    for step, value in ((0, 0.9), (3, 0.6), (9, 0.3)):
        assert schedule(Situation(step, 100, {}, {})) == {"noise_level": pytest.approx(value)}


def test_remembers_nothing() -> None:
    schedule = Schedule("noise_level", Linear(0.9, 0.3, 6))
    before = schedule(Situation(2, None, {}, {}))
    schedule(Situation(5, None, {}, {}))
    assert schedule.state_dict() == {}
    schedule.load_state_dict({})
    assert schedule(Situation(2, None, {}, {})) == before


@pytest.mark.parametrize("same", [Exponential(0.7, 1), Steps(0.7, 0.7, 0, 3), Linear(0.7, 0.7, 3)])
def test_curve_that_goes_nowhere_trains_to_the_same_weights(
    tiny_policy: Callable[..., FlowPolicy], same: Curve
) -> None:
    weights = []
    for curve in (Constant(0.7), same):
        policy = tiny_policy()
        train(Regimen(Cast(policy=policy), [stage(Schedule("noise_level", curve))]))
        weights.append(policy.state_dict())
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_integer_knob_falls_in_steps(tiny_policy: Callable[..., FlowPolicy]) -> None:
    steps: list[int] = []

    @reward_from
    def note(rollout: Rollout) -> Tensor:
        steps.append(rollout.steps)
        assert rollout.knobs["sampling_steps"].tolist() == [float(rollout.steps)] * len(rollout)
        return rollout["image"].flatten(1).mean(1)

    events: list[Event] = []
    prescribed = stage(Schedule("sampling_steps", Steps(8, 2, 3, 8)), steps=8)
    prescribed.reward = note
    train(Regimen(Cast(policy=tiny_policy()), [prescribed]), listener=events.append)
    assert steps == [8, 8, 5, 5, 3, 3, 2, 2]
    assert [event.metrics["knob/sampling_steps"] for event in events if event.kind == "step"] == steps


def test_after_learn_is_in_force_in_the_next_iteration(tiny_policy: Callable[..., FlowPolicy]) -> None:
    events: list[Event] = []
    schedule = Schedule("noise_level", Linear(0.9, 0.3, 3), moment="after_learn")
    train(Regimen(Cast(policy=tiny_policy()), [stage(schedule)]), listener=events.append)
    levels = [event.metrics["knob/noise_level"] for event in events if event.kind == "step"]
    assert levels == pytest.approx([0.7, 0.7, 0.5])


def test_value_outside_the_knobs_range_stops_the_run_and_names_both(tiny_policy: Callable[..., FlowPolicy]) -> None:
    with pytest.raises(ValueError, match=r"knob 'noise_level': Schedule gave -0.1.* expected a finite number in \[0.0"):
        train(Regimen(Cast(policy=tiny_policy()), [stage(Schedule("noise_level", Linear(0.1, -0.1, 1)))]))


def test_passes_the_checker_for_controllers() -> None:
    assert_ok(Schedule("noise_level", Linear(0.9, 0.3, 6)))
