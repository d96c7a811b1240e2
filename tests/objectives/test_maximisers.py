"""Implicit maximisers: losses and minima by hand, what is bounded and what is not, gradients against differences."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from regimen.objectives import (
    ChiSquare,
    Expectile,
    Gumbel,
    Maximiser,
    TotalVariation,
    chi_square_conjugate,
    expectile_loss,
    gumbel_loss,
    surrogate_loss,
)

DIFFERENCES = torch.tensor([-6, -2, -0.5, 0, 0.5, 2], dtype=torch.float64)
ONE_OF_FOUR = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)


def minimum(f: Maximiser, data: Tensor, low: float = -1.5, high: float = 1.5) -> float:
    """Where the mean loss of a value is least, to 1e-4."""
    values = torch.arange(low, high, 1e-4, dtype=torch.float64)
    means = torch.stack([f(q - values) for q in data]).mean(0)
    return float(values[means.argmin()])


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    x = at.clone().requires_grad_()
    loss(x).sum().backward()
    assert x.grad is not None
    return x.grad


# Losses by hand


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (ChiSquare(0.6), [2.4, 0.8, 0.2, 0, 0.1375, 1.0]),
        (TotalVariation(0.6), [2.4, 0.8, 0.2, 0, 0.1, 0.4]),
        (ChiSquare(0.8), [1.2, 0.4, 0.1, 0, 0.35, 2.0]),
        (TotalVariation(0.8), [1.2, 0.4, 0.1, 0, 0.3, 1.2]),
        (Gumbel(1.0, None, rescale=False), [5.002479, 1.135335, 0.106531, 0, 0.148721, 4.389056]),
    ],
)
def test_losses_by_hand(f: Maximiser, expected: list[float]) -> None:
    assert f(DIFFERENCES).tolist() == pytest.approx(expected, abs=1e-6)


def test_far_below_the_value_only_the_line_is_left() -> None:
    """The conjugate of chi-square is positive again below -4; cut off at 0 it would give 3.6 here."""
    x = torch.tensor([-6.0])
    assert float(chi_square_conjugate(x)) == pytest.approx(3.0)
    assert float(surrogate_loss(chi_square_conjugate(x), x, 0.8)) == pytest.approx(1.2)


def test_the_expectile_is_lopsided() -> None:
    assert expectile_loss(torch.tensor([2.0, -2.0, 0.0]), 0.9).tolist() == pytest.approx([3.6, 0.4, 0.0])


@pytest.mark.parametrize(
    "f", [Expectile(0.7), TotalVariation(0.8), ChiSquare(0.7), Gumbel(0.5), Gumbel(2.0, None, False)]
)
def test_gradients_are_those_of_differences(f: Maximiser) -> None:
    x = torch.tensor([-5.0, -1.2, -0.3, 0.4, 1.7], dtype=torch.float64)
    for i in range(len(x)):
        step = torch.zeros_like(x)
        step[i] = 1e-6
        # Of the sum: rescaling couples the differences by a number that counts as constant, so the largest stays as is.
        if isinstance(f, Gumbel) and f.rescale and i == len(x) - 1:
            continue
        numerical = float((f(x + step).sum() - f(x - step).sum()) / 2e-6)
        assert float(gradient(f, x)[i]) == pytest.approx(numerical, abs=1e-6)


# Minima


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (TotalVariation(0.7), 0.0),
        (TotalVariation(0.9), 1.0),
        (ChiSquare(0.7), 0.0),
        (ChiSquare(0.75), 1 / 3),
        (ChiSquare(0.8), 1.0),
        (Gumbel(0.1, None, False), 0.861384),
        (Gumbel(0.5, None, False), 0.477229),
        (Gumbel(1.0, None, False), 0.357374),
        (Gumbel(5.0, None, False), 0.269366),
        (Expectile(0.5), 0.25),
        (Expectile(0.7), 0.4375),
        (Expectile(0.9), 0.75),
    ],
)
def test_minima_where_one_of_four_is_good(f: Maximiser, expected: float) -> None:
    assert minimum(f, ONE_OF_FOUR) == pytest.approx(expected, abs=2e-4)


def test_total_variation_is_a_quantile_and_chi_square_is_pulled_up_by_what_is_far() -> None:
    data = torch.arange(100, dtype=torch.float64)
    assert 74 <= minimum(TotalVariation(0.8), data, 70, 95) <= 75
    assert minimum(ChiSquare(0.8), data, 70, 95) == pytest.approx(91.25, abs=0.01)


def test_scale_of_rewards_moves_chi_square_and_gumbel_only() -> None:
    large = 10 * ONE_OF_FOUR
    for f in (TotalVariation(0.75), Expectile(0.7)):
        assert minimum(f, large, -1, 11) == pytest.approx(10 * minimum(f, ONE_OF_FOUR), abs=3e-3)
    for f in (ChiSquare(0.75), Gumbel(1.0, None, False)):
        assert minimum(f, large, -1, 11) > 10 * minimum(f, ONE_OF_FOUR) + 1


def test_a_low_level_of_chi_square_is_pessimistic_and_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"level is 0.4.*V lies below the mean of Q"):
        f = ChiSquare(0.4)
    # The mean of Q, less 2 (1 - 2 level) / level.
    assert minimum(f, ONE_OF_FOUR) == pytest.approx(0.25 - 1.0, abs=2e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ChiSquare(0.6)


# XQL's clip and rescaling


def test_rescaling_divides_the_gradient_by_the_largest_exponential() -> None:
    x = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    plain, rescaled = gradient(Gumbel(1.0, None, False), x), gradient(Gumbel(1.0, None, True), x)
    torch.testing.assert_close(rescaled, plain * math.exp(-2.0))


def test_rescaling_never_enlarges_by_more_than_e() -> None:
    x = torch.tensor([-9.0, -8.0], dtype=torch.float64)
    torch.testing.assert_close(gradient(Gumbel(1.0), x), math.e * gradient(Gumbel(1.0, None, False), x))


def test_beyond_the_clip_there_is_no_gradient() -> None:
    x = torch.tensor([1.0, 8.0])
    assert gradient(Gumbel(1.0, 7.0, False), x).tolist() == pytest.approx([math.e - 1, 0.0], abs=1e-5)
    assert bool(Gumbel(0.1)(torch.tensor([1e4])).isfinite())
    assert not bool(Gumbel(0.1, None, False)(torch.tensor([1e4])).isfinite())


def test_gradients_of_f_dvl_grow_no_faster_than_the_difference() -> None:
    x = torch.tensor([1e4])
    assert float(gradient(TotalVariation(0.8), x)) == pytest.approx(0.6)
    assert float(gradient(ChiSquare(0.8), x)) == pytest.approx(0.8 * (1 + 5e3) - 0.2)


def test_nothing_to_learn_from_gives_nothing() -> None:
    assert Gumbel(1.0)(torch.zeros(0)).shape == (0,)


# Bad input


@pytest.mark.parametrize("level", [0.3, 0.5, 1.0])
def test_a_level_that_leaves_the_value_unbounded_is_refused(level: float) -> None:
    with pytest.raises(
        ValueError, match=rf"TotalVariation: level is {level}, expected between 0.5 and 1.*V is unbounded"
    ):
        TotalVariation(level)


def test_other_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="Expectile: level is 1.0, expected between 0 and 1"):
        Expectile(1.0)
    with pytest.raises(ValueError, match=r"ChiSquare: level is 0.0"):
        ChiSquare(0.0)
    with pytest.raises(ValueError, match="expectile is 0.0"):
        expectile_loss(torch.zeros(1), 0.0)
    with pytest.raises(ValueError, match=r"Gumbel: scale is 0.0 and clip 7.0, expected above 0"):
        Gumbel(0.0)
    with pytest.raises(ValueError, match="gumbel_loss: scale is 1.0 and clip -1"):
        gumbel_loss(torch.zeros(1), 1.0, clip=-1.0)
