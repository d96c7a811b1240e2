"""Copies of gymnasium environments: what goes in, what comes out, and exact resume by playing again."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import gymnasium
import gymnasium.spaces as spaces
import numpy as np
import pytest
import torch
from gymnasium.error import DependencyNotInstalled
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from tensordict import TensorDict
from torch import Tensor

from control_worlds import Clock, Mixed
from regimen import Knob
from regimen.runs import describe
from regimen.storage import pack_tree, unpack_tree
from regimen.tasks.environments import Change, Gymnasium, GymnasiumVector, VectorEnv

LENGTH = Knob("length", 5, 1, 100, integer=True)


def drawn(env: VectorEnv, rng: torch.Generator) -> Tensor:
    """Random actions of every copy, outside the bounds too."""
    if isinstance(env.action_space, spaces.Discrete):
        return torch.randint(int(env.action_space.n), (env.count,), generator=rng)
    return 3 * torch.randn(env.count, *env.action_space.shape, generator=rng)


def walk(env: VectorEnv, steps: int, rng: torch.Generator, ended: Tensor) -> tuple[list[Change], Tensor]:
    """Random steps, with a new start wherever an episode has ended."""
    changes = []
    for _ in range(steps):
        if bool(ended.any()):
            env.reset(ended, torch.randint(1000, (env.count,), generator=rng), {"length": 3})
        changes.append(env.step(drawn(env, rng)))
        ended = changes[-1].terminated | changes[-1].truncated
    return changes, ended


def entries(value: Any) -> list[Tensor]:
    return list(value.values()) if isinstance(value, TensorDict) else [value]


def assert_same(a: list[Change], b: list[Change]) -> None:
    for one, other in zip(a, b, strict=True):
        for name in ("observations", "reward", "terminated", "truncated"):
            pairs = zip(entries(getattr(one, name)), entries(getattr(other, name)), strict=True)
            assert all(torch.equal(x, y) for x, y in pairs), name


WORLDS = {
    "CartPole-v1": Gymnasium("CartPole-v1"),
    "Pendulum-v1": Gymnasium("Pendulum-v1", {"max_episode_steps": 40}),
    "MountainCar-v0": Gymnasium("MountainCar-v0", {"max_episode_steps": 60}),
    "Mixed": lambda count: GymnasiumVector([Mixed] * count),
    "Clock": lambda count: GymnasiumVector([partial(Clock, (1, 6))] * count),
}


@pytest.mark.parametrize("steps", [1, 17, 100])
@pytest.mark.parametrize("name", WORLDS)
def test_resume_continues_every_copy_bit_for_bit(name: str, steps: int) -> None:
    """In the middle of episodes that began at different times."""
    rng = torch.Generator().manual_seed(steps)
    env, again = WORLDS[name](3), WORLDS[name](3)
    _, ended = walk(env, steps, rng, torch.ones(3, dtype=torch.bool))
    again.load_state_dict(unpack_tree(pack_tree(env.state_dict())))
    other = torch.Generator()
    other.set_state(rng.get_state())
    assert_same(walk(env, 70, rng, ended)[0], walk(again, 70, other, ended)[0])


def test_resume_of_a_resumed_environment_is_exact() -> None:
    rng, envs = torch.Generator().manual_seed(0), [WORLDS["CartPole-v1"](3) for _ in range(3)]
    _, ended = walk(envs[0], 30, rng, torch.ones(3, dtype=torch.bool))
    envs[1].load_state_dict(envs[0].state_dict())
    _, ended = walk(envs[1], 30, rng, ended)
    envs[2].load_state_dict(envs[1].state_dict())
    other = torch.Generator()
    other.set_state(rng.get_state())
    assert_same(walk(envs[1], 30, rng, ended)[0], walk(envs[2], 30, other, ended)[0])


def test_resume_gives_each_episode_the_knobs_that_it_began_with() -> None:
    def make() -> GymnasiumVector:
        return GymnasiumVector([Clock] * 2, reads=[LENGTH])

    env, again, seeds = make(), make(), torch.zeros(2, dtype=torch.int64)
    env.reset(torch.tensor([True, True]), seeds, {"length": 9})
    env.step(torch.zeros(2, dtype=torch.int64))
    env.reset(torch.tensor([False, True]), seeds, {"length": 4})
    again.load_state_dict(env.state_dict())
    change = again.step(torch.zeros(2, dtype=torch.int64))
    assert change.observations.tolist() == [[2, 9, 0], [1, 4, 0]]


def test_only_the_actions_of_episodes_under_way_are_kept() -> None:
    env = GymnasiumVector([partial(Clock, 5), partial(Clock, 3)])
    walk(env, 100, torch.Generator().manual_seed(0), torch.ones(2, dtype=torch.bool))
    state = env.state_dict()
    assert state["lengths"] == [5, 1]
    assert len(state["actions"]) == 5


def test_processes_do_what_copies_in_this_process_do() -> None:
    here, there = Gymnasium("CartPole-v1")(2), Gymnasium("CartPole-v1", processes=True)(2)
    try:
        begun = torch.ones(2, dtype=torch.bool)
        mine, ended = walk(here, 30, torch.Generator().manual_seed(0), begun)
        theirs, _ = walk(there, 30, torch.Generator().manual_seed(0), begun)
        assert_same(mine, theirs)
        there.load_state_dict(here.state_dict())
        rngs = [torch.Generator().manual_seed(1) for _ in range(2)]
        assert_same(walk(here, 20, rngs[0], ended)[0], walk(there, 20, rngs[1], ended)[0])
    finally:
        there.close()


def test_an_episode_is_a_function_of_its_seed_whatever_the_other_copies_do() -> None:
    env, alone = Gymnasium("CartPole-v1")(2), Gymnasium("CartPole-v1")(1)
    seen = env.reset(torch.tensor([True, True]), torch.tensor([1, 2]), {})
    assert torch.equal(seen[1], alone.reset(torch.tensor([True]), torch.tensor([2]), {})[0])
    again = env.reset(torch.tensor([True, False]), torch.tensor([2, 7]), {})
    assert torch.equal(again, seen[[1, 1]])


def test_observations_that_were_given_stay_as_they_were() -> None:
    env = Gymnasium("CartPole-v1")(2)
    first = env.reset(torch.ones(2, dtype=torch.bool), torch.tensor([1, 2]), {})
    kept = first.clone()
    env.step(torch.zeros(2, dtype=torch.int64))
    assert torch.equal(first, kept)
    assert first.dtype == torch.float32


class Told(gymnasium.Env[Any, Any]):
    """Gives back the action as it came, in what is seen and in `info`."""

    observation_space = spaces.Box(-9, 9, (2,), np.float32)
    action_space = spaces.Box(np.array([-1, -2], np.float32), np.array([1, 2], np.float32))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.taken = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.taken += 1
        told = {"second": float(action[1]), "text": "not a number"} if self.taken == 2 else {}
        return action, 0.0, False, False, told


def test_numbers_are_clipped_to_the_bounds_of_the_action_space() -> None:
    env = GymnasiumVector([Told] * 2)
    env.reset(torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.int64), {})
    actions = torch.tensor([[-5.0, 0.5], [0.25, 7.0]])
    assert env.step(actions).observations.tolist() == [[-1, 0.5], [0.25, 2]]
    assert actions.tolist() == [[-5.0, 0.5], [0.25, 7.0]]


def test_the_numbers_asked_for_are_told_at_every_step() -> None:
    env = GymnasiumVector([Told] * 2, tells=["second"])
    env.reset(torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.int64), {})
    told = [env.step(torch.full((2, 2), 1.5)).info for _ in range(3)]
    assert [info["second"].tolist() for info in told] == [[0, 0], [1.5, 1.5], [0, 0]]
    assert told[0].keys() == {"second"}


def test_wrappers_and_settings_reach_every_copy() -> None:
    flat = Gymnasium("FrozenLake-v1", {"is_slippery": False}, wrappers=[gymnasium.wrappers.FlattenObservation])(2)
    assert flat.observation_space.shape == (16,)
    flat.reset(torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.int64), {})
    assert flat.step(torch.tensor([2, 1])).observations.argmax(1).tolist() == [1, 4]


def test_a_run_configuration_names_the_environment() -> None:
    described = describe(Gymnasium("CartPole-v1", {"max_episode_steps": 20}, reads=[LENGTH]))
    assert (described["name"], described["settings"]) == ("CartPole-v1", {"max_episode_steps": 20})
    assert described["reads"][0]["name"] == "length"


@pytest.mark.parametrize(("name", "package", "extra"), [
    ("ALE/Pong-v5", "ale_py", "atari"), ("MiniGrid-Empty-5x5-v0", "minigrid", "minigrid"),
    ("BabyAI-GoToObj-v0", "minigrid", "minigrid"),
])  # fmt: skip
def test_a_package_that_is_not_there_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError) as raised:
        Gymnasium(name)(1)
    assert str(raised.value) == f"environment '{name}' needs {package}: pip install 'regimen-rl[{extra}]'"


def test_missing_mujoco_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(text: str) -> Any:
        raise DependencyNotInstalled(text)

    monkeypatch.setattr(gymnasium, "make", lambda name: refuse("MuJoCo is not installed, run something"))
    with pytest.raises(ImportError, match=r"environment 'Ant-v5' needs mujoco: pip install 'regimen-rl\[mujoco\]'"):
        Gymnasium("Ant-v5")(1)
    monkeypatch.setattr(gymnasium, "make", lambda name: refuse("Box2D is not installed"))
    with pytest.raises(DependencyNotInstalled, match="Box2D"):
        Gymnasium("LunarLander-v3")(1)


def test_no_copies_are_refused() -> None:
    with pytest.raises(ValueError, match="no environment to make"):
        GymnasiumVector([])
    assert isinstance(Gymnasium("CartPole-v1")(1), VectorEnv)


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
def test_copies_do_what_gymnasiums_own_vector_environment_does(name: str) -> None:
    """Step by step, bit for bit, with a new start in some copies and not in others."""
    mine, theirs = (
        GymnasiumVector([partial(gymnasium.make, name)] * 3),
        GymnasiumVector([partial(gymnasium.make, name)] * 3),
    )
    theirs._env = SyncVectorEnv([partial(gymnasium.make, name)] * 3, autoreset_mode=AutoresetMode.DISABLED)
    rows = torch.ones(3, dtype=torch.bool)
    streams = [torch.Generator().manual_seed(2) for _ in range(2)]
    changes = [walk(env, 60, rng, rows)[0] for env, rng in zip((mine, theirs), streams, strict=True)]
    assert_same(*changes)


def test_copies_of_different_spaces_are_refused() -> None:
    with pytest.raises(ValueError, match="the copies of an environment have different spaces: .*Discrete"):
        GymnasiumVector([partial(gymnasium.make, name) for name in ("CartPole-v1", "Pendulum-v1")])
