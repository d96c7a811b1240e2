"""Measures of forecasts: worked numbers, two minima taken apart, and straight lines."""

from __future__ import annotations

import pytest
import torch

from regimen.functions.trajectories import central, min_ade, min_fde, straight_on

TRUTH = torch.tensor([[[1.0, 0], [2, 1], [3, 1]]])
PATHS = torch.tensor([[[[1.0, 0], [2, 0], [3, 0]], [[0, 1], [0, 2], [0, 3]]]])


def test_displacements_by_hand() -> None:
    assert float(min_ade(PATHS, TRUTH)) == pytest.approx(2 / 3)
    assert float(min_fde(PATHS, TRUTH)) == pytest.approx(1)


def test_the_two_minima_are_taken_independently() -> None:
    near_end = torch.tensor([[[[9.0, 0], [9, 0], [3, 1]]]])
    paths = torch.cat([PATHS, near_end], 1)
    assert float(min_fde(paths, TRUTH)) == 0
    assert float(min_ade(paths, TRUTH)) == pytest.approx(2 / 3)


def test_more_forecasts_are_never_worse() -> None:
    rng = torch.Generator().manual_seed(0)
    paths, truth = torch.randn(5, 8, 12, 2, generator=rng), torch.randn(5, 12, 2, generator=rng)
    ades = [float(min_ade(paths[:, :count], truth)) for count in range(1, 9)]
    assert ades == sorted(ades, reverse=True)
    assert ades[0] == pytest.approx(float((paths[:, 0] - truth).norm(dim=2).mean()))


def test_the_central_point_is_nearest_to_the_others() -> None:
    points = torch.tensor([[[0.0, 0], [1, 0], [10, 0]], [[5, 5], [5, 4], [5, 5.5]]])
    assert central(points).tolist() == [1, 0]


def test_straight_on_over_two_positions_is_constant_velocity() -> None:
    past = torch.tensor([[[7.0, 7], [0, 0], [1, 2]]])
    assert straight_on(past, 3).tolist() == [[[2, 4], [3, 6], [4, 8]]]


def test_straight_on_is_the_least_squares_line() -> None:
    past = torch.randn(2, 8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    time = torch.arange(8, dtype=torch.float64)
    design = torch.stack([torch.ones(8, dtype=torch.float64), time], 1).expand(2, -1, -1)
    fitted = torch.linalg.lstsq(design, past).solution
    ahead = torch.stack([torch.ones(5, dtype=torch.float64), torch.arange(8.0, 13, dtype=torch.float64)], 1)
    assert torch.allclose(straight_on(past, 5, over=8), ahead @ fitted)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"min_ade: paths \[1, 3, 2\] and truth \[1, 3, 2\]; expected \[B, K, T, 2\]"):
        min_ade(TRUTH, TRUTH)
    with pytest.raises(ValueError, match="min_fde: .* with K at least 1"):
        min_fde(PATHS[:, :0], TRUTH)
    with pytest.raises(ValueError, match="straight_on: over=1, expected from 2 to the 3 positions"):
        straight_on(TRUTH, 2, over=1)
