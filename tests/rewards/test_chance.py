"""A reward by chance: its share, its stream, and bad input."""

from __future__ import annotations

import pytest
import torch

from regimen.rewards import Scene
from regimen.rewards.chance import ChanceReward
from regimen.rollout import Rollout


def rollout(size: int) -> Rollout:
    return Rollout.create(task="t", group=torch.zeros(size, dtype=torch.int64), mask=torch.ones(size, 1).bool())


def test_the_share_of_rewarded_samples_is_the_probability() -> None:
    found = ChanceReward(0.3).score(rollout(20_000), Scene())
    assert set(found.tolist()) == {0.0, 1.0}
    assert float(found.mean()) == pytest.approx(0.3, abs=0.015)
    assert ChanceReward(0.0).score(rollout(50), Scene()).sum() == 0


def test_its_stream_is_its_own_and_goes_on_from_a_checkpoint() -> None:
    first, second = ChanceReward(seed=1), ChanceReward(seed=1)
    before = torch.get_rng_state()
    assert torch.equal(first.score(rollout(40), Scene()), second.score(rollout(40), Scene()))
    other = ChanceReward(seed=9)
    other.load_state(first.save_state())
    assert torch.equal(first.score(rollout(40), Scene()), other.score(rollout(40), Scene()))
    assert torch.equal(before, torch.get_rng_state())


def test_a_probability_outside_0_and_1_is_named() -> None:
    with pytest.raises(ValueError, match=r"probability is 1\.5"):
        ChanceReward(1.5)
