"""The rounds of R-MTGB: what each block fits, and what becomes of it (Emami et al., arXiv 2507.11411)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from scipy.special import expit, log_softmax, softmax

from regimen.estimators.trees import Floats, Grower, Ints, Tree, packed, unpacked


def theta_gradient(theta: Floats, residual: Floats, outlier: Floats, non_outlier: Floats, task: Ints) -> Floats:
    """Gradient `[T]` of the loss, summed over samples and outputs, by what decides each task's mixture.

    `dL/dtheta_t = -sum_{i in t} g_i s_t (1 - s_t) (p_out(x_i) - p_non(x_i))` with `s = sigmoid(theta)` and
    `g = -dL/dF`, for `F = ... + (1 - s) p_non + s p_out` (the official code's `_base.py`).

    Args:
        theta: `[T]`.
        residual: `g [N, K]`, at the `F` of the same `theta` and parts.
        outlier, non_outlier: `p_out, p_non [N, K]`.
        task: int `[N]`, below `T`.
    """
    share = expit(theta)
    pull = (residual * (outlier - non_outlier)).sum(1)
    gradient: Floats = -share * (1 - share) * np.bincount(task, pull, minlength=len(theta))
    return gradient


class Loss(Protocol):
    """A loss of outputs `F [N, K]` against targets that it holds."""

    def residual(self, outputs: Floats) -> Floats:
        """`-dL/dF [N, K]`, of the sum over samples."""
        ...

    def mean(self, outputs: Floats) -> float:
        """The mean over samples."""
        ...


@dataclass(frozen=True)
class SquaredLoss:
    """`(y - F)^2 / 2`, targets `[N, 1]`."""

    target: Floats

    def residual(self, outputs: Floats) -> Floats:
        """`y - F`."""
        return self.target - outputs

    def mean(self, outputs: Floats) -> float:
        """The mean over samples."""
        return float(np.square(self.target - outputs).sum(1).mean() / 2)


@dataclass(frozen=True)
class LogLoss:
    """`-log softmax(F)` at the class, targets one-hot `[N, K]`."""

    target: Floats

    def residual(self, outputs: Floats) -> Floats:
        """`y - softmax(F)`."""
        return self.target - softmax(outputs, axis=1)

    def mean(self, outputs: Floats) -> float:
        """The mean over samples."""
        return float(-(self.target * log_softmax(outputs, axis=1)).sum(1).mean())


@dataclass
class Parts:
    """What the model's output is the sum of, for some samples, each `[N, K]`."""

    shared: Floats
    non_outlier: Floats
    outlier: Floats
    own: Floats

    @classmethod
    def zeros(cls, samples: int, outputs: int) -> Parts:
        """All 0."""
        return cls(*(np.zeros((samples, outputs)) for _ in range(4)))

    def mixed(self, share: Floats | float) -> Floats:
        """`shared + (1 - share) non_outlier + share outlier + own`; `share` is a number or `[N, 1]`."""
        return self.shared + (1 - share) * self.non_outlier + share * self.outlier + self.own


@dataclass
class Forest:
    """The fitted trees of each block; `own` by round and then by task."""

    shared: list[Tree] = field(default_factory=list)
    non_outlier: list[Tree] = field(default_factory=list)
    outlier: list[Tree] = field(default_factory=list)
    own: list[list[Tree]] = field(default_factory=list)

    def common(self, x: Floats, rate: float, outputs: int) -> Parts:
        """What all tasks have in common for samples `[N, d]`; the tasks' own part is 0."""
        parts = Parts.zeros(len(x), outputs)
        for name in ("shared", "non_outlier", "outlier"):
            for tree in getattr(self, name):
                part = getattr(parts, name)
                part += rate * tree.predict(x)
        return parts

    def of_task(self, x: Floats, task: int, rate: float, outputs: int) -> Floats:
        """A task's own part for samples `[N, d]`: `[N, K]`."""
        part = np.zeros((len(x), outputs))
        for trees in self.own:
            part += rate * trees[task].predict(x)
        return part

    def state_dict(self) -> dict[str, Any]:
        """All trees as tensors."""
        own = [tree for trees in self.own for tree in trees]
        blocks = {"shared": self.shared, "non_outlier": self.non_outlier, "outlier": self.outlier, "own": own}
        return {"rounds": len(self.own), **{name: packed(trees) for name, trees in blocks.items()}}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Forest:
        """The trees that `state_dict` described."""
        shared, non_outlier, outlier, own = (unpacked(state[n]) for n in ("shared", "non_outlier", "outlier", "own"))
        tasks = len(own) // max(state["rounds"], 1)
        return cls(shared, non_outlier, outlier, [own[i * tasks : (i + 1) * tasks] for i in range(state["rounds"])])


@dataclass
class Rounds:
    """A fit at work, one method per kind of round.

    Attributes:
        loss: of the data that it fits; grower: of its trees.
        task: int `[N]`, each sample's task; theta: `[T]`.
        parts: what is predicted so far for the samples; forest: by which trees.
        outputs: `F [N, K]`, what these sum up to.
        losses: mean loss after each round.
    """

    loss: Loss
    grower: Grower
    task: Ints
    theta: Floats
    parts: Parts
    forest: Forest = field(default_factory=Forest)
    losses: list[float] = field(default_factory=list)
    outputs: Floats = field(init=False)

    def __post_init__(self) -> None:
        self.outputs = self.parts.mixed(self.share_outlier())

    def share_outlier(self) -> Floats:
        """`s` of each sample's task, `[N, 1]`."""
        share: Floats = expit(self.theta)[self.task][:, None]
        return share

    def share(self, rate: float) -> None:
        """A round of the first block."""
        tree, fitted = self.grower.shared(self.loss.residual(self.outputs))
        self.forest.shared.append(tree)
        self.parts.shared += rate * fitted
        self._done()

    def partition(self, rate: float, mean: bool) -> None:
        """A round of the second block: both trees from the same gradient, and `theta` from the parts before them."""
        residual, share = self.loss.residual(self.outputs), self.share_outlier()
        outlier, fitted_outlier = self.grower.shared(share * residual)
        other, fitted_other = self.grower.shared((1 - share) * residual)
        slope = theta_gradient(self.theta, residual, self.parts.outlier, self.parts.non_outlier, self.task)
        self.theta = self.theta - rate * (slope / np.bincount(self.task) if mean else slope)
        self.forest.outlier.append(outlier)
        self.forest.non_outlier.append(other)
        self.parts.outlier += rate * fitted_outlier
        self.parts.non_outlier += rate * fitted_other
        self._done()

    def specialise(self, rate: float) -> None:
        """A round of the third block."""
        trees, fitted = self.grower.per_task(self.loss.residual(self.outputs))
        self.forest.own.append(trees)
        self.parts.own += rate * fitted
        self._done()

    def _done(self) -> None:
        self.outputs = self.parts.mixed(self.share_outlier())
        self.losses.append(self.loss.mean(self.outputs))
