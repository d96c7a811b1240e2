"""Regression trees as arrays, and how they are grown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.tree import DecisionTreeRegressor

Floats = NDArray[Any]
Ints = NDArray[np.intp]


@dataclass(frozen=True)
class Tree:
    """A tree of `M` nodes, the root first. A leaf is its own child on either side.

    Attributes:
        feature, threshold: `[M]`, a sample goes left where its feature is at most the threshold.
        left, right: `[M]`, the children.
        value: `[M, K]`, what a leaf predicts.
    """

    feature: Ints
    threshold: Floats
    left: Ints
    right: Ints
    value: Floats

    def leaves(self, x: Floats) -> Ints:
        """The leaf of each sample `[N, d]`."""
        rows, node = np.arange(len(x)), np.zeros(len(x), dtype=np.intp)
        while True:
            goes_left = x[rows, self.feature[node]] <= self.threshold[node]
            below = np.where(goes_left, self.left[node], self.right[node])
            if np.array_equal(below, node):
                return node
            node = below

    def predict(self, x: Floats) -> Floats:
        """`[N, K]` of samples `[N, d]`."""
        values: Floats = self.value[self.leaves(x)]
        return values


def packed(trees: Sequence[Tree]) -> dict[str, torch.Tensor]:
    """Trees as one tensor per field, and how many nodes each has: a state that can be stored."""
    sizes = torch.tensor([len(tree.feature) for tree in trees], dtype=torch.int64)
    if not trees:
        return {"sizes": sizes}
    columns = {f.name: np.concatenate([getattr(tree, f.name) for tree in trees]) for f in fields(Tree)}
    return {"sizes": sizes, **{name: torch.from_numpy(column) for name, column in columns.items()}}


def unpacked(state: Mapping[str, torch.Tensor]) -> list[Tree]:
    """The trees that `packed` stored."""
    sizes = state["sizes"].tolist()
    if not sizes:
        return []
    columns = [[part.numpy() for part in state[f.name].split(sizes)] for f in fields(Tree)]
    return [Tree(*parts) for parts in zip(*columns, strict=True)]


@dataclass(frozen=True)
class TreeSettings:
    """How large a tree may grow; `None` for no limit."""

    max_depth: int | None
    max_leaf_nodes: int | None
    min_samples_leaf: int


class Grower(Protocol):
    """Grows trees of one data set: least squares on targets `[N, K]`, a leaf's value being their mean."""

    def shared(self, target: Floats) -> tuple[Tree, Floats]:
        """A tree on all samples, and what it predicts for them `[N, K]`."""
        ...

    def per_task(self, target: Floats) -> tuple[list[Tree], Floats]:
        """A tree on the samples of each task, and what each sample's tree predicts for it `[N, K]`."""
        ...


class ExactGrower:
    """scikit-learn's `DecisionTreeRegressor`: every midpoint between two values may split."""

    def __init__(
        self, x: Floats, task: Ints, tasks: int, settings: TreeSettings, random: np.random.RandomState
    ) -> None:
        """Take samples `[N, d]` and the tasks they belong to, int `[N]` below `tasks`."""
        self._x, self._settings, self._random = x.astype(np.float32), settings, random
        self._rows = [np.flatnonzero(task == index) for index in range(tasks)]

    def shared(self, target: Floats) -> tuple[Tree, Floats]:
        """A tree on all samples, and what it predicts for them."""
        return self._grown(self._x, target)

    def per_task(self, target: Floats) -> tuple[list[Tree], Floats]:
        """A tree on the samples of each task, and what each sample's tree predicts for it."""
        trees, fitted = [], np.empty_like(target)
        for rows in self._rows:
            tree, fitted[rows] = self._grown(self._x[rows], target[rows])
            trees.append(tree)
        return trees, fitted

    def _grown(self, x: Floats, target: Floats) -> tuple[Tree, Floats]:
        s = self._settings
        seed = self._random.randint(2**31 - 1)
        model = DecisionTreeRegressor(
            max_depth=s.max_depth,
            max_leaf_nodes=s.max_leaf_nodes,
            min_samples_leaf=s.min_samples_leaf,
            random_state=seed,
        ).fit(x, target)
        grown = model.tree_
        own = np.arange(grown.node_count)
        leaf = grown.children_left < 0
        tree = Tree(
            np.where(leaf, 0, grown.feature).astype(np.intp),
            np.asarray(grown.threshold, dtype=np.float64),
            np.where(leaf, own, grown.children_left).astype(np.intp),
            np.where(leaf, own, grown.children_right).astype(np.intp),
            grown.value[:, :, 0].copy(),
        )
        return tree, tree.value[grown.apply(x)]
