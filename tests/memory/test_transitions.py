"""Steps in a ring: what came next, without keeping it twice, and the steps that follow, across the ring's seam."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regimen.memory import ReplayMemory
from regimen.rollout import Rollout
from regimen.storage import load_tree, save_tree


class Counting:
    """Trajectories in which every step observes a number of its own, and the next step observes what came after it.

    Step `i` of all has observation `i`, action `i` and reward `i`; what comes after a trajectory's last is `-i`.
    """

    def __init__(self) -> None:
        self.count = 0

    def rollout(self, *lengths: int, table: bool = False, per_step: bool = True, **fields: Any) -> Rollout:
        longest = max(lengths)
        mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
        number = torch.zeros(mask.shape).masked_scatter(
            mask, torch.arange(self.count, self.count + sum(lengths)).float()
        )
        last = mask & (torch.arange(longest) == torch.tensor(lengths)[:, None] - 1)
        after = torch.where(last, -number, number + 1)
        self.count += sum(lengths)

        def shown(value: torch.Tensor) -> Any:
            wide = value[..., None].expand(*value.shape, 2).clone()
            return {"place": wide, "cell": value.long()} if table else wide

        settings = {
            "reward": number if per_step else number.amax(1),
            "observations": shown(number),
            "actions": number,
            "step_columns": {"next_observations": shown(after)},
            **fields,
        }
        return Rollout.create(task="t", group=torch.arange(len(lengths)), mask=mask, **settings)


def followers(memory: ReplayMemory) -> int:
    """How many observations are kept beside those of the steps."""
    table = memory.state_dict()["kept"][""]["following"]["others"]["table"]
    return int(table["shape"][0])


def draw(memory: ReplayMemory, size: int = 300, seed: int = 0) -> Rollout:
    return memory.sample(size, torch.Generator().manual_seed(seed))


def test_every_step_that_exists_is_a_sample() -> None:
    memory = ReplayMemory(10, "transition")
    memory.add(Counting().rollout(2, 3, 1))
    assert len(memory) == 6
    drawn = draw(memory)
    assert list(drawn.mask.shape) == [300, 1]
    assert bool(drawn.mask.all())
    assert bool(drawn.loss_mask.all())
    assert set(drawn.actions[:, 0].tolist()) == set(range(6))
    assert torch.equal(drawn.observations[..., 0], drawn.actions)
    assert torch.equal(drawn.reward, drawn.actions)


def test_reward_of_a_sample_is_that_of_its_last_step() -> None:
    memory = ReplayMemory(10, "transition")
    memory.add(Counting().rollout(2, 3, per_step=False))
    drawn = draw(memory)
    found = dict(zip(drawn.actions[:, 0].tolist(), drawn.reward[:, 0].tolist(), strict=True))
    assert found == {0: 0, 1: 1, 2: 0, 3: 0, 4: 4}


@pytest.mark.parametrize("table", [False, True])
@given(
    lengths=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=1, max_size=7),
    capacity=st.integers(1, 12),
)
def test_what_came_after_a_step_is_found_wherever_it_lies(table: bool, lengths: list[list[int]], capacity: int) -> None:
    world, memory = Counting(), ReplayMemory(capacity, "transition")
    for rows in lengths:
        memory.add(world.rollout(*rows, table=table))
    ends = {end - 1 for end in accumulate(length for rows in lengths for length in rows)}
    drawn = draw(memory)
    number = drawn.actions[:, 0]
    assert len(set(number.tolist())) == min(capacity, world.count)
    expected = torch.tensor([-n if n in ends else n + 1 for n in number.tolist()])
    after = drawn["next_observations"]
    if table:
        assert torch.equal(after["cell"][:, 0], expected.long())
        assert torch.equal(after["place"][:, 0, 1], expected)
    else:
        assert torch.equal(after[:, 0, 0], expected)


def test_what_the_next_step_observes_is_not_kept_twice() -> None:
    world, memory = Counting(), ReplayMemory(100, "transition")
    for _ in range(50):
        memory.add(world.rollout(10, 10))
        # One for each trajectory's end, and none for what the ring has forgotten, but for room to grow into.
        assert followers(memory) <= 2 * (len(memory) // 10 + 2)


@pytest.mark.parametrize("capacity", [5, 9, 40])
def test_steps_ahead_are_those_that_came_next_and_none_of_another_trajectory(capacity: int) -> None:
    world, memory = Counting(), ReplayMemory(capacity, "transition", ahead=2)
    lengths = [4, 1, 2, 5, 3, 4]
    for pair in (lengths[:2], lengths[2:4], lengths[4:]):
        memory.add(world.rollout(*pair))
    ends = list(accumulate(lengths))
    left = {number: min(end for end in ends if end > number) - number for number in range(world.count)}
    drawn = draw(memory)
    assert list(drawn.mask.shape) == [300, 3]
    for row, first in enumerate(drawn.actions[:, 0].tolist()):
        alive = min(3, left[int(first)])
        assert drawn.mask[row].tolist() == [step < alive for step in range(3)]
        assert drawn.loss_mask[row].tolist() == [True, False, False]
        assert drawn.actions[row, :alive].tolist() == [first + step for step in range(alive)]
        after = -(first + alive - 1) if alive == left[int(first)] else first + alive
        assert float(drawn["next_observations"][row, alive - 1, 0]) == after


def test_components_of_the_reward_go_with_their_steps() -> None:
    world, memory = Counting(), ReplayMemory(9, "transition", ahead=1)
    rollout = world.rollout(3, 3)
    rewards = {"step": 10 * rollout.actions, "sample": torch.tensor([7.0, 8.0])}
    memory.add(rollout.replace(rewards=rewards))
    drawn = draw(memory)
    assert torch.equal(drawn.rewards["step"][drawn.mask], 10 * drawn.actions[drawn.mask])
    assert torch.equal(drawn.rewards["sample"], torch.where(drawn.actions[:, 0] < 3, 7.0, 8.0))


@pytest.mark.parametrize("before", [[(3,)], [(4, 4)], [(5,), (6, 2), (1,)], [(1,)] * 12])
@pytest.mark.parametrize("ahead", [0, 2])
def test_state_round_trip_through_a_file_continues_the_same(
    tmp_path: Path, before: list[tuple[int, ...]], ahead: int
) -> None:
    world = Counting()
    memory, again = (ReplayMemory(8, "transition", ahead=ahead) for _ in range(2))
    for lengths in before:
        memory.add(world.rollout(*lengths))
    save_tree(tmp_path / "memory", memory.state_dict())
    again.load_state_dict(load_tree(tmp_path / "memory"))
    for step in range(4):
        a, b = (draw(m, 40, step) for m in (memory, again))
        for name, value in a.data.items(True, True):
            assert torch.equal(value, b.data.get(name)), name
        more = world.rollout(2, 1)
        memory.add(more)
        again.add(more)


def test_only_what_is_filled_is_saved() -> None:
    memory = ReplayMemory(1_000_000, "transition")
    memory.add(Counting().rollout(3, 4))
    sizes: list[int] = []

    def walk(node: Any) -> None:
        if isinstance(node, torch.Tensor):
            sizes.append(len(node))
        for child in node.values() if isinstance(node, dict) else ():
            walk(child)

    walk(memory.state_dict())
    assert max(sizes) == 7


def test_policies_with_memory_are_refused() -> None:
    rollout = Counting().rollout(2).with_columns(memory=torch.zeros(1, 4))
    with pytest.raises(ValueError, match="task t with a column 'memory': .* use unit='trajectory'"):
        ReplayMemory(4, "transition").add(rollout)


def test_rollouts_with_and_without_what_came_after_are_not_mixed() -> None:
    world, memory = Counting(), ReplayMemory(9, "transition")
    memory.add(world.rollout(2))
    with pytest.raises(ValueError, match="only the first has step_columns/next_observations; give both"):
        memory.add(world.rollout(2, step_columns={}))
    bare = ReplayMemory(9, "transition")
    bare.add(world.rollout(2, step_columns={}))
    assert bare.sample(3, torch.Generator()).get("next_observations") is None
    with pytest.raises(ValueError, match="only the second has step_columns/next_observations"):
        bare.add(world.rollout(2))
