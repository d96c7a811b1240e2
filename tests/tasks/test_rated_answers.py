"""Rated answers as pairs of several objectives: which are made, and by which answers a model has come to prefer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_language_models as tiny
from regimen.policies import TokenPolicy
from regimen.tasks.worlds.rated_answers import RatedAnswers, TextPair, pair_rows, preferred, text_pairs


def record(instruction: str, **ratings: tuple[Any, Any]) -> dict[str, Any]:
    """Answers by name, rated by helpfulness and honesty."""
    return {
        "instruction": instruction,
        "completions": [
            {"response": text, "annotations": {"helpfulness": {"Rating": a}, "honesty": {"Rating": b}}}
            for text, (a, b) in ratings.items()
        ],
    }


RECORDS = [
    record("the cat?", mat=("5", "1"), hat=("2", "4"), dog=("N/A", "5")),
    record("a red disc?", yes=("3", "2"), no=("3", "5")),
    record("blue?", yes=("3", "2")),
]


@pytest.fixture
def policy() -> TokenPolicy:
    return TokenPolicy(tiny.language_model("llama"), tiny.tokenizer())


def test_pairs_by_hand() -> None:
    """Best and worst by each objective; no pair of equals; an answer without a rating is left out."""
    assert text_pairs(RECORDS, ("helpfulness", "honesty")) == [
        TextPair("the cat?", "mat", "hat", 0),
        TextPair("the cat?", "hat", "mat", 1),
        TextPair("a red disc?", "no", "yes", 1),
    ]


def test_rows_of_pairs(policy: TokenPolicy) -> None:
    rows = pair_rows(policy, text_pairs(RECORDS, ("helpfulness", "honesty")))
    assert rows["objective"].tolist() == rows["rejected", "columns", "objective"].tolist() == [0, 1, 1]
    own = rows["actions"][0][rows["loss_mask"][0]]
    assert policy.decode([own]) == ["mat"]
    rejected = rows["rejected"]
    assert policy.decode([rejected["actions"][0][rejected["loss_mask"][0]]]) == ["hat"]
    with pytest.raises(ValueError, match="there are no pairs; give more records"):
        pair_rows(policy, [])


def test_what_a_model_has_come_to_prefer(policy: TokenPolicy) -> None:
    rows = pair_rows(policy, text_pairs(RECORDS, ("helpfulness", "honesty")))[:1]
    other = policy.reference()
    assert preferred(policy, other, rows) == 0.5
    optimizer = torch.optim.SGD(policy.parameters(), 0.05)
    side = {name: rows[name] for name in ("actions", "mask", "loss_mask")}
    from regimen.rollout import Rollout

    (-policy.logprob(Rollout.create(task="pairs", group=torch.arange(1), **side)).sum()).backward()
    optimizer.step()
    assert preferred(policy, other, rows) == 1.0
    assert preferred(other, policy, rows) == 0.0


def test_a_world_from_a_folder(tmp_path: Path) -> None:
    """The last records are held out, and what is too long is left out."""
    tiny.save(tmp_path / "model", tiny.language_model("qwen2"), tiny.tokenizer())
    records = [*RECORDS[:2], record("a " * 40, yes=("1", "1"), no=("2", "3")), RECORDS[0]]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(one) for one in records))
    world = RatedAnswers(
        str(tmp_path / "model"), str(tmp_path / "data.jsonl"), ("helpfulness", "honesty"), held_out=0.25, longest=40,
        dtype="float32",
    )  # fmt: skip
    many = world.multi_head()
    assert many.objectives == ("helpfulness", "honesty")
    assert many.chat
    assert [(task.name, len(task.rows)) for task in world.training(many)] == [("helpfulness", 1), ("honesty", 2)]
    held_out = world.answers(many, "policy")
    assert held_out.evaluate({"policy": many}, {}, torch.Generator()).metrics == {"helpfulness": 0.5, "honesty": 0.5}
