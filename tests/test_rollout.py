"""The rollout: shapes, rows, joining, storing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from regimen.rollout import Rollout
from regimen.storage import load_tree, save_tree

Build = Callable[..., Rollout]
TEXTS = ["a", "b", "c", "d", "e", "f"]


def test_defaults(tiny_rollout: Build) -> None:
    rollout = tiny_rollout(knobs={"noise_level": 0.7})
    assert len(rollout) == 6
    assert rollout.steps == 4
    assert rollout.loss_mask.all()
    assert (rollout.discount == 1).all()
    assert rollout.task_counts() == {"a": 6}
    assert rollout.knobs["noise_level"].tolist() == pytest.approx([0.7] * 6)
    assert rollout.reward is None
    assert rollout.lengths.tolist() == [4] * 6


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("logprobs", torch.zeros(6, 5), r"'logprobs' has shape \[6, 5\], expected \[6, 4\] \(B=6, T=4\)"),
        ("group", torch.zeros(5, dtype=torch.int64), r"'group' has shape \[5\], expected \[6\]"),
        ("group", torch.zeros(6), "'group' is of type torch.float32, expected torch.int64"),
        ("loss_mask", torch.ones(6, 4), "'loss_mask' is of type torch.float32, expected torch.bool"),
        ("observations", torch.zeros(6, 3, 2), r"'observations' has shape \[6, 3, 2\], expected \[6, 4, ...\]"),
        ("reward", torch.zeros(4), r"'reward' has shape \[4\], expected \[6\] or \[6, 4\]"),
        ("context", TensorDict({"x": torch.zeros(3)}, batch_size=[3]), r"'context' is a table \[3\], expected \[6\]"),
        ("columns", {"image": torch.zeros(5, 2)}, r"'columns': 'image' has shape \[5, 2\], expected \[6, ...\]"),
        ("columns", {"scale": torch.tensor(1.0)}, r"'columns': 'scale' has shape \[\], expected \[6, ...\]"),
        ("columns", {"text": ["a", "b"]}, r"'columns': 'text' has shape \[2\], expected \[6, ...\]"),
        ("context", 3, "'context' is a int, expected a mapping or a table"),
        ("logprobs", None, "'logprobs' is a NoneType, expected a tensor; leave out what is not there"),
        ("lobgprobs", torch.zeros(6, 4), "'lobgprobs' is not a field of a rollout"),
        ("mask", torch.ones(6), r"'mask' has shape \[6\].*expected \[B, T\] bool"),
    ],
)
def test_wrong_shapes_name_field_and_shapes(tiny_rollout: Build, field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_rollout(**{field: value})
    if field != "mask":
        with pytest.raises(ValueError, match=message):
            tiny_rollout().replace(**{field: value})


def test_tables_of_steps_may_be_dicts(tiny_rollout: Build) -> None:
    rollout = tiny_rollout(observations={"pixels": torch.zeros(6, 4, 2), "state": torch.zeros(6, 4)})
    assert list(rollout.observations.batch_size) == [6, 4]
    assert rollout[:2].observations["pixels"].shape == (2, 4, 2)
    with pytest.raises(ValueError, match=r"'observations': 'state' has shape \[6\], expected \[6, 4, ...\]"):
        tiny_rollout(observations={"state": torch.zeros(6)})


def test_columns(tiny_rollout: Build) -> None:
    rollout = tiny_rollout(columns={"text": TEXTS, "number": [1, 2, 3, 4, 5, 6]})
    assert list(rollout["text"]) == TEXTS
    assert rollout["number"].tolist() == [1, 2, 3, 4, 5, 6]
    with pytest.raises(KeyError, match="no column 'image'; it has: number, text"):
        rollout["image"]
    with pytest.raises(AttributeError, match=r"side columns are read as rollout\['text'\]"):
        _ = rollout.text
    wider = rollout.with_columns(flag=torch.ones(6, dtype=torch.bool), number=torch.zeros(6))
    assert sorted(wider.columns.keys()) == ["flag", "number", "text"]
    assert wider["number"].sum() == 0
    assert rollout["number"].sum() == 21


def test_replace_leaves_the_original(tiny_rollout: Build) -> None:
    rollout = tiny_rollout()
    judged = rollout.replace(reward=torch.ones(6), rewards={"bright": torch.ones(6)})
    assert rollout.reward is None
    assert judged.rewards["bright"].sum() == 6
    assert judged.mask.data_ptr() == rollout.mask.data_ptr()
    assert judged.replace(rewards={"dark": torch.zeros(6)}).rewards.keys() == {"dark"}


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (2, [2]),
        (-1, [5]),
        (slice(1, 3), [1, 2]),
        (torch.tensor([4, 0]), [4, 0]),
        ([4, 0], [4, 0]),
        (torch.tensor([True, False, False, True, False, False]), [0, 3]),
        (torch.zeros(6, dtype=torch.bool), []),
    ],
)
def test_rows(tiny_rollout: Build, index: Any, rows: list[int]) -> None:
    rollout = tiny_rollout(context={"prompt": TEXTS})
    chosen = rollout[index]
    assert isinstance(chosen, Rollout)
    assert list(chosen.context["prompt"]) == [TEXTS[row] for row in rows]
    assert torch.equal(chosen["image"], rollout["image"][rows])


def test_cat_pads_and_keeps_tasks_and_groups_apart(tiny_rollout: Build) -> None:
    fields = {"logprobs": torch.ones(2, 3), "context": {"prompt": ["x", "y"]}}
    short = tiny_rollout(2, 3, 2, task="a", **fields)
    fields = {"logprobs": torch.ones(4, 5), "context": {"prompt": list("pqrs")}}
    long = tiny_rollout(4, 5, 2, task="b", **fields)
    joined = Rollout.cat([short, long, short])
    assert joined.task_names == ("a", "b")
    assert joined.task_counts() == {"a": 4, "b": 4}
    assert joined.steps == 5
    assert joined.lengths.tolist() == [3, 3, 5, 5, 5, 5, 3, 3]
    assert joined.logprobs.sum(1).tolist() == joined.lengths.tolist()
    assert joined.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert list(joined.context["prompt"]) == ["x", "y", *"pqrs", "x", "y"]
    assert list(joined.of_task("b").context["prompt"]) == list("pqrs")
    assert not joined.loss_mask[0, 3:].any()
    assert len(joined.of_task("unknown")) == 0


def test_cat_of_empty_and_none(tiny_rollout: Build) -> None:
    whole = tiny_rollout(2, task="b")
    joined = Rollout.cat([tiny_rollout(task="a")[:0], whole])
    assert joined.task_counts() == {"a": 0, "b": 2}
    assert Rollout.cat([whole]) is whole
    with pytest.raises(ValueError, match="given no parts"):
        Rollout.cat([])


def test_cat_pads_what_was_judged_per_step(tiny_rollout: Build) -> None:
    def judged(steps: int) -> Rollout:
        reward = torch.ones(2, steps)
        return tiny_rollout(2, steps).replace(reward=reward, rewards={"wide": reward, "one": torch.ones(2)})

    joined = Rollout.cat([judged(2), judged(3)])
    assert joined.reward.sum(1).tolist() == [2, 2, 3, 3]
    assert joined.rewards["wide"].shape == (4, 3)
    assert joined.rewards["one"].shape == (4,)


def test_cat_of_different_fields_names_them(tiny_rollout: Build) -> None:
    with pytest.raises(ValueError, match="only one of them has context/extra, logprobs; give both the same contexts"):
        Rollout.cat(
            [
                tiny_rollout(task="a"),
                tiny_rollout(
                    task="b",
                    logprobs=torch.zeros(6, 4),
                    context={"condition": torch.zeros(6, dtype=torch.int64), "extra": torch.zeros(6)},
                ),
            ]
        )
    with pytest.raises(ValueError, match=r"'columns/image' has rows of \[1, 2, 2\] and of \[3\]"):
        Rollout.cat([tiny_rollout(task="a"), tiny_rollout(task="b", columns={"image": torch.zeros(6, 3)})])


def test_padded(tiny_rollout: Build) -> None:
    rollout = tiny_rollout(observations={"state": torch.ones(6, 4, 2)})
    padded = rollout.padded(6)
    assert padded.observations["state"].shape == (6, 6, 2)
    assert padded.lengths.tolist() == [4] * 6
    assert rollout.padded(4) is rollout
    with pytest.raises(ValueError, match="has 4 steps and cannot be padded to 3"):
        rollout.padded(3)


def test_state_round_trip_through_a_file(tiny_rollout: Build, tmp_path: Path) -> None:
    rollout = tiny_rollout(
        context={"prompt": TEXTS, "nested": {"x": torch.arange(6)}},
        observations={"state": torch.rand(6, 4, 2)},
        knobs={"temperature": 0.5},
    )
    save_tree(tmp_path / "rollout", rollout.state_dict())
    again = Rollout.from_state_dict(load_tree(tmp_path / "rollout"))
    assert again.task_names == rollout.task_names
    assert list(again.context["prompt"]) == TEXTS
    assert list(again.observations.batch_size) == [6, 4]
    assert torch.equal(again.observations["state"], rollout.observations["state"])
    assert torch.equal(again.context["nested"]["x"], torch.arange(6))
    assert torch.equal(again["image"], rollout["image"])
    joined = Rollout.cat([again, rollout])
    assert list(joined.context["prompt"]) == TEXTS * 2
    assert len(Rollout.from_state_dict(rollout[:0].state_dict())) == 0
