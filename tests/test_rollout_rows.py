"""Rows of a rollout are taken field by field when they are read, and are the rows that were selected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from regimen.rollout import Rollout, Steps

Build = Callable[..., Rollout]


@pytest.fixture
def rollout(tiny_rollout: Build) -> Rollout:
    made = tiny_rollout(
        knobs={"noise_level": 0.7},
        observations={"seen": torch.rand(6, 4, 2), "state": torch.rand(6, 4)},
        columns={"scale": torch.arange(6.0), "text": list("abcdef")},
        step_columns={"cut": torch.rand(6, 4) > 0.5},
        reward=torch.rand(6, 4),
        rewards={"whole": torch.rand(6), "wide": torch.rand(6, 4)},
    )
    mask = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)) > 0.3
    return made.replace(mask=mask, loss_mask=mask)


def same(a: TensorDict, b: TensorDict) -> bool:
    assert set(a.keys()) == set(b.keys())
    for name in a.keys():  # noqa: SIM118
        mine, theirs = a[name], b[name]
        if isinstance(mine, TensorDict):
            assert mine.batch_size == theirs.batch_size
            assert same(mine, theirs)
        elif isinstance(mine, Tensor):
            assert torch.equal(mine, theirs), name
        else:
            assert mine == theirs, name
    return True


INDICES: dict[str, Any] = {
    "numbers": torch.tensor([4, 0, 0, -1]),
    "mask": torch.tensor([True, False, True, True, False, False]),
    "slice": slice(1, 5, 2),
    "list": [5, 2],
    "none": torch.zeros(6, dtype=torch.bool),
}


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_rows_are_those_of_the_whole_table(rollout: Rollout, index: Any) -> None:
    rows, expected = rollout[index], rollout.data[index]
    assert len(rows) == len(expected)
    assert torch.equal(rows["scale"], expected["columns"]["scale"])
    assert rows["text"] == expected["columns"]["text"]
    assert torch.equal(rows.knob("noise_level"), expected["knobs"]["noise_level"])
    assert rows.knob("other") is None
    assert rows.get("other", 3) == 3
    assert torch.equal(rows.reward, expected["reward"])
    assert rows.advantages is None
    assert same(rows.data, expected)


def test_rows_of_rows_and_of_steps_are_the_same_whatever_was_read_before(rollout: Rollout) -> None:
    steps, index = rollout.unrolled(), torch.tensor([3, 1])
    rows = steps[index]
    assert torch.equal(rows["cut"], steps.data["step_columns"]["cut"][index])
    assert same(rows.data, steps.data[index])
    row, step = rollout.mask.nonzero(as_tuple=True)
    assert torch.equal(steps.data["rewards"]["wide"].squeeze(1), rollout.rewards["wide"][row, step])
    assert torch.equal(steps.data["rewards"]["whole"], rollout.rewards["whole"][row])
    assert torch.equal(rows["scale"], rollout["scale"][row][index])


def test_a_row_that_is_not_there_is_missed_at_once(rollout: Rollout) -> None:
    with pytest.raises(IndexError):
        rollout[torch.tensor([6])]


def test_rows_have_what_rollouts_have(rollout: Rollout) -> None:
    rows = rollout[torch.tensor([2, 3])]
    again = rows.replace(advantages=torch.ones(2, 4)).with_columns(more=torch.zeros(2))
    assert again.advantages.shape == (2, 4)
    assert again["more"].tolist() == [0, 0]
    assert rows.advantages is None
    assert Rollout.from_state_dict(rows.state_dict())["text"] == ["c", "d"]
    with pytest.raises(KeyError, match="no column 'colour'"):
        rows["colour"]
    with pytest.raises(AttributeError, match="no field 'colour'"):
        _ = rows.colour


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_steps_are_taken_and_put_back(share: float) -> None:
    where = torch.rand(3, 5, generator=torch.Generator().manual_seed(1)) < share
    steps, values, wide = Steps(where), torch.rand(3, 5), torch.rand(3, 5, 2)
    assert torch.equal(steps.of(values), values[where])
    assert torch.equal(steps.of(wide), wide[where])
    assert torch.equal(steps.spread(steps.of(values)), torch.where(where, values, 0))
    assert torch.equal(steps.spread(steps.of(wide)), torch.where(where[..., None], wide, 0))
    row, step = where.nonzero(as_tuple=True)
    assert torch.equal(steps.row, row)
    assert torch.equal(steps.step, step)
    assert torch.equal(steps.of_rows(values[:, 0]), values[:, 0][row])


def test_replaced_fields_of_rows_leave_the_others_to_be_taken(rollout: Rollout) -> None:
    rows = rollout[torch.tensor([3, 1])]
    changed = rows.replace(advantages=torch.ones(2, 4), logprobs=torch.zeros(2, 4))
    assert torch.equal(changed.advantages, torch.ones(2, 4))
    assert rows.advantages is None
    assert "observations" not in vars(changed)
    assert torch.equal(changed.observations["state"], rollout.observations["state"][[3, 1]])
    assert torch.equal(changed["scale"], torch.tensor([3.0, 1.0]))
    assert set(changed.data.keys()) == {*rollout.data.keys(), "advantages", "logprobs"}
    assert torch.equal(changed[torch.tensor([1])].advantages, torch.ones(1, 4))


def test_replaced_tables_of_rows_are_read(rollout: Rollout) -> None:
    rows = rollout[torch.tensor([3, 1])]
    assert torch.equal(rows.with_columns(scale=torch.zeros(2))["scale"], torch.zeros(2))
    assert rows.replace(knobs={"noise_level": torch.ones(2)}).knob("noise_level").tolist() == [1, 1]


def test_replaced_fields_of_rows_are_checked(rollout: Rollout) -> None:
    with pytest.raises(ValueError, match=r"rollout field 'advantages' has shape \[3, 4\], expected \[2, 4, ...\]"):
        rollout[torch.tensor([3, 1])].replace(advantages=torch.ones(3, 4))
