"""Columns per step, and a rollout's steps as samples of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict

from regimen.rollout import Rollout

MASK = torch.tensor([[True, True, False], [True, True, True]])
NUMBER = torch.arange(6.0).view(2, 3)


def rollout_of(**fields: Any) -> Rollout:
    settings: dict[str, Any] = {
        "task": "walk",
        "group": torch.tensor([4, 7]),
        "mask": MASK,
        "context": {"prompt": ["first", "second"]},
        "columns": {"copy": torch.tensor([10, 11])},
        "step_columns": {"place": NUMBER, "seen": {"wide": torch.arange(12).view(2, 3, 2)}},
        "knobs": {"temperature": 0.5},
        "observations": {"vector": torch.arange(12.0).view(2, 3, 2)},
        "actions": NUMBER.long(),
        "discount": NUMBER / 10,
    }
    return Rollout.create(**(settings | fields))


def test_columns_are_read_by_name_wherever_they_are() -> None:
    rollout = rollout_of()
    assert torch.equal(rollout["place"], NUMBER)
    assert rollout["copy"].tolist() == [10, 11]
    assert isinstance(rollout["seen"], TensorDict)
    assert rollout.get("absent") is None
    assert rollout.get("absent", 3) == 3
    with pytest.raises(KeyError, match="task walk has no column 'absent'; it has: copy, place, seen"):
        rollout["absent"]


def test_columns_per_step_have_a_value_for_every_step() -> None:
    with pytest.raises(ValueError, match=r"'step_columns': 'place' has shape \[2\], expected \[2, 3, ...\]"):
        rollout_of(step_columns={"place": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"'step_columns': 'more' has shape \[2, 2\], expected \[2, 3, ...\]"):
        rollout_of().with_step_columns(more=torch.zeros(2, 2))


def test_columns_per_step_are_added_and_replaced_and_the_old_rollout_stays() -> None:
    rollout = rollout_of()
    changed = rollout.with_step_columns(place=-NUMBER, more=NUMBER)
    assert torch.equal(changed["place"], -NUMBER)
    assert torch.equal(changed["more"], NUMBER)
    assert torch.equal(rollout["place"], NUMBER)
    assert rollout.get("more") is None


def test_columns_per_step_are_padded_joined_and_stored_with_the_rest() -> None:
    rollout = rollout_of()
    longer = rollout.padded(5)
    assert longer["place"].tolist() == [[0, 1, 2, 0, 0], [3, 4, 5, 0, 0]]
    assert list(longer["seen"].batch_size) == [2, 5]
    both = Rollout.cat([rollout, longer])
    assert both["place"].shape == (4, 5)
    again = Rollout.from_state_dict(both.state_dict())
    assert torch.equal(again["place"], both["place"])
    assert torch.equal(again["seen"]["wide"], both["seen"]["wide"])
    assert torch.equal(rollout[1:]["place"], NUMBER[1:])


def test_every_existing_step_becomes_a_sample_in_row_order() -> None:
    steps = rollout_of().unrolled()
    assert list(steps.mask.shape) == [5, 1]
    assert steps.mask.all()
    assert steps["place"].flatten().tolist() == steps.actions.flatten().tolist() == [0, 1, 3, 4, 5]
    assert steps.discount.flatten().tolist() == pytest.approx([0, 0.1, 0.3, 0.4, 0.5])
    assert steps.observations["vector"][:, 0].tolist() == [[0, 1], [2, 3], [6, 7], [8, 9], [10, 11]]
    assert list(steps.observations.batch_size) == [5, 1]
    assert steps["seen"]["wide"][3].tolist() == [[8, 9]]


def test_what_belongs_to_a_sample_goes_with_each_of_its_steps() -> None:
    steps = rollout_of().unrolled()
    assert steps["copy"].tolist() == [10, 10, 11, 11, 11]
    assert steps.group.tolist() == [4, 4, 7, 7, 7]
    assert steps.context["prompt"] == ["first"] * 2 + ["second"] * 3
    assert steps.knobs["temperature"].tolist() == [0.5] * 5


def test_only_the_steps_asked_for_become_samples() -> None:
    where = torch.tensor([[False, True, False], [True, False, True]])
    assert rollout_of().unrolled(where)["place"].flatten().tolist() == [1, 3, 5]
    assert len(rollout_of().unrolled(torch.zeros_like(MASK))) == 0


def test_rewards_per_step_are_taken_apart_and_those_per_sample_are_not() -> None:
    rewards = {"step": NUMBER, "sample": torch.tensor([8.0, 9.0])}
    status = {"step": torch.zeros(2, dtype=torch.uint8), "sample": torch.ones(2, dtype=torch.uint8)}
    steps = rollout_of(rewards=rewards, status=status, reward=NUMBER, advantages=-NUMBER).unrolled()
    assert steps.rewards["step"].flatten().tolist() == steps.reward.flatten().tolist() == [0, 1, 3, 4, 5]
    assert steps.rewards["sample"].tolist() == [8, 8, 9, 9, 9]
    assert steps.advantages.flatten().tolist() == [0, -1, -3, -4, -5]
    assert rollout_of(reward=torch.tensor([8.0, 9.0])).unrolled().reward.tolist() == [8, 8, 9, 9, 9]
