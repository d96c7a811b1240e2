"""Meta-World: the protocol as the package has it, goals that are told, hidden and held out, experts, and errors."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from regimen.policies.uniform import UniformPolicy
from regimen.runs import describe
from regimen.storage import pack_tree, unpack_tree
from regimen.tasks import EnvTask, GymnasiumVector

pytest.importorskip("metaworld")

from regimen.tasks.environments.metaworld import GOALS, OBSERVED, Arm, MetaWorld, tasks_of
from regimen.tasks.environments.metaworld_experts import ScriptedExpert

MT10 = (
    "reach-v3", "push-v3", "pick-place-v3", "door-open-v3", "drawer-open-v3", "drawer-close-v3",
    "button-press-topdown-v3", "peg-insert-side-v3", "window-open-v3", "window-close-v3",
)  # fmt: skip
EVERYONE = torch.ones(1, dtype=torch.bool)


def begun(env: GymnasiumVector, seed: int = 0) -> torch.Tensor:
    return env.reset(torch.ones(env.count, dtype=torch.bool), torch.full((env.count,), seed), {})


def actions(steps: int, count: int = 1, seed: int = 0) -> torch.Tensor:
    return 2 * torch.rand(steps, count, 4, generator=torch.Generator().manual_seed(seed)) - 1


# The protocol


def test_the_first_reward_is_that_of_the_package() -> None:
    """Seed 5, the fourth goal of push, uniform actions: 0.053012."""
    arm = Arm(MetaWorld("push-v3", seed=5, goals=(3, 4)))
    arm.reset(seed=0)
    _, reward, *_ = arm.step(np.random.default_rng(0).uniform(-1, 1, 4))
    assert reward == pytest.approx(0.053012, abs=1e-6)


def test_benchmarks_have_their_tasks() -> None:
    assert tasks_of("MT10") == MT10
    sizes = {(name, split): len(tasks_of(name, split)) for name in ("ML10", "ML45") for split in ("train", "test")}
    assert sizes == {("ML10", "train"): 10, ("ML10", "test"): 5, ("ML45", "train"): 45, ("ML45", "test"): 5}
    assert len(tasks_of("MT1")) == len(tasks_of("MT50")) == 50


def test_an_observation_tells_the_task_behind_its_39_numbers() -> None:
    env = MetaWorld("push-v3", among=MT10)(2)
    seen = begun(env)
    assert (seen.shape, env.action_space.shape) == ((2, 49), (4,))
    assert seen[:, OBSERVED:].tolist() == [[0.0, 1.0] + 8 * [0.0]] * 2
    assert MetaWorld("push-v3")(1).observation_space.shape == (OBSERVED,)


def test_rewards_are_within_0_and_10_and_success_is_told() -> None:
    env = MetaWorld("reach-v3")(1)
    begun(env)
    for action in actions(30):
        change = env.step(action)
        assert 0 <= float(change.reward) <= 10
        assert set(change.info) == {"success"}
        assert not bool(change.terminated)


def test_the_goal_is_told_in_multi_task_and_hidden_in_meta_learning() -> None:
    told, hidden = Arm(MetaWorld("reach-v3")), Arm(MetaWorld("reach-v3", "ML1"))
    seen, unseen = told.reset(seed=1)[0], hidden.reset(seed=1)[0]
    assert seen[36:39] == pytest.approx(told._robot._target_pos)
    assert unseen[36:39].tolist() == [0.0, 0.0, 0.0]
    assert hidden.step(np.zeros(4))[0][36:39].tolist() == [0.0, 0.0, 0.0]


def test_goals_are_held_out_by_number_and_by_split() -> None:
    def goals(make: MetaWorld) -> set[tuple[float, ...]]:
        arm = Arm(make)
        return {tuple(arm.reset(seed=seed)[0][36:39]) for seed in range(12)}

    known, held_out = goals(MetaWorld("reach-v3", goals=(0, 40))), goals(MetaWorld("reach-v3", goals=(40, GOALS)))
    assert len(known) > 5
    assert not known & held_out
    one, other = (Arm(MetaWorld("reach-v3", "ML1", split=split))._goals for split in ("train", "test"))
    assert {goal.data for goal in one}.isdisjoint({goal.data for goal in other})


def test_an_episode_ends_at_the_horizon_and_in_evaluation_at_success() -> None:
    env = MetaWorld("drawer-close-v3", horizon=7)(1)
    begun(env)
    ends = [bool(env.step(action).truncated) for action in actions(7)]
    assert ends == [False] * 6 + [True]
    for stops in (False, True):
        task = EnvTask(
            "drawer",
            MetaWorld("drawer-close-v3", seed=42, horizon=120, stops=stops),
            copies=1,
            evaluation_episodes=1,
        )
        found = task.evaluate({"policy": ScriptedExpert(["drawer-close-v3"])}, {"discount": 1.0}, torch.Generator())
        assert (found.metrics["length"] < 120) == stops
        assert found.metrics["success"] == 1.0


# An episode is a function of its seed and its actions


@pytest.mark.parametrize("task", ["push-v3", "door-close-v3", "drawer-close-v3", "handle-press-v3"])
def test_an_episode_does_not_depend_on_those_before_it(task: str) -> None:
    fresh, used = MetaWorld(task, horizon=15)(1), MetaWorld(task, horizon=15)(1)
    begun(used, seed=8)
    for action in actions(15, seed=5):
        used.step(action)
    assert torch.equal(begun(fresh, 3), begun(used, 3))
    for action in actions(15):
        one, other = fresh.step(action), used.step(action)
        assert torch.equal(one.observations, other.observations)
        assert torch.equal(one.reward, other.reward)


def test_an_arm_that_was_put_back_serves_another_as_a_new_one_does() -> None:
    first = MetaWorld("handle-press-v3", "ML1")(1)
    begun(first, 1)
    for action in actions(5, seed=9):
        first.step(action)
    first.close()
    again = MetaWorld("handle-press-v3", horizon=9)(2)
    begun(again, 2)
    one, other = [again.step(action.expand(2, 4)) for action in actions(9)][-1].observations
    assert torch.equal(one, other)


def test_resume_in_the_middle_of_an_episode_is_exact() -> None:
    env, again = (MetaWorld("door-close-v3", horizon=20)(2) for _ in range(2))
    begun(env, 4)
    for action in actions(12, 2):
        env.step(action)
    again.load_state_dict(unpack_tree(pack_tree(env.state_dict())))
    for action in actions(8, 2, seed=1):
        assert torch.equal(env.step(action).observations, again.step(action).observations)


def test_a_run_can_describe_its_maker() -> None:
    assert "push-v3" in str(describe(MetaWorld("push-v3")))


# Floor and ceiling


def test_scripted_experts_succeed_and_random_actions_do_not() -> None:
    names = ("button-press-topdown-v3", "window-open-v3")
    rng = torch.Generator().manual_seed(0)
    for name in names:
        task = EnvTask(
            name,
            MetaWorld(name, seed=42, among=names, stops=True, horizon=100),
            copies=1,
            evaluation_episodes=2,
        )
        knobs = {"discount": 1.0}
        assert task.evaluate({"policy": ScriptedExpert(names)}, knobs, rng).metrics["success"] == 1.0
        assert task.evaluate({"policy": UniformPolicy(task.spaces[1])}, knobs, rng).metrics["success"] == 0.0


# What is refused


def test_unknown_names_are_told_their_neighbours() -> None:
    with pytest.raises(ValueError, match="no task 'reach-v2' in MT1, split 'train'; did you mean reach-v3"):
        MetaWorld("reach-v2")(1)
    with pytest.raises(ValueError, match="no task 'hammer-v3' in MT10"):
        MetaWorld("hammer-v3", "MT10")(1)
    with pytest.raises(ValueError, match="no benchmark 'MT3' with split 'train'; expected one of MT1, MT10"):
        tasks_of("MT3")
    with pytest.raises(ValueError, match="MT10 holds no tasks out"):
        tasks_of("MT10", "test")
    with pytest.raises(ValueError, match=r"there are no tasks \['fly-v3'\]"):
        ScriptedExpert(["fly-v3"])


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="horizon is 501; expected 1 to 500"):
        MetaWorld("reach-v3", horizon=501)
    with pytest.raises(ValueError, match=r"goals is \(40, 60\); expected"):
        MetaWorld("reach-v3", goals=(40, 60))
    with pytest.raises(ValueError, match="among names push-v3; expected the task itself"):
        MetaWorld("reach-v3", among=("push-v3",))


def test_a_package_that_is_not_there_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(ImportError, match=r"need metaworld: pip install 'regimen-rl\[metaworld\]'"):
        MetaWorld("reach-v3")(1)
