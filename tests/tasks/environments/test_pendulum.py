"""The pendulum of tensors is gymnasium's, step by step; the script swings it up."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch

from regimen.policies.uniform import UniformPolicy
from regimen.storage import pack_tree, unpack_tree
from regimen.tasks import EnvTask, VectorEnv
from regimen.tasks.environments.tensor import Pendulum, SwingUp
from regimen.tasks.environments.tensor.pendulum import wrapped


def begun(count: int, seed: int = 0) -> Pendulum:
    env = Pendulum(count)
    env.reset(torch.ones(count, dtype=torch.bool), torch.arange(count) + seed, {})
    return env


def test_it_is_gymnasiums_step_by_step(rng: torch.Generator) -> None:
    ours = begun(3)
    theirs = []
    for angle, speed in zip(ours.state["angle"].tolist(), ours.state["speed"].tolist(), strict=True):
        env = gymnasium.make("Pendulum-v1")
        env.reset(seed=0)
        env.unwrapped.state = np.array([angle, speed])  # type: ignore[attr-defined]
        theirs.append(env)
    for step in range(200):
        actions = 6 * torch.rand(3, 1, generator=rng) - 3
        change = ours.step(actions)
        for copy, env in enumerate(theirs):
            seen, reward, terminated, truncated, _ = env.step(actions[copy].clamp(-2, 2).numpy())
            assert change.observations[copy].tolist() == pytest.approx(seen.tolist(), abs=1e-3)
            assert float(change.reward[copy]) == pytest.approx(float(reward), abs=2e-2)
            assert bool(change.truncated[copy]) == truncated == (step == 199)
            assert not terminated
            # Single and double precision drift apart; both go on from ours.
            env.unwrapped.state = np.array(  # type: ignore[attr-defined]
                [float(ours.state["angle"][copy]), float(ours.state["speed"][copy])]
            )


def test_its_spaces_are_gymnasiums() -> None:
    ours, theirs = Pendulum(1), gymnasium.make("Pendulum-v1")
    assert isinstance(ours, VectorEnv)
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space


def test_starts_are_anywhere_and_slow_and_depend_on_their_seed_alone() -> None:
    many, one = begun(2000), begun(1, seed=1234)
    angle, speed = many.state["angle"], many.state["speed"]
    assert float(angle.min()) < -3.1 < 3.1 < float(angle.max())
    assert float(speed.abs().max()) <= 1
    assert float(angle.mean()) == pytest.approx(0, abs=0.15)
    assert float(angle[1234]) == float(one.state["angle"])


def test_angles_are_wrapped() -> None:
    assert wrapped(torch.tensor([0.5, 4.0, -4.0])).tolist() == pytest.approx([0.5, 4 - 2 * np.pi, 2 * np.pi - 4])


def test_a_checkpoint_goes_on_to_the_same_numbers(rng: torch.Generator) -> None:
    env, other = begun(4), Pendulum(4)
    env.step(torch.ones(4, 1))
    other.load_state_dict(unpack_tree(pack_tree(env.state_dict())))
    actions = torch.rand(4, 1, generator=rng)
    assert torch.equal(env.step(actions).observations, other.step(actions).observations)


def test_the_script_swings_up_what_chance_does_not(rng: torch.Generator) -> None:
    found = {}
    for name, policy in (("script", SwingUp()), ("random", UniformPolicy(Pendulum(1).action_space))):
        task = EnvTask(name, Pendulum, evaluation_episodes=40, member=name)
        found[name] = task.evaluate({name: policy}, {}, rng).metrics["return"]
    assert found["script"] > -350
    assert found["random"] < -1000


def test_torques_of_the_script_stay_in_bounds(rng: torch.Generator) -> None:
    act = SwingUp(noise=3.0).act(begun(50).observe(), None, torch.ones(50, dtype=torch.bool), {}, rng)
    assert act.actions.shape == (50, 1)
    assert float(act.actions.abs().max()) == 2.0
