"""How steps are weighted: worked values, and that micro-batches sum to the whole."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regimen.functions import aggregate_weights, masked_mean
from regimen.functions.aggregate import Aggregate, group_weights

MASK = torch.tensor([[True, True, True, True], [True, False, False, False], [False, False, False, False]])
LOSS = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 0.0, 0.0, 0.0], [99.0, 99.0, 99.0, 99.0]])


@pytest.mark.parametrize(
    ("aggregate", "expected"), [("sequence", (2.5 + 10) / 2), ("token", 20 / 5), ("constant", 20 / 12)]
)
def test_worked_values(aggregate: Aggregate, expected: float) -> None:
    assert float((LOSS * aggregate_weights(MASK, aggregate)).sum()) == pytest.approx(expected)


def test_horizon_replaces_the_padded_length() -> None:
    assert float((LOSS * aggregate_weights(MASK, "constant", horizon=8)).sum()) == pytest.approx(20 / 24)


def test_nothing_to_learn_from_weighs_nothing() -> None:
    empty = torch.zeros(2, 3, dtype=torch.bool)
    for aggregate in get_args(Aggregate):
        assert aggregate_weights(empty, aggregate, segment=torch.zeros(2, 3, dtype=torch.int64)).sum() == 0


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=2, max_size=7), st.integers(1, 6))
def test_any_split_sums_to_the_whole(rows: list[list[bool]], cut: int) -> None:
    mask = torch.tensor(rows)
    loss = torch.arange(mask.numel(), dtype=torch.float32).view(mask.shape)
    for aggregate in get_args(Aggregate):
        weights = aggregate_weights(mask, aggregate, segment=torch.arange(3).expand_as(mask) // 2)
        parts = [(loss[rows] * weights[rows]).sum() for rows in (slice(0, cut), slice(cut, None))]
        assert float(sum(parts)) == pytest.approx(float((loss * weights).sum()), rel=1e-5)


def test_masked_mean() -> None:
    values = torch.tensor([1.0, torch.nan, 3.0])
    assert float(masked_mean(values, torch.tensor([True, False, True]))) == 2
    assert float(masked_mean(values, torch.zeros(3, dtype=torch.bool))) == 0
    with pytest.raises(ValueError, match=r"values \[3\] and mask \[2\] differ"):
        masked_mean(values, torch.ones(2, dtype=torch.bool))


def test_bad_inputs_are_named() -> None:
    with pytest.raises(ValueError, match=r"mask has shape \[3\], expected \[B, T\]"):
        aggregate_weights(torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="'mean' is not one of sequence, segment, token, constant"):
        aggregate_weights(MASK, "mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="horizon is 0, expected at least 1"):
        aggregate_weights(MASK, "constant", horizon=0)


def test_segment_weights_by_hand() -> None:
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    segment = torch.tensor([[1, 1, 2, 3], [1, 2, 2, 2]])
    # Four segments have steps: {1, 1}, {2}, {1}, {2}.
    expected = torch.tensor([[1 / 8, 1 / 8, 1 / 4, 0], [1 / 4, 1 / 4, 0, 0]])
    torch.testing.assert_close(aggregate_weights(mask, "segment", segment=segment), expected)


def test_one_segment_per_sample_is_the_mean_per_sequence() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    segment = torch.tensor([[4, 4, 4], [0, 0, 0], [7, 7, 7]])
    torch.testing.assert_close(aggregate_weights(mask, "segment", segment=segment), aggregate_weights(mask))


def test_segment_weights_without_segments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'segment' needs segments \[1, 2\], given are none"):
        aggregate_weights(torch.ones(1, 2, dtype=torch.bool), "segment")


def test_a_group_counts_once_however_many_samples_it_has() -> None:
    """Three samples of loss 0.5 and one of 0.9: 0.7, not their mean 0.6."""
    weights = group_weights(torch.tensor([4, 4, 7, 4]))
    assert float((weights * torch.tensor([0.5, 0.5, 0.9, 0.5])).sum()) == pytest.approx(0.7)
    shares = group_weights(torch.tensor([0, 2, 0]), torch.tensor([1.0, 9.0, 3.0]))
    assert torch.allclose(shares, torch.tensor([0.125, 0.75, 0.125]))
    with pytest.raises(ValueError, match="there are no samples"):
        group_weights(torch.tensor([], dtype=torch.int64))
