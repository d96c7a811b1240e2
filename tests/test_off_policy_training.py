"""Off-policy control through the real loop: known optima in seconds, offline data, warm-up, exact resume."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium.spaces as spaces
import pytest
import torch
from tensordict import TensorDict
from torch import nn

from control_worlds import Identity
from regimen import (
    Cast,
    Draws,
    Epochs,
    Event,
    Knob,
    NewestRollout,
    ReferenceRefresh,
    Regimen,
    ReplayMemory,
    Stage,
    Update,
    train,
)
from regimen.controllers import Linear, Schedule
from regimen.loop import Outcome
from regimen.models import MLPTorso, QNetwork, Temperature
from regimen.objectives import DQNObjective, sac
from regimen.policies import ActionPolicy, GaussianHead, QPolicy, UniformPolicy
from regimen.rewards import EnvironmentReward
from regimen.tasks import DatasetTask, EnvTask
from regimen.tasks.environments import Gymnasium, GymnasiumVector
from regimen.tasks.environments.tensor import GridWorld

Build = Callable[[], Regimen]


def quiet(event: Event) -> None:
    """Show nothing."""


def identity(kinds: int | None) -> Callable[[int], GymnasiumVector]:
    return lambda count: GymnasiumVector([partial(Identity, kinds)] * count)


def dqn(task: Any, policy: QPolicy, steps: int, **settings: Any) -> Regimen:
    """DQN with the usual parts; `settings` replace those of the stage, the update or the memory."""
    update = Update(
        settings.pop("objective", DQNObjective()),
        learning_rate=settings.pop("learning_rate", 1e-2), optimizer=torch.optim.Adam, max_grad_norm=None,
        batches=settings.pop("batches", Draws(4, 32)),
    )  # fmt: skip
    options: dict[str, Any] = {
        "batch_size": task.group_size,
        "reward": EnvironmentReward(),
        "memory": partial(ReplayMemory, 1000, "transition"),
        "rules": [ReferenceRefresh("policy_target", of="policy", mode="ema", decay=0.9)],
        **settings,
    }
    return Regimen(Cast(policy=policy), [Stage("learn", [task], steps, updates=[update], **options)])


def soft(task: EnvTask, steps: int, *, width: int = 32, temperature: float = 0.5, **settings: Any) -> Regimen:
    """SAC on actions of numbers, with small networks; `settings` replace those of the stage or the update."""
    torch.manual_seed(0)
    seen, box = task.spaces
    policy = ActionPolicy(
        MLPTorso(seen.shape[0], (width, width), nn.ReLU),
        GaussianHead(width, 1, learned_std=True, box=(box.low, box.high)),
    )
    critic = QNetwork.for_spaces(seen, box, widths=(width, width))
    cast = Cast(policy=policy, critic=critic, temperature=Temperature(temperature))
    update = Update(
        sac(discount=settings.pop("discount", None)), ["policy", "critic", "temperature"], 3e-3,
        optimizer=torch.optim.Adam, max_grad_norm=None, batches=settings.pop("batches", Draws(8, 64, after=64)),
    )  # fmt: skip
    options: dict[str, Any] = {
        "batch_size": task.group_size,
        "reward": EnvironmentReward(),
        "memory": partial(ReplayMemory, 5000, "transition"),
        "rules": [ReferenceRefresh("critic_target", of="critic", mode="ema", decay=0.95)],
        **settings,
    }
    return Regimen(cast, [Stage("learn", [task], steps, updates=[update], **options)])


def last(outcome: Outcome, name: str) -> float:
    return float(outcome.evaluations[-1]["metrics"][name])


def test_dqn_learns_which_action_is_right() -> None:
    torch.manual_seed(0)
    task = EnvTask("identity", identity(3), copies=4, steps=4, discount=0.5)
    outcome = train(dqn(task, QPolicy.for_spaces(*task.spaces, epsilon=0.3), 40), listener=quiet)
    assert outcome.evaluations[0]["metrics"]["identity/return"] < 7
    assert last(outcome, "identity/return") == 8


CORRIDOR = ("S...G",)


def corridor(**settings: Any) -> EnvTask:
    """Four cells to the goal; the last step pays 1."""
    make = partial(GridWorld, lines=CORRIDOR, limit=30)
    return EnvTask("corridor", make, **{"copies": 4, "steps": 8, "discount": 0.5, **settings})


@pytest.mark.parametrize("n", [1, 3])
def test_dqn_finds_the_values_of_a_corridor(n: int) -> None:
    """A table learns that the goal is worth 1 a step away, and half of that for every step further."""
    torch.manual_seed(0)
    task = corridor()
    policy = QPolicy.for_spaces(*task.spaces)
    memory = partial(ReplayMemory, 2000, "transition", ahead=n - 1)
    regimen = dqn(
        task, policy, 150, memory=memory, learning_rate=3e-2, objective=DQNObjective(n=n),
        controllers=[Schedule("epsilon", Linear(1.0, 0.5 if n == 1 else 0.0, 100))],
    )  # fmt: skip
    outcome = train(regimen, listener=quiet)
    assert last(outcome, "corridor/length") == 4
    best = policy.values(torch.arange(4)).max(1).values.tolist()
    assert best == pytest.approx([1 / 8, 1 / 4, 1 / 2, 1], abs=0.05)


def test_a_discount_that_rises_is_the_one_of_what_was_learned_before() -> None:
    """The table ends at the values under the last discount, though most of memory was taken under others."""
    torch.manual_seed(0)
    task = corridor(discount=None)
    policy = QPolicy.for_spaces(*task.spaces, epsilon=0.5)
    regimen = dqn(
        task, policy, 150, learning_rate=3e-2, memory=partial(ReplayMemory, 10_000, "transition"),
        objective=DQNObjective(discount=Knob("discount", 0.0, 0, 1)),
        controllers=[Schedule("discount", Linear(0.0, 0.5, 60))],
    )  # fmt: skip
    train(regimen, listener=quiet)
    best = policy.values(torch.arange(4)).max(1).values.tolist()
    assert best == pytest.approx([1 / 8, 1 / 4, 1 / 2, 1], abs=0.05)


def test_a_recorded_discount_must_not_move_under_a_memory() -> None:
    task = corridor(discount=Knob("discount", 0.5, 0, 1))
    regimen = dqn(task, QPolicy.for_spaces(*task.spaces), 3, controllers=[Schedule("discount", Linear(0.5, 0.9, 2))])
    with pytest.raises(
        ValueError, match="'discount' .* which is in force now; what is replayed must not hold a discount"
    ):
        train(regimen, listener=quiet)


def test_dqn_holds_up_a_pole() -> None:
    torch.manual_seed(100)
    task = EnvTask("pole", Gymnasium("CartPole-v1"), copies=4, steps=8, evaluation_steps=500)
    policy = QPolicy.for_spaces(*task.spaces)
    regimen = dqn(
        task, policy, 94, learning_rate=2e-3, objective=DQNObjective(n=3), batches=Draws(8, 128, after=500),
        memory=partial(ReplayMemory, 10_000, "transition", ahead=2),
        controllers=[Schedule("epsilon", Linear(1.0, 0.05, 94))],
    )  # fmt: skip
    outcome = train(regimen, seed=100, listener=quiet)
    assert outcome.evaluations[0]["metrics"]["pole/return"] < 50
    assert last(outcome, "pole/return") > 150


def test_sac_learns_the_number_that_is_right() -> None:
    task = EnvTask("identity", identity(None), copies=4, steps=4, discount=0.5)
    outcome = train(soft(task, 60), listener=quiet)
    assert outcome.evaluations[0]["metrics"]["identity/return"] < -0.2
    assert last(outcome, "identity/return") > -0.05


def test_sac_swings_up_a_pendulum() -> None:
    """A good swing-up loses some 150, acting at random more than 1000.

    After the 3840 steps given here, seeds 100 to 109 lose between 126 and 334 (182 in the mean), and this seed 193.
    """
    task = EnvTask("pendulum", Gymnasium("Pendulum-v1"), copies=4, steps=4, discount=0.97)
    follow = ReferenceRefresh("critic_target", of="critic", mode="ema", decay=0.85)
    regimen = soft(task, 240, width=64, temperature=0.2, batches=Draws(16, 128, after=64), rules=[follow])
    outcome = train(regimen, listener=quiet)
    assert outcome.evaluations[0]["metrics"]["pendulum/return"] < -1000
    assert last(outcome, "pendulum/return") > -400


def test_two_runs_of_one_seed_are_the_same() -> None:
    weights = []
    for _ in range(2):
        task = EnvTask("identity", identity(None), copies=2, steps=4)
        outcome = train(soft(task, 15), seed=3, listener=quiet)
        weights.append([p.detach().clone() for name in ("policy", "critic") for p in outcome.cast[name].parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def pendulum() -> Regimen:
    task = EnvTask("pendulum", Gymnasium("Pendulum-v1"), copies=2, steps=4, evaluation_episodes=1)
    return soft(task, 24, memory=partial(ReplayMemory, 60, "transition"), evaluate_every=10)


def pole() -> Regimen:
    torch.manual_seed(0)
    task = EnvTask("pole", Gymnasium("CartPole-v1"), copies=2, steps=4)
    memory = partial(ReplayMemory, 60, "transition", ahead=2)
    schedule = Schedule("epsilon", Linear(1.0, 0.1, 20))
    policy = QPolicy.for_spaces(*task.spaces, widths=(8,), dueling=True)
    return dqn(task, policy, 24, memory=memory, objective=DQNObjective(n=3), controllers=[schedule])


@pytest.mark.parametrize("build", [pendulum, pole])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path: Path, build: Build) -> None:
    """Interrupted before and after the ring has come round; weights, and what the memory holds, end the same."""
    whole = train(build(), seed=1, out=tmp_path / "whole", checkpoint_every=24, listener=quiet)
    for stop in (5, 17):

        def interrupt(event: Event, at: int = stop) -> None:
            if event.kind == "step" and event.step == at:
                raise KeyboardInterrupt

        out = tmp_path / f"stopped-{stop}"
        with pytest.raises(KeyboardInterrupt):
            train(build(), seed=1, out=out, checkpoint_every=2, listener=interrupt)
        again = train(build(), seed=1, out=out, resume=True, listener=quiet)
        for name in whole.cast:
            a, b = (outcome.cast[name].state_dict() for outcome in (whole, again))
            assert all(torch.equal(value, b[key]) for key, value in a.items()), (stop, name)
        assert whole.evaluations[-1]["metrics"] == again.evaluations[-1]["metrics"]


def test_a_stage_may_fill_the_memory_of_the_next() -> None:
    """Random steps first, then learning from them: memory given as an instance is kept."""
    first = EnvTask("identity", identity(None), copies=4, steps=25, discount=0.5, member="random")
    task = EnvTask("identity", identity(None), copies=4, steps=4, discount=0.5)
    memory = ReplayMemory(5000, "transition")
    regimen = soft(task, 1, memory=memory)
    cast = Cast(**regimen.cast, random=UniformPolicy(task.spaces[1]))
    fill = Stage("fill", [first], 5, batch_size=4, reward=EnvironmentReward(), memory=memory)
    outcome = train(Regimen(cast, [fill, *regimen.stages]), listener=quiet)
    assert len(memory) == 5 * 4 * 25 + 4 * 4
    # With 500 steps to learn from, the first iteration learns, which alone it would not.
    assert outcome.counters.gradient_steps == 8
    drawn = memory.sample(200, torch.Generator().manual_seed(0))
    assert float(drawn.actions.abs().max()) > 0.95


def test_a_memory_that_is_made_is_made_afresh() -> None:
    task = EnvTask("identity", identity(None), copies=2, steps=4)
    made: list[ReplayMemory] = []

    def make() -> ReplayMemory:
        made.append(ReplayMemory(100, "transition"))
        return made[-1]

    regimen = soft(task, 2, memory=make)
    second = Stage("again", [task], 1, batch_size=2, reward=EnvironmentReward(), memory=make)
    train(Regimen(regimen.cast, [*regimen.stages, second]), listener=quiet)
    assert [len(memory) for memory in made] == [16, 8]


def logged(count: int) -> TensorDict:
    """Steps of a corridor under random actions, as a data set: cell, action, reward, termination and next cell."""
    rng = torch.Generator().manual_seed(0)
    cell, right = torch.randint(4, (count, 1), generator=rng), torch.rand(count, 1, generator=rng) < 0.5
    after = torch.where(right, cell + 1, (cell - 1).clamp(min=0))
    over = after == 4
    columns = {"env_reward": over.float(), "next_observations": after}
    return TensorDict(
        {
            "observations": cell, "actions": right.long(), "discount": 1 - over.float(),
            "step_columns": TensorDict(columns, [count, 1]),
        },
        [count],
    )  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [{"memory": NewestRollout, "batches": Epochs(4)}, {"batches": Draws(4, 32)}],
    ids=["as they are read", "from a memory"],
)
def test_dqn_learns_a_corridor_from_a_data_set(settings: dict[str, Any]) -> None:
    """Nothing is sampled: rows are learned from as they are read, or from the memory that they fill."""
    torch.manual_seed(0)
    task = DatasetTask("log", logged(400))
    policy = QPolicy.for_spaces(spaces.Discrete(5), spaces.Discrete(2))
    objective = DQNObjective(discount=0.5)
    regimen = dqn(task, policy, 100, batch_size=64, learning_rate=3e-2, objective=objective, **settings)
    outcome = train(regimen, listener=quiet)
    assert outcome.counters.samples == 0
    best = policy.values(torch.arange(4)).max(1).values.tolist()
    assert best == pytest.approx([1 / 8, 1 / 4, 1 / 2, 1], abs=0.05)
