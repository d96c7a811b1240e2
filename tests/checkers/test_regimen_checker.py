"""The checker of whole regimens: every part is tried on what the regimen itself would give it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from regimen import Cast, Knob, ReferenceRefresh, Regimen, Stage, Update
from regimen.checkers import assert_ok, check
from regimen.controllers import Linear, Schedule
from regimen.credit import GroupRelativeAdvantage
from regimen.objectives import ClippedSurrogateObjective, ReferenceKL
from regimen.rewards import Expression, Reward, Scene, reward_from
from regimen.rollout import Rollout
from regimen.tasks import PromptTask

Policy = Callable[..., Any]


@reward_from
def bright(rollout: Rollout) -> Tensor:
    return rollout["image"].flatten(1).mean(1)


@reward_from
def patchy(rollout: Rollout) -> Tensor:
    return torch.rand(len(rollout))


class Counting(Reward):
    """Remembers what it has seen."""

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


def build(policy: Any, reward: Expression, **settings: Any) -> Regimen:
    rows = TensorDict({"condition": torch.arange(2)}, batch_size=[2])
    tasks = [PromptTask(name, rows, group_size=4) for name in ("a", "b")]
    objective = ClippedSurrogateObjective(clip=0.1) + Knob("kl_weight", 0.1) * ReferenceKL("exact")
    options: dict[str, Any] = {
        "reward": reward,
        "credit": GroupRelativeAdvantage(),
        "updates": [Update(objective)],
        "rules": [ReferenceRefresh()],
        "controllers": [Schedule("kl_weight", Linear(0.1, 0.0, 3))],
        **settings,
    }
    return Regimen(Cast(policy=policy), [Stage("only", tasks, 3, 16, **options)])


def test_a_good_regimen_passes_and_nothing_of_it_moves(tiny_policy: Policy) -> None:
    policy, counting = tiny_policy(), Counting()
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    regimen = build(policy, bright.on("a") + 0.1 * counting)
    state = regimen.stages[0].tasks[0].state_dict()
    assert_ok(regimen)
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    assert counting.seen == 0
    assert torch.equal(regimen.stages[0].tasks[0].state_dict()["queue"], state["queue"])
    assert list(regimen.cast) == ["policy"]  # A rule adds the reference to a copy.
    assert all(parameter.grad is None for parameter in policy.parameters())


@pytest.mark.parametrize(
    ("reward", "settings", "message"),
    [
        (bright.on("a", "c"), {}, "stage 'only': a reward is given .on('c'), and the regimen has no such task"),
        (bright + patchy, {}, "stage 'only', reward: component 'patchy': the same rollout is scored differently"),
        (bright, {"rules": []}, "stage 'only', update 'policy': objective 'surrogate+kl' raised"),
        (bright, {"credit": None}, "'surrogate+kl' raised ValueError: ClippedSurrogateObjective needs 'advantages'"),
    ],
)  # fmt: skip
def test_a_failure_names_stage_and_part(
    tiny_policy: Policy, reward: Expression, settings: dict[str, Any], message: str
) -> None:
    result = check(build(tiny_policy(), reward, **settings))
    assert not result.ok
    assert message in str(result)


def test_assert_ok_raises_with_everything_that_was_found(tiny_policy: Policy) -> None:
    with pytest.raises(AssertionError, match=r"Regimen: not ok\n  - .*\.on\('c'\)[\s\S]*  - .*patchy"):
        assert_ok(build(tiny_policy(), bright.on("c") + patchy))
