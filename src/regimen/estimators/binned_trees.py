"""Trees that are grown on values put into bins, many at a time."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regimen.estimators.trees import Floats, Ints, Tree, TreeSettings

# Cells of a histogram that are looked through at a time, so that they stay in the processor's cache.
_CELLS = 30_000


class BinnedGrower:
    """Values are put into bins once; only the edges between bins may split.

    All nodes of a level, of all trees that grow together, share one pass over the samples. Of two siblings the smaller
    one is counted, and the other is what is left of their parent (as in LightGBM and scikit-learn's
    `HistGradientBoosting`). Where every value has a bin of its own it splits as `ExactGrower` does, but for ties.
    """

    def __init__(self, x: Floats, task: Ints, tasks: int, settings: TreeSettings, bins: int) -> None:
        """Take samples `[N, d]` and the tasks they belong to, int `[N]` below `tasks`."""
        self._edges = [bin_edges(column, bins) for column in x.T]
        self._bins = max(len(edges) for edges in self._edges) + 1
        codes = [np.searchsorted(edges, column) for edges, column in zip(self._edges, x.T, strict=True)]
        # A place is a feature and a bin of it, as one number.
        self._places = np.stack(codes, 1) + np.arange(x.shape[1]) * self._bins
        self._settings = settings
        one = np.zeros(len(x), dtype=np.intp)
        self._together = one, self._histogram(None, one, 1).astype(np.float64)
        self._apart = task, self._histogram(None, task, tasks).astype(np.float64)

    def shared(self, target: Floats) -> tuple[Tree, Floats]:
        """A tree on all samples, and what it predicts for them."""
        trees, fitted = self._grow(target, *self._together)
        return trees[0], fitted

    def per_task(self, target: Floats) -> tuple[list[Tree], Floats]:
        """A tree on the samples of each task, and what each sample's tree predicts for it."""
        return self._grow(target, *self._apart)

    def _grow(self, target: Floats, root: Ints, counts: Floats) -> tuple[list[Tree], Floats]:
        """Trees `[T]` from the samples' roots, whose counts are `[T, d, bins]`."""
        settings, nodes = self._settings, _Nodes(root, len(counts))
        histograms = [counts, *(self._histogram(column, root, len(counts)) for column in target.T)]
        deepest = min(settings.max_depth or np.inf, (settings.max_leaf_nodes or np.inf) - 1)
        while True:
            splits = best_splits(histograms, settings.min_samples_leaf)
            nodes.split(splits, self._places, self._bins)
            if nodes.level >= deepest or not len(nodes.open):
                break
            histograms = self._children(histograms, splits, nodes, target)
        nodes.keep_best(settings.max_leaf_nodes)
        return self._made(nodes, target)

    def _histogram(self, values: Floats | None, node: Ints, nodes: int, rows: Ints | None = None) -> Floats:
        """Sums of values `[R]`, or counts, by node, feature and bin: `[nodes, d, bins]`."""
        places = self._places if rows is None else self._places.take(rows, axis=0)
        features = places.shape[1]
        if nodes > 1:
            places = places + (node * (features * self._bins))[:, None]
        weights = None if values is None else np.repeat(values, features)
        sums = np.bincount(places.ravel(), weights, minlength=nodes * features * self._bins)
        return sums.reshape(nodes, features, self._bins)

    def _children(self, parents: Sequence[Floats], splits: Splits, nodes: _Nodes, target: Floats) -> list[Floats]:
        """The histograms of the new open nodes."""
        pairs = len(nodes.open) // 2
        sizes = np.bincount(nodes.node, minlength=2 * pairs)
        small = (sizes[1::2] < sizes[::2]).astype(np.intp)
        counted = nodes.node % 2 == small[nodes.node // 2]
        rows, pair, each = nodes.rows[counted], nodes.node[counted] // 2, np.arange(pairs)
        children = []
        for parent, values in zip(parents, (None, *target[rows].T), strict=True):
            mine = self._histogram(values, pair, pairs, rows)
            both = np.empty((pairs, 2, *mine.shape[1:]))
            both[each, small], both[each, 1 - small] = mine, parent[splits.found] - mine
            children.append(both.reshape(2 * pairs, *mine.shape[1:]))
        return children

    def _made(self, nodes: _Nodes, target: Floats) -> tuple[list[Tree], Floats]:
        """The grown trees, and what they predict for the samples that they grew on."""
        leaf, count = nodes.leaf, len(nodes.left)
        sums = np.stack([np.bincount(leaf, column, minlength=count) for column in target.T], 1)
        value = sums / np.maximum(np.bincount(leaf, minlength=count), 1)[:, None]
        feature, bins = nodes.place // self._bins, nodes.place % self._bins
        threshold = np.zeros(count)
        inner = nodes.left >= 0
        threshold[inner] = [self._edges[f][b] for f, b in zip(feature[inner], bins[inner], strict=True)]
        trees = []
        for index in range(nodes.roots):
            mine = np.flatnonzero(nodes.tree == index)
            # Where a node of all stands among those of its tree; the last entry is for what has no child.
            local = np.full(count + 1, -1)
            local[mine] = np.arange(len(mine))
            left = local[np.where(nodes.left[mine] < 0, mine, nodes.left[mine])]
            right = local[np.where(nodes.left[mine] < 0, mine, nodes.left[mine] + 1)]
            trees.append(Tree(np.where(inner, feature, 0)[mine], threshold[mine], left, right, value[mine]))
        return trees, value[leaf]


def bin_edges(column: Floats, bins: int) -> Floats:
    """Ascending edges between at most `bins` bins of a column `[N]`; a value equal to an edge lies below it.

    Midpoints between the values, if they are few; otherwise quantiles, so that bins hold about equally many samples.
    """
    ordered = np.sort(column)
    values = ordered[np.flatnonzero(np.diff(ordered, prepend=-np.inf))]
    if len(values) > bins:
        at = np.arange(1, bins) * len(ordered) // bins
        return np.unique((ordered[at - 1] + ordered[at]) / 2)
    edges: Floats = (values[:-1] + values[1:]) / 2
    return edges


@dataclass(frozen=True)
class Splits:
    """The best split of each of some nodes.

    Attributes:
        found: bool `[n]`, whether there is one.
        place: int `[n]`, its feature times the number of bins, plus the last bin that goes left.
        gain: `[n]`, by how much it lowers the sum of squares.
    """

    found: NDArray[np.bool_]
    place: Ints
    gain: Floats


def best_splits(histograms: Sequence[Floats], min_samples_leaf: int) -> Splits:
    """The split of each node that lowers the sum of squares most, by `n / (n_L n_R) sum_k (L_k - G_k n_L / n)^2`.

    Args:
        histograms: counts, then sums of each output, `[n, d, bins]`.
        min_samples_leaf: samples that either side must have, at least 1.
    """
    size = max(1, _CELLS // histograms[0][0].size)
    slices = [slice(at, at + size) for at in range(0, len(histograms[0]), size)]
    parts = [_best_splits([part[nodes] for part in histograms], min_samples_leaf) for nodes in slices]
    found, place, gain = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Splits(found, place, gain)


def _best_splits(histograms: Sequence[Floats], min_samples_leaf: int) -> tuple[NDArray[np.bool_], Ints, Floats]:
    counts, *sums = histograms
    left = counts.cumsum(2)
    total = left[:, :1, -1:].copy()
    share = left / total
    product = np.subtract(total, left)
    product *= left
    # At fixed n, n_L n_R grows with the smaller of the two.
    least = np.where(total < 2 * min_samples_leaf, np.inf, min_samples_leaf * (total - min_samples_leaf))
    product[product < least] = np.inf
    score: Any = 0.0
    before = np.zeros(len(left))
    for values in sums:
        apart = values.cumsum(2)
        whole = apart[:, :1, -1:].copy()
        apart -= np.multiply(share, whole, out=left)
        apart *= apart
        score = apart if len(sums) == 1 else score + apart
        before += (whole * whole / total)[:, 0, 0]
    score /= product
    flat = score.reshape(len(score), -1)
    place = flat.argmax(1)
    gain = flat[np.arange(len(flat)), place] * total[:, 0, 0]
    # What a pure node could still gain is rounding error.
    return gain > 1e-10 * before, place, gain


class _Nodes:
    """The nodes of trees that grow together, numbered as they are made: the roots first, siblings side by side.

    Attributes:
        roots: how many trees; tree: int `[M]`, whose a node is (-1 if it was cut off again).
        left: int `[M]`, the left one of its children, -1 of a leaf; place, gain: `[M]`, of its split.
        leaf: int `[N]`, where each sample is.
        open: int `[n]`, the nodes of the newest level, and `level` its depth.
        rows, node: int `[R]`, the samples in these, and the position in `open` of each one's node.
    """

    def __init__(self, root: Ints, roots: int) -> None:
        self.roots, self.level, self.open = roots, 0, np.arange(roots)
        self.rows, self.node, self.leaf = np.arange(len(root)), root, root.copy()
        self.tree, self.left = np.arange(roots), np.full(roots, -1)
        self.place, self.gain = np.zeros(roots, dtype=np.intp), np.zeros(roots)

    def split(self, splits: Splits, places: Ints, bins: int) -> None:
        """Split the open nodes that can be; their children are the new open nodes."""
        parents, made = self.open[splits.found], 2 * int(splits.found.sum())
        first = len(self.left) + 2 * np.arange(len(parents))
        self.left[parents], self.place[parents] = first, splits.place[splits.found]
        self.gain[parents] = splits.gain[splits.found]
        self.open, self.level = np.arange(made) + len(self.left), self.level + 1
        self.tree = np.append(self.tree, np.repeat(self.tree[parents], 2))
        self.left = np.append(self.left, np.full(made, -1))
        self.place = np.append(self.place, np.zeros(made, dtype=np.intp))
        self.gain = np.append(self.gain, np.zeros(made))
        self._route(splits, places, bins)

    def _route(self, splits: Splits, places: Ints, bins: int) -> None:
        """Send the samples of split nodes to the children."""
        if not splits.found.all():
            alive = splits.found[self.node]
            self.rows, self.node = self.rows[alive], self.node[alive]
        place, pair = splits.place[self.node], (np.cumsum(splits.found) - 1)[self.node]
        self.node = 2 * pair + (places[self.rows, place // bins] > place)
        self.leaf[self.rows] = self.open[self.node]

    def keep_best(self, leaves: int | None) -> None:
        """Cut each tree back to a number of leaves: only the splits that gain most, taken best first, stay."""
        if leaves is None or 2**self.level <= leaves:
            return
        kept = np.zeros(len(self.left), dtype=np.bool_)
        for root in range(self.roots):
            kept[self._best_first(root, leaves)] = True
        stays = np.arange(len(self.left))
        for node in np.flatnonzero(self.left >= 0):
            if not kept[node]:
                children = self.left[node] + np.arange(2)
                stays[children], self.tree[children] = stays[node], -1
        self.left[~kept] = -1
        self.leaf = stays[self.leaf]

    def _best_first(self, root: int, leaves: int) -> list[int]:
        chosen: list[int] = []
        waiting = [(-self.gain[root], root)]
        while waiting and len(chosen) < leaves - 1:
            _, node = heapq.heappop(waiting)
            if (left := int(self.left[node])) >= 0:
                chosen.append(node)
                for child in (left, left + 1):
                    heapq.heappush(waiting, (-self.gain[child], child))
        return chosen
