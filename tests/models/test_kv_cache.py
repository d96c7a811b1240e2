"""The sampler's cache gives what reading everything at once gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tiny_language_models as tiny
from regimen.models.kv_cache import RowsCache


def keys(rows: int, length: int, seed: int) -> Tensor:
    return torch.randn(rows, 2, length, 3, generator=torch.Generator().manual_seed(seed))


def test_update_appends_to_its_layer_and_returns_all_of_it() -> None:
    cache = RowsCache(8)
    first, more = keys(2, 3, 0), keys(2, 1, 1)
    assert cache.get_seq_length() == 0
    cache.update(first, -first, 0)
    cache.update(2 * first, first, 1)
    found, values = cache.update(more, -more, 0)
    assert torch.equal(found, torch.cat([first, more], 2))
    assert torch.equal(values, -found)
    assert cache.get_seq_length(0) == cache.get_query_offset(0) == 4
    assert cache.get_seq_length(1) == 3
    assert cache.get_mask_sizes(2, 1) == (5, 0)


def test_rows_are_repeated_and_dropped_in_all_layers() -> None:
    cache = RowsCache(5)
    for layer in range(2):
        cache.update(keys(3, 2, layer), keys(3, 2, layer + 2), layer)
    rows = torch.tensor([2, 0, 0, 2])
    cache.choose(rows)
    more = keys(4, 1, 9)
    for layer in range(2):
        found, values = cache.update(more, more, layer)
        assert torch.equal(found, torch.cat([keys(3, 2, layer)[rows], more], 2))
        assert torch.equal(values, torch.cat([keys(3, 2, layer + 2)[rows], more], 2))


@pytest.mark.parametrize("kind", [*tiny.CLASSES, "mistral", "gemma2"])
def test_models_read_with_it_in_parts_what_they_read_at_once(kind: str) -> None:
    window = {"sliding_window": 4} if kind in ("mistral", "gemma2") else {}
    model = tiny.language_model(kind, attn_implementation="eager", **window)
    ids = torch.randint(4, 200, (3, 9), generator=torch.Generator().manual_seed(0))
    cache = RowsCache(12)
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :5], past_key_values=cache, use_cache=True).logits
        cache.choose(torch.tensor([2, 1]))
        rest = [
            model(ids[[2, 1], place : place + 1], past_key_values=cache, use_cache=True).logits for place in range(5, 9)
        ]
    torch.testing.assert_close(first, whole[:, :5], rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.cat(rest, 1), whole[[2, 1], 5:], rtol=0, atol=1e-4)
