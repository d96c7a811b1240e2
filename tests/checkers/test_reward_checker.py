"""The checker of rewards: a good one passes, and every class of failure is explained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from regimen.checkers import check, stand_in_rollout
from regimen.knobs import Knob
from regimen.rewards import FAILED, Reward, Scene, Score, reward_from
from regimen.rollout import Rollout


def ink(rollout: Rollout) -> Tensor:
    return rollout["image"].flatten(1).mean(1)


class Relative(Reward):
    """Ink above the mean of the group, times a knob: a sample depends on its siblings, and on nothing else."""

    name, reads = "relative", (Knob("scale", 2.0),)

    def score(self, rollout: Rollout, scene: Scene) -> Tensor:
        value = ink(rollout)
        mean = torch.stack([value[rollout.group == group].mean() for group in rollout.group])
        return scene.knobs["scale"] * (value - mean)


class Counting(Reward):
    """Remembers, and restores, how many samples it has seen."""

    name, stateful = "counting", True

    def __init__(self) -> None:
        self.seen = 0

    def score(self, rollout: Rollout, scene: Scene) -> Tensor:
        self.seen += len(rollout)
        return torch.full((len(rollout),), float(self.seen))

    def save_state(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state(self, state: Any) -> None:
        self.seen = state["seen"]


def test_good_rewards_pass() -> None:
    ink_reward, relative, counting = reward_from(ink), Relative(), Counting()
    steps = reward_from(lambda rollout: torch.where(rollout.mask, 1.0, torch.nan))
    for reward in (ink_reward, relative, counting, steps, ink_reward + 0.1 * counting, relative.when(ink_reward)):
        assert check(reward).messages == []


def test_checking_leaves_the_state_of_a_reward_as_it_was() -> None:
    counting = Counting()
    counting.seen = 7
    check(counting + reward_from(ink))
    assert counting.seen == 7


def test_a_reward_of_some_tasks_is_shown_those_only() -> None:
    def alphas(rollout: Rollout) -> Tensor:
        assert rollout.task_counts().get("beta", 0) == 0, "it was shown beta"
        return torch.ones(len(rollout))

    reward = reward_from(alphas)
    assert check(reward.on("alpha")).ok
    assert "it was shown beta" in str(check(reward))
    assert check(reward.on("nowhere")).ok  # Nothing to show it; a regimen's check names the task.


class Leaky(Counting):
    """Says that it remembers, and saves nothing."""

    def save_state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Any) -> None:
        pass


class Stubborn(Counting):
    """Cannot read its own state."""

    def load_state(self, state: Any) -> None:
        raise KeyError("count")


class Unstorable(Counting):
    """Saves an object."""

    def save_state(self) -> dict[str, Any]:
        return {"tool": object()}


class Undeclared(Reward):
    """Reads a knob that it does not declare."""

    name = "undeclared"

    def score(self, rollout: Rollout, scene: Scene) -> Tensor:
        return ink(rollout) * scene.knobs["scale"]


def named(name: Any) -> Reward:
    reward = reward_from(ink)
    reward.name = name
    return reward


def returns(answer: Callable[[Rollout], Any]) -> Reward:
    reward = reward_from(answer)
    reward.name = "mine"
    return reward


def spoil(rollout: Rollout) -> Tensor:
    rollout["image"].mul_(2)
    return ink(rollout)


def fail(rollout: Rollout) -> Tensor:
    raise ZeroDivisionError("no ink")


def numbered(rollout: Rollout) -> Tensor:
    return torch.arange(float(len(rollout)))


def refused(rollout: Rollout) -> Score:
    score = Score.of(torch.zeros(len(rollout)))
    return Score(score.value, torch.full_like(score.status, FAILED), ("the server is away",))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (named("two words"), "name becomes part of metrics and knobs; expected a text without blanks and '/'"),
        (named("a/b"), "expected a text without blanks and '/'"),
        (Unstorable(), "save_state() cannot be stored (state at '/tool' is a object"),
        (Stubborn(), "load_state(save_state()) raised KeyError: count"),
        (Leaky(), "after load_state the same rollout is scored differently, so a resumed run would differ"),
        (Undeclared(), "knob 'scale' is read but not declared (declared: none); add Knob('scale', ...)"),
        (returns(fail), "raised ZeroDivisionError: no ink (tried on a stand-in rollout; if that lacks what it reads"),
        (returns(lambda r: r["pixels"]), "has no column 'pixels'; it has: image"),
        (returns(lambda r: "good"), "returned 'good', expected a tensor [B] or [B, T], or a Score"),
        (returns(lambda r: None), "returned None, expected a tensor"),
        (returns(lambda r: torch.zeros(len(r), 9)), "score returned shape [6, 9], expected [6] (one number per"),
        (returns(lambda r: torch.tensor(1.0)), "score returned shape []"),
        (returns(lambda r: Score(ink(r), torch.zeros(1, dtype=torch.uint8))), "status has shape [1], expected [6]"),
        (returns(lambda r: ink(r) + 1j), "score returned torch.complex64, expected real numbers or booleans"),
        (returns(lambda r: (ink(r) * 0).log() / 0), "samples [0, 1, 2, 3, 4, 5] got a value that is not finite"),
        (returns(refused), "samples [0, 1, 2, 3, 4, 5] failed: the server is away"),
        (returns(spoil), "score changed the rollout in place (columns/image); work on a copy (.clone())"),
        (returns(lambda r: torch.rand(len(r))), "the same rollout is scored differently the second time"),
        (returns(numbered), "with the samples in another order they get other scores; read rollout.group"),
        (returns(lambda r: ink(r) - ink(r).mean()), "scores change when other groups leave the batch"),
    ],
)  # fmt: skip
def test_every_failure_is_explained(reward: Reward, message: str) -> None:
    result = check(reward)
    assert not result.ok
    assert message in str(result)


def test_a_failure_names_its_component_within_an_expression() -> None:
    result = check(reward_from(ink) + 0.5 * returns(numbered))
    assert [message.split(":")[0] for message in result.messages] == ["component 'mine'"]


def test_components_that_pass_may_fail_together() -> None:
    a, b = (reward_from(lambda rollout: torch.full((len(rollout),), 1e30)) for _ in range(2))
    a.name, b.name = "a", "b"
    assert check(a).ok
    result = check(a * b)
    assert "6 samples failed to be judged" in str(result)


def test_knobs_that_contradict_each_other_are_a_failure() -> None:
    reward = reward_from(ink)
    assert "knob 'weight/ink' has two defaults: 2.0" in str(check(2 * reward + 0.5 * reward))


def test_what_only_looks_like_a_reward_is_told_what_to_inherit_from() -> None:
    class Duck:
        def score(self, rollout: Rollout, scene: Scene) -> Tensor:
            return ink(rollout)

    assert "it looks like a Reward (it has score) and is none; subclass regimen.rewards.Reward" in str(check(Duck()))


def test_a_rollout_and_knobs_of_ones_own_are_used() -> None:
    seen: list[float] = []

    class Spy(Relative):
        def score(self, rollout: Rollout, scene: Scene) -> Tensor:
            seen.extend([float(len(rollout)), scene.knobs["scale"]])
            return super().score(rollout, scene)

    own = stand_in_rollout()[:2].with_columns(mine=torch.ones(2))
    assert check(Spy(), own, knobs={"scale": 5.0, "another": 1.0}).ok
    assert seen[:2] == [2.0, 5.0]
    assert "raised KeyError" in str(check(returns(lambda r: r["yours"]), own))
    assert "stand-in" not in str(check(returns(lambda r: r["yours"]), own))
