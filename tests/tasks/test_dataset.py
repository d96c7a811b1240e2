"""Data sets as tasks: fields, transforms, resume, and data that is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import NonTensorStack, TensorDict

from regimen.rollout import Rollout
from regimen.tasks import DatasetTask, Task


def table(count: int = 6, **columns: Any) -> TensorDict:
    rows = {"row": torch.arange(count), "context": {"x": torch.arange(count) * 10.0}, **columns}
    return TensorDict(rows, batch_size=[count])


def collect(task: DatasetTask, size: int, rng: torch.Generator, knobs: dict[str, float] | None = None) -> Rollout:
    return task.collect({}, knobs or {}, rng, size)


def test_rows_become_a_rollout_of_one_step(rng: torch.Generator) -> None:
    task = DatasetTask("pairs", table(text=NonTensorStack(*"abcdef")), order="sequential")
    assert isinstance(task, Task)
    assert not task.generates
    rollout = collect(task, 4, rng, {"kl_weight": 0.5})
    assert rollout.task_names == ("pairs",)
    assert rollout.mask.tolist() == [[True]] * 4
    assert rollout["row"].tolist() == [0, 1, 2, 3]
    assert list(rollout["text"]) == list("abcd")
    assert rollout.context["x"].tolist() == [0, 10, 20, 30]
    assert "context" not in rollout.columns.keys()  # noqa: SIM118
    assert rollout.knobs["kl_weight"].tolist() == [0.5] * 4
    assert rollout.group.tolist() == [0, 1, 2, 3]


def test_entries_named_like_steps_are_steps(rng: torch.Generator) -> None:
    mask = torch.arange(3) < torch.tensor([[1], [2], [3]])
    rows = table(3, actions=torch.arange(9).view(3, 3), mask=mask, logprobs=-torch.ones(3, 3), reward=torch.ones(3))
    rollout = collect(DatasetTask("offline", rows, order="sequential"), 3, rng)
    assert torch.equal(rollout.mask, mask)
    assert torch.equal(rollout.loss_mask, mask)
    assert rollout.actions.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert rollout.logprobs.tolist() == [[-1] * 3] * 3
    assert sorted(rollout.columns.keys()) == ["reward", "row"]
    assert rollout.reward is None


def test_steps_without_a_mask_all_exist(rng: torch.Generator) -> None:
    rollout = collect(DatasetTask("a", table(2, actions=torch.zeros(2, 4))), 2, rng)
    assert rollout.mask.tolist() == [[True] * 4] * 2


def test_transform_acts_at_every_draw_and_leaves_the_data_alone(rng: torch.Generator) -> None:
    def noisy(rows: TensorDict, rng: torch.Generator) -> TensorDict:
        noise = torch.rand(len(rows), generator=rng)
        return TensorDict({**rows, "row": rows["row"] + noise}, batch_size=rows.batch_size)

    task = DatasetTask("a", table(2), transform=noisy, order="sequential")
    first, second = collect(task, 2, rng)["row"], collect(task, 2, rng)["row"]
    assert first.floor().tolist() == second.floor().tolist() == [0, 1]
    assert not torch.equal(first, second)
    assert task.rows["row"].tolist() == [0, 1]


def test_resume_in_the_middle_of_an_epoch_gives_the_same_rows(rng: torch.Generator) -> None:
    task, again = DatasetTask("a", table()), DatasetTask("a", table())
    collect(task, 4, rng)
    state, at = task.state_dict(), rng.get_state()
    expected = [collect(task, 4, rng)["row"].tolist() for _ in range(3)]
    again.load_state_dict(state)
    stream = torch.Generator()
    stream.set_state(at)
    assert [collect(again, 4, stream)["row"].tolist() for _ in range(3)] == expected


def test_a_data_set_measures_nothing(rng: torch.Generator) -> None:
    evaluation = DatasetTask("a", table()).evaluate({}, {}, rng)
    assert evaluation.metrics == {}
    assert evaluation.samples == {}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_bad_numbers_are_refused_with_column_and_rows(bad: float) -> None:
    rows = table()
    rows["context", "x"][2] = bad
    with pytest.raises(ValueError, match=r"task 'pairs': column 'context/x' .* in 1 rows \(\[2\]\); drop or repair"):
        DatasetTask("pairs", rows)


def test_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="task 'pairs' has no rows"):
        DatasetTask("pairs", table(0))
