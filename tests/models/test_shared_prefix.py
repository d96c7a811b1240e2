"""Attention to prefixes that rows share, against attention of every row to all that comes before it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from regimen.models import shared_prefix
from regimen.models.shared_prefix import SharedPrefixCache

HEADS, KV_HEADS, WIDTH, LAYERS = 4, 2, 3, 2
LENGTHS = [5, 2, 4]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Plain:
    """Every row with all of its own keys and values, one by one."""

    def __init__(self, layers: list[tuple[Tensor, Tensor]], rows: list[int]) -> None:
        # Padding is on the left.
        self.seen = [[[x[u, :, -LENGTHS[u] :] for x in layer] for u in rows] for layer in layers]

    def choose(self, rows: list[int]) -> None:
        self.seen = [[layer[row] for row in rows] for layer in self.seen]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
        found = []
        for row, seen in enumerate(self.seen[layer]):
            seen[:] = [torch.cat([old, new[row, :, None]], 1) for old, new in zip(seen, (key, value), strict=True)]
            found.append(scaled_dot_product_attention(query[row, :, None], seen[0], seen[1], enable_gqa=True).flatten())
        return torch.stack(found)


def both(rows: list[int]) -> tuple[SharedPrefixCache, Plain]:
    layers = [
        (normal(3, KV_HEADS, 5, WIDTH, seed=layer), normal(3, KV_HEADS, 5, WIDTH, seed=9 + layer))
        for layer in range(LAYERS)
    ]
    real = torch.arange(5) >= 5 - torch.tensor(LENGTHS)[:, None]
    return SharedPrefixCache(layers, real, torch.tensor(rows)), Plain(layers, rows)


def compare(cache: SharedPrefixCache, plain: Plain, rows: int, steps: int, seed: int = 0) -> None:
    for step in range(steps):
        for layer in range(LAYERS):
            at = 1000 * seed + 10 * step + layer
            query = normal(rows, HEADS, WIDTH, seed=at)
            key, value = normal(2, rows, KV_HEADS, WIDTH, seed=at + 5)
            found = cache.attend(query * WIDTH**-0.5, key, value, layer)
            torch.testing.assert_close(found, plain.attend(query, key, value, layer), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [[0, 0, 1, 1, 2, 2], [0, 1, 2], [2, 0, 0, 1, 0, 2], [1, 1, 1]])
def test_it_is_attention_to_the_rows_prefix_and_to_its_own(rows: list[int]) -> None:
    cache, plain = both(rows)
    compare(cache, plain, len(rows), steps=40)


def test_rows_may_leave_and_prefixes_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prefix, "PLACES", (2, 2))
    cache, plain = both([2, 0, 0, 1, 0, 2])
    compare(cache, plain, 6, steps=3)
    for seed, rows in enumerate([[0, 2, 3, 5], [2, 0, 3], [1]], 1):
        cache.choose(torch.tensor(rows))
        plain.choose(rows)
        compare(cache, plain, len(rows), steps=3, seed=seed)
