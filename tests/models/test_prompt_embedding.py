"""The built-in tasks' small text encoder."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from regimen.models.prompts import TextEmbedding


def prompts(*rows: list[int]) -> dict[str, Tensor]:
    ids = torch.zeros(len(rows), 6, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return {"prompt_ids": ids, "prompt_mask": ids > 0}


@pytest.fixture
def model() -> TextEmbedding:
    torch.manual_seed(0)
    return TextEmbedding(9, 6, 8)


def test_words_know_their_place(model: TextEmbedding) -> None:
    given = prompts([1, 2, 3], [1, 2, 3, 4])
    out = model(given)
    assert out["prompt_embeds"].shape == (2, 6, 8)
    assert out["pooled"].shape == (2, 8)
    torch.testing.assert_close(out["prompt_embeds"][0, 1], model.word.weight[2] + model.place[1])
    assert torch.equal(out["prompt_ids"], given["prompt_ids"])
    assert "prompt_embeds" not in given


def test_pooled_tells_who_has_which_colour(model: TextEmbedding) -> None:
    """ "red square and blue disc" against "blue square and red disc": the same words."""
    one, other = model(prompts([1, 2, 3, 4, 5], [4, 2, 3, 1, 5]))["pooled"]
    assert (one - other).abs().max() > 1e-3


def test_padding_does_not_count(model: TextEmbedding) -> None:
    given = prompts([1, 2])
    expected = model(given)["pooled"]
    by_hand = model.mix(model.word(torch.tensor([1, 2])) + model.place[:2]).mean(0)
    torch.testing.assert_close(expected[0], by_hand)
    with torch.no_grad():
        model.word.weight[0] += 5.0
        model.place[2:] += 5.0
    torch.testing.assert_close(model(given)["pooled"], expected)
    empty = model(prompts([]))["pooled"]
    assert torch.equal(empty, torch.zeros(1, 8))


def test_rows_do_not_depend_on_each_other(model: TextEmbedding) -> None:
    both = model(prompts([1, 2], [3, 4, 5]))
    alone = model(prompts([3, 4, 5]))
    torch.testing.assert_close(both["pooled"][1:], alone["pooled"])


def test_null_prompt_is_padding_alone_without_gradient() -> None:
    torch.manual_seed(0)
    model = TextEmbedding(9, 6, 8, guidance=True)
    out = model(TensorDict(prompts([1, 2], [3]), batch_size=[2]))
    assert torch.equal(out["null_prompt_embeds"][0], out["null_prompt_embeds"][1])
    torch.testing.assert_close(out["null_prompt_embeds"][0], model.word.weight[0] + model.place)
    assert out["null_pooled"].shape == (2, 8)
    assert not out["null_pooled"].requires_grad
    assert not out["null_prompt_embeds"].requires_grad
    assert out["pooled"].requires_grad
    assert "null_pooled" not in TextEmbedding(9, 6, 8)(prompts([1]))


def test_everything_is_trained(model: TextEmbedding) -> None:
    out = model(prompts([1, 2, 3, 4, 5, 6], [7, 8]))
    (out["pooled"].square().sum() + out["prompt_embeds"].square().sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_missing_entry_is_named(model: TextEmbedding) -> None:
    for key in ("prompt_ids", "prompt_mask"):
        given = {k: v for k, v in prompts([1]).items() if k != key}
        with pytest.raises(ValueError, match=f"TextEmbedding needs '{key}'"):
            model(given)
