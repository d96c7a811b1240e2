"""Trees on values and on bins: the same splits, limits that are kept, arrays that come back from storage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from regimen.estimators.binned_trees import BinnedGrower, best_splits, bin_edges
from regimen.estimators.trees import ExactGrower, Floats, Grower, Ints, TreeSettings, packed, unpacked
from regimen.storage import load_tree, save_tree

LIMITS = [(3, 8, 1), (3, None, 1), (3, 2, 1), (5, 9, 3), (None, 12, 1), (4, 6, 20)]


def data(rows: int = 300, outputs: int = 1) -> tuple[Floats, Floats, Ints]:
    """Features of forty values, targets, and three tasks."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 40, (rows, 5)) + rng.normal(size=5)
    y = np.stack([np.sin(x[:, k]) + rng.normal(size=rows) for k in range(outputs)], 1)
    return x, y, np.arange(rows) % 3


def growers(x: Floats, task: Ints, *limits: int | None, bins: int = 255) -> tuple[Grower, Grower]:
    settings = TreeSettings(*limits)  # type: ignore[arg-type]
    exact = ExactGrower(x, task, 3, settings, np.random.RandomState(0))
    return exact, BinnedGrower(x, task, 3, settings, bins)


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("outputs", [1, 3])
def test_with_a_bin_for_every_value_splits_are_those_of_scikit_learn(limits: tuple[int, ...], outputs: int) -> None:
    x, y, task = data(outputs=outputs)
    exact, binned = growers(x, task, *limits)
    np.testing.assert_allclose(exact.shared(y)[1], binned.shared(y)[1], atol=1e-10)
    np.testing.assert_allclose(exact.per_task(y)[1], binned.per_task(y)[1], atol=1e-10)


@pytest.mark.parametrize("limits", LIMITS)
def test_a_tree_keeps_its_limits_and_predicts_what_it_fitted(limits: tuple[int | None, ...]) -> None:
    x, y, task = data()
    depth, most, least = limits
    for grower, shown in zip(growers(x, task, *limits, bins=16), (x.astype(np.float32), x), strict=True):
        trees, fitted = grower.per_task(y)
        for index, tree in enumerate(trees):
            rows = task == index
            np.testing.assert_allclose(tree.predict(shown[rows]), fitted[rows])
            sizes = np.unique(tree.leaves(shown[rows]), return_counts=True)[1]
            assert sizes.min() >= (least or 0)
            assert len(sizes) <= (most or 2 ** (depth or 99))


def test_a_leaf_is_the_mean_of_its_targets() -> None:
    x, y, task = data()
    for grower in growers(x, task, 2, 4, 1):
        _, fitted = grower.shared(y)
        for value in np.unique(fitted):
            assert y[fitted == value].mean() == pytest.approx(value)


def test_the_best_split_of_a_histogram_is_the_one_computed_by_hand() -> None:
    # One node, one feature, targets 1, 1 | 4 in three bins: after the second bin both sides are pure.
    counts, sums = np.array([[[1.0, 1.0, 1.0]]]), np.array([[[1.0, 1.0, 4.0]]])
    split = best_splits([counts, sums], 1)
    assert split.place.tolist() == [1]
    assert split.gain[0] == pytest.approx(2.0 + 16.0 - 12.0)
    assert best_splits([counts, sums], 2).found.tolist() == [False]


def test_equal_targets_are_not_split() -> None:
    x, y, task = data()
    tree, fitted = growers(x, task, 3, 8, 1)[1].shared(np.full_like(y, 0.1))
    assert len(tree.value) == 1
    np.testing.assert_allclose(fitted, 0.1)


def test_edges_are_midpoints_of_few_values_and_quantiles_of_many() -> None:
    assert bin_edges(np.array([2.0, 1.0, 2.0, 4.0]), 8).tolist() == [1.5, 3.0]
    assert bin_edges(np.array([7.0, 7.0]), 8).tolist() == []
    column = np.random.default_rng(0).normal(size=1000)
    sizes = np.bincount(np.searchsorted(bin_edges(column, 10), column))
    assert sizes.tolist() == [100] * 10


def test_trees_come_back_from_storage(tmp_path: Path) -> None:
    x, y, task = data()
    trees, _ = growers(x, task, 3, 8, 1)[1].per_task(y)
    save_tree(tmp_path / "trees.safetensors", packed(trees))
    again = unpacked(load_tree(tmp_path / "trees.safetensors"))
    assert len(again) == 3
    assert all(np.array_equal(a.predict(x), b.predict(x)) for a, b in zip(trees, again, strict=True))
    assert unpacked(packed([])) == []
