"""The judge step: what it writes into the rollout, and what it counts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from regimen.knobs import Knobs
from regimen.rewards import Reward, Scene, Score, judge, reward_from
from regimen.rollout import Rollout

Build = Callable[..., Rollout]


def test_raw_components_total_and_counts(tiny_rollout: Build) -> None:
    rollout = Rollout.cat([tiny_rollout(2, task="a"), tiny_rollout(4, task="b")])

    @reward_from
    def some(rollout: Rollout) -> Score:
        value = torch.arange(6.0)
        value[2] = torch.nan
        return Score.of(value, torch.tensor([True, True, True, True, False, False]))

    @reward_from
    def always(rollout: Rollout) -> Tensor:
        return torch.ones(6)

    reward = 2 * some + always.logged()
    judged, report = judge(reward, rollout, Scene(knobs=Knobs.of(reward)))
    assert judged.rewards["some"].nan_to_num(-1).tolist() == [0, 1, -1, 3, -1, -1]
    assert judged.status["some"].tolist() == [0, 0, 2, 0, 1, 1]
    assert judged.reward.tolist() == [0, 2, 0, 6, 0, 0]
    assert judged.loss_mask.any(1).tolist() == [True, True, False, True, False, False]
    assert report.counts == {
        ("a", "some"): (2, 0, 0), ("b", "some"): (1, 2, 1), ("a", "always"): (2, 0, 0), ("b", "always"): (4, 0, 0),
    }  # fmt: skip
    assert report.failed == 1
    assert report.errors == ("reward 'some' returned nan for sample 2 (task b)",)
    assert rollout.reward is None
    assert bool(rollout.loss_mask.all())


def test_only_logged_rewards_leave_the_loss_alone(tiny_rollout: Build) -> None:
    @reward_from
    def broken(rollout: Rollout) -> Tensor:
        raise RuntimeError("no")

    judged, report = judge(broken.logged(), tiny_rollout(), Scene())
    assert judged.reward is None
    assert bool(judged.loss_mask.all())
    assert report.failed == 0
    assert report.counts["a", "broken"] == (0, 0, 6)
    assert report.errors == ("reward 'broken' raised RuntimeError: no",)


def test_judging_keeps_no_gradient(tiny_rollout: Build) -> None:
    weight = torch.ones(1, requires_grad=True)

    class Learned(Reward):
        name = "learned"

        def score(self, rollout: Rollout, scene: Scene) -> Tensor:
            return rollout["image"].flatten(1).sum(1) * weight

    judged, _ = judge(Learned(), tiny_rollout(), Scene())
    assert not judged.reward.requires_grad
    answer = Learned().judge(tiny_rollout(), Scene()).total
    assert answer is not None
    assert answer.value.requires_grad


def test_a_scene_is_fresh_for_every_judging(tiny_rollout: Build) -> None:
    asked = []

    @reward_from
    def counted(rollout: Rollout) -> Tensor:
        asked.append(1)
        return torch.zeros(6)

    scene, rollout = Scene(), tiny_rollout()
    judge(counted, rollout, scene)
    judge(counted, rollout, scene)
    assert len(asked) == 2
