"""Samples kept apart are never drawn, in whatever pieces they come, and after a resume."""

from __future__ import annotations

import pytest
import torch
from test_last import rollout

from regimen.memory import HoldOut, Memory, ReplayMemory


def held(every: int = 3, capacity: int = 20) -> HoldOut:
    return HoldOut(ReplayMemory(capacity), ReplayMemory(capacity), every)


def test_every_third_is_kept_apart_however_they_come() -> None:
    whole, pieces = held(), held()
    whole.add(rollout(0, 9))
    for first, count in ((0, 2), (2, 2), (4, 5)):
        pieces.add(rollout(first, count))
    for memory in (whole, pieces):
        assert isinstance(memory, Memory)
        assert memory.last()["number"].tolist() == [0, 1, 3, 4, 6, 7]
        assert memory.apart.last()["number"].tolist() == [2, 5, 8]
        assert len(memory) == 6


def test_what_is_kept_apart_is_not_drawn() -> None:
    memory = held()
    memory.add(rollout(0, 9))
    drawn = memory.sample(200, torch.Generator().manual_seed(0))["number"]
    assert set(drawn.tolist()) == {0, 1, 3, 4, 6, 7}


def test_the_newest_rollout_is_whole() -> None:
    memory = held()
    memory.add(rollout(0, 4))
    assert memory.newest()["number"].tolist() == [0, 1, 2, 3]


def test_a_rollout_of_which_nothing_is_kept_apart_is_taken_in() -> None:
    memory = held(5)
    memory.add(rollout(0, 2))
    assert len(memory) == 2
    assert len(memory.apart) == 0


def test_a_resume_goes_on_with_the_count() -> None:
    memory, other = held(), held()
    memory.add(rollout(0, 4))
    other.load_state_dict(memory.state_dict())
    for each in (memory, other):
        each.add(rollout(4, 4))
    assert other.apart.last()["number"].tolist() == memory.apart.last()["number"].tolist() == [2, 5]
    assert other.last()["number"].tolist() == memory.last()["number"].tolist()


def test_one_must_be_left_to_learn_from() -> None:
    with pytest.raises(ValueError, match="every is 1, expected at least 2"):
        held(1)
