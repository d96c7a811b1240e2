"""The newest samples of a replay memory, in order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from regimen import ReplayMemory
from regimen.memory.base import EMPTY
from regimen.rollout import Rollout


def rollout(first: int, count: int, task: str = "a", steps: int = 1) -> Rollout:
    number = torch.arange(first, first + count)
    return Rollout.create(
        task=task,
        group=number,
        mask=torch.ones(count, steps, dtype=torch.bool),
        columns={"number": number},
        observations=(10 * number[:, None] + torch.arange(steps))[:, :, None].float(),
    )


def filled(capacity: int, **settings: Any) -> ReplayMemory:
    memory = ReplayMemory(capacity, **settings)
    for first in (0, 3, 6):
        memory.add(rollout(first, 3))
    return memory


def test_all_that_is_kept_comes_in_the_order_in_which_it_was_collected() -> None:
    assert filled(5).last()["number"].tolist() == [4, 5, 6, 7, 8]
    assert filled(50).last()["number"].tolist() == list(range(9))
    assert filled(5).last()["age"].tolist() == [4, 3, 2, 1, 0]


def test_the_newest_are_the_last_of_them() -> None:
    assert filled(5).last(2)["number"].tolist() == [7, 8]
    assert filled(5).last(99)["number"].tolist() == [4, 5, 6, 7, 8]


def test_transitions_come_with_the_steps_ahead_of_them() -> None:
    memory = ReplayMemory(20, "transition", ahead=1)
    memory.add(rollout(0, 2, steps=3))
    assert memory.last(3).observations[:, 0, 0].tolist() == [10, 11, 12]
    assert memory.last(3).mask.tolist() == [[True, True], [True, True], [True, False]]


def test_tasks_that_are_kept_apart_give_as_many_each() -> None:
    memory = ReplayMemory(4, per_task=True)
    memory.add(rollout(0, 6))
    memory.add(rollout(6, 3, task="b"))
    assert memory.last(2)["number"].tolist() == [4, 5, 7, 8]
    assert memory.last(2).task_counts() == {"a": 2, "b": 2}


def test_an_empty_memory_has_no_last_sample() -> None:
    with pytest.raises(ValueError, match=EMPTY):
        ReplayMemory(3).last()
