"""Memory: the newest rollout, and a ring of samples that wraps, grows, and comes back from a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regimen.memory import Memory, NewestRollout, ReplayMemory
from regimen.rollout import Rollout
from regimen.storage import load_tree, save_tree


def numbered(first: int, count: int, steps: int = 2, task: str = "a", **fields: Any) -> Rollout:
    """Samples that know their own number, in a column, a text, and every step."""
    number = torch.arange(first, first + count)
    return Rollout.create(
        task=task, group=torch.arange(count), mask=torch.ones(count, steps, dtype=torch.bool),
        context={"prompt": [f"sample {i}" for i in number.tolist()]}, columns={"number": number},
        actions=number[:, None].expand(count, steps).clone(), **fields,
    )  # fmt: skip


def kept(memory: Memory, draws: int = 500) -> set[int]:
    """The numbers that sampling gives."""
    return set(memory.sample(draws, torch.Generator().manual_seed(0))["number"].tolist())


@pytest.mark.parametrize("memory", [NewestRollout(), ReplayMemory(4)])
def test_empty_memory_says_so(memory: Memory) -> None:
    assert isinstance(memory, Memory)
    for ask in (memory.newest, lambda: memory.sample(1, torch.Generator())):
        with pytest.raises(ValueError, match="the memory is empty: collect before you learn"):
            ask()


def test_newest_rollout_forgets_the_one_before() -> None:
    memory = NewestRollout()
    first, second = numbered(0, 3), numbered(3, 2)
    memory.add(first)
    assert memory.newest() is first
    memory.add(second)
    assert memory.newest() is second
    assert kept(memory) == {3, 4}
    assert memory.state_dict() == {}


def test_newest_rollout_has_nothing_to_restore() -> None:
    memory = NewestRollout()
    memory.load_state_dict({})
    with pytest.raises(ValueError, match="empty"):
        memory.newest()


def test_ring_keeps_the_last_samples() -> None:
    memory = ReplayMemory(5)
    sizes, held = [], []
    for first, count in ((0, 3), (3, 1), (4, 3), (7, 2), (9, 5)):
        memory.add(numbered(first, count))
        sizes.append(len(memory))
        held.append(kept(memory))
    assert sizes == [3, 4, 5, 5, 5]
    assert held == [{0, 1, 2}, {0, 1, 2, 3}, {2, 3, 4, 5, 6}, {4, 5, 6, 7, 8}, {9, 10, 11, 12, 13}]


def test_newest_is_the_whole_rollout_even_if_the_ring_is_smaller() -> None:
    memory = ReplayMemory(2)
    memory.add(numbered(0, 7))
    assert memory.newest()["number"].tolist() == list(range(7))
    assert kept(memory) == {5, 6}
    memory.add(numbered(7, 1))
    assert kept(memory) == {6, 7}


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(1, 7))
def test_ring_is_the_tail_of_all_that_was_added(counts: list[int], capacity: int) -> None:
    memory, total = ReplayMemory(capacity), 0
    for count in counts:
        memory.add(numbered(total, count))
        total += count
    assert len(memory) == min(total, capacity)
    if total:
        drawn = memory.sample(200, torch.Generator().manual_seed(0))
        assert set(drawn["number"].tolist()) <= set(range(max(0, total - capacity), total))
        assert len(kept(memory, 400)) == len(memory)


def test_everything_of_a_sample_stays_together() -> None:
    memory = ReplayMemory(5)
    for first in range(0, 12, 3):
        memory.add(numbered(first, 3, reward=torch.arange(first, first + 3).float()))
    drawn = memory.sample(50, torch.Generator().manual_seed(0))
    number = drawn["number"]
    assert list(drawn.context["prompt"]) == [f"sample {i}" for i in number.tolist()]
    assert torch.equal(drawn.actions, number[:, None].expand(50, 2))
    assert torch.equal(drawn.reward, number.float())


def test_ring_grows_to_the_longest_rollout_and_masks_the_rest() -> None:
    memory = ReplayMemory(6)
    memory.add(numbered(0, 2, steps=2))
    memory.add(numbered(2, 2, steps=5))
    memory.add(numbered(4, 1, steps=3))
    drawn = memory.sample(100, torch.Generator().manual_seed(0))
    assert drawn.steps == 5
    lengths = dict(zip(drawn["number"].tolist(), drawn.lengths.tolist(), strict=True))
    assert lengths == {0: 2, 1: 2, 2: 5, 3: 5, 4: 3}
    assert torch.equal(drawn.actions, torch.where(drawn.mask, drawn["number"][:, None], 0))
    assert not (drawn.loss_mask & ~drawn.mask).any()


def test_what_is_kept_is_a_copy_without_gradients() -> None:
    memory = ReplayMemory(4)
    weight = torch.ones(2, 2, requires_grad=True)
    rollout = numbered(0, 2, logprobs=2 * weight)
    memory.add(rollout)
    rollout["number"].fill_(99)
    assert kept(memory) == {0, 1}
    assert not memory.sample(2, torch.Generator()).logprobs.requires_grad


def test_samples_uniformly_with_replacement_from_the_given_generator() -> None:
    memory = ReplayMemory(4)
    memory.add(numbered(0, 9))
    draws = [memory.sample(8000, torch.Generator().manual_seed(seed))["number"] for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    counts = torch.bincount(draws[0] - 5)
    assert counts.tolist() == pytest.approx([2000] * 4, abs=200)


@pytest.mark.parametrize("added", [[3], [3, 4], [5], [12], [2, 2, 2, 2]])
def test_state_round_trip_through_a_file_continues_the_same(tmp_path: Path, added: list[int]) -> None:
    memory, again, total = ReplayMemory(5), ReplayMemory(5), 0
    for count in added:
        memory.add(numbered(total, count))
        total += count
    save_tree(tmp_path / "memory", memory.state_dict())
    again.load_state_dict(load_tree(tmp_path / "memory"))
    for step in range(4):
        drawn = [m.sample(20, torch.Generator().manual_seed(step)) for m in (memory, again)]
        assert torch.equal(drawn[0]["number"], drawn[1]["number"])
        assert list(drawn[0].context["prompt"]) == list(drawn[1].context["prompt"])
        assert len(memory) == len(again)
        for m in (memory, again):
            m.add(numbered(total, 2, steps=2 + step))
        total += 2


def test_state_of_an_empty_memory() -> None:
    memory = ReplayMemory(5)
    memory.add(numbered(0, 2))
    memory.load_state_dict(ReplayMemory(5).state_dict())
    assert len(memory) == 0
    with pytest.raises(ValueError, match="empty"):
        memory.sample(1, torch.Generator())


def test_empty_rollout_adds_nothing(tiny_rollout: Callable[..., Rollout]) -> None:
    memory = ReplayMemory(5)
    memory.add(numbered(0, 2)[:0])
    assert len(memory) == 0
    memory.add(numbered(0, 2))
    memory.add(numbered(2, 2)[:0])
    assert kept(memory) == {0, 1}
    assert len(memory.newest()) == 0


def test_other_fields_and_shapes_are_refused_and_leave_the_memory_as_it_was() -> None:
    memory = ReplayMemory(5)
    memory.add(numbered(0, 2))
    with pytest.raises(ValueError, match="the memory and a new rollout cannot be joined: only one of them has reward"):
        memory.add(numbered(2, 2, steps=9, reward=torch.zeros(2)))
    with pytest.raises(ValueError, match=r"'actions' has rows of \[2\] and of \[2, 3\]"):
        memory.add(numbered(2, 2).replace(actions=torch.zeros(2, 2, 3)))
    assert kept(memory) == {0, 1}
    assert memory.sample(1, torch.Generator()).steps == 2
    assert memory.newest()["number"].tolist() == [0, 1]


def test_tasks_keep_their_names_whichever_comes_first() -> None:
    memory = ReplayMemory(9)
    memory.add(numbered(0, 3, task="b"))
    memory.add(numbered(3, 3, task="a"))
    memory.add(Rollout.cat([numbered(6, 2, task="a"), numbered(8, 1, task="b")]))
    drawn = memory.sample(200, torch.Generator().manual_seed(0))
    assert drawn.task_names == ("b", "a")
    assert set(drawn.of_task("b")["number"].tolist()) == {0, 1, 2, 8}
    assert set(drawn.of_task("a")["number"].tolist()) == {3, 4, 5, 6, 7}


def test_groups_of_different_rollouts_stay_different() -> None:
    memory = ReplayMemory(8)
    for first in (0, 4):
        memory.add(numbered(first, 4).replace(group=torch.arange(4) // 2))
    drawn = memory.sample(300, torch.Generator().manual_seed(0))
    groups = dict(zip(drawn["number"].tolist(), drawn.group.tolist(), strict=True))
    assert [groups[number] for number in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_samples_without_a_step_to_learn_from_are_not_kept() -> None:
    memory = ReplayMemory(8)
    rollout = numbered(0, 4)
    memory.add(rollout.replace(loss_mask=rollout.mask & torch.tensor([True, False, True, False])[:, None]))
    assert kept(memory) == {0, 2}
    assert len(memory.newest()) == 4


def test_only_knobs_that_all_samples_were_taken_under_are_kept() -> None:
    memory = ReplayMemory(4)
    memory.add(numbered(0, 2, knobs={"a": 1.0, "b": 2.0}))
    memory.add(numbered(2, 2, knobs={"c": 3.0, "b": 4.0}))
    drawn = memory.sample(50, torch.Generator().manual_seed(0))
    assert list(drawn.knobs.keys()) == ["b"]
    assert torch.equal(drawn.knobs["b"], torch.where(drawn["number"] < 2, 2.0, 4.0))


def test_age_is_how_many_samples_came_after() -> None:
    memory = ReplayMemory(5)
    for first in range(0, 9, 3):
        memory.add(numbered(first, 3))
    drawn = memory.sample(50, torch.Generator().manual_seed(0))
    assert torch.equal(drawn["age"], 8 - drawn["number"])


@pytest.mark.parametrize("unit", ["trajectory", "transition"])
@pytest.mark.parametrize("size", [1, 6, 7, 100])
def test_tasks_that_are_kept_apart_are_drawn_equally(unit: Any, size: int) -> None:
    memory = ReplayMemory(4, unit, per_task=True)
    memory.add(numbered(0, 9, steps=1, task="a"))
    memory.add(numbered(9, 1, steps=1, task="b"))
    memory.add(numbered(10, 1, steps=1, task="c"))
    assert len(memory) == 6
    rng = torch.Generator().manual_seed(0)
    counts = [list(memory.sample(size, rng).task_counts().values()) for _ in range(300)]
    assert all(sum(drawn) == size and max(drawn) - min(drawn) <= 1 for drawn in counts)
    mean = torch.tensor(counts).double().mean(0)
    assert mean.tolist() == pytest.approx([size / 3] * 3, abs=0.12)
    assert set(memory.sample(200, rng).of_task("a")["number"].tolist()) == {5, 6, 7, 8}


def test_tasks_that_are_kept_apart_are_drawn_in_given_proportions() -> None:
    memory = ReplayMemory(4, per_task={"a": 1, "b": 3})
    memory.add(Rollout.cat([numbered(0, 2, task="a"), numbered(2, 2, task="b")]))
    drawn = memory.sample(80, torch.Generator().manual_seed(0))
    assert drawn.task_counts() == {"a": 20, "b": 60}
    with pytest.raises(ValueError, match=r"task 'c', which has no share in per_task=\{'a': 1, 'b': 3\}; name every"):
        memory.add(numbered(0, 1, task="c"))


def test_tasks_that_are_kept_apart_may_have_other_lengths() -> None:
    memory = ReplayMemory(4, per_task=True)
    memory.add(numbered(0, 2, steps=2, task="short"))
    memory.add(numbered(2, 2, steps=5, task="long"))
    drawn = memory.sample(20, torch.Generator().manual_seed(0))
    assert drawn.steps == 5
    assert torch.equal(drawn.lengths, torch.where(drawn["number"] < 2, 2, 5))


def test_state_of_tasks_that_are_kept_apart() -> None:
    memory, again = (ReplayMemory(3, per_task=True) for _ in range(2))
    memory.add(Rollout.cat([numbered(0, 5, task="a"), numbered(5, 2, task="b")]))
    again.load_state_dict(memory.state_dict())
    for m in (memory, again):
        m.add(numbered(7, 1, task="b"))
    a, b = (m.sample(30, torch.Generator().manual_seed(1)) for m in (memory, again))
    assert torch.equal(a["number"], b["number"])
    assert torch.equal(a.group, b.group)
    assert a.task_names == b.task_names == ("a", "b")


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="ReplayMemory: capacity is 0, expected at least 1"):
        ReplayMemory(0)
    with pytest.raises(ValueError, match="unit is 'step', expected one of trajectory, transition"):
        ReplayMemory(5, "step")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ahead is 2, expected 0, or more if the unit is 'transition'"):
        ReplayMemory(5, ahead=2)
    with pytest.raises(ValueError, match=r"per_task is \{'a': 0\}; expected shares above 0"):
        ReplayMemory(5, per_task={"a": 0})
    memory = ReplayMemory(5)
    memory.add(numbered(0, 7))
    for other in (ReplayMemory(8), ReplayMemory(5, "transition")):
        with pytest.raises(ValueError, match="and the checkpoint's 5, unit is .*; resume with the settings of the run"):
            other.load_state_dict(memory.state_dict())
