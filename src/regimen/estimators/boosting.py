"""Boosting of many tasks at once, some of which may be outliers: R-MTGB (Emami et al., arXiv 2507.11411)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit, softmax
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.metrics import accuracy_score, r2_score
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from regimen.estimators.binned_trees import BinnedGrower
from regimen.estimators.labels import Labels
from regimen.estimators.rounds import Forest, LogLoss, Loss, Parts, Rounds, SquaredLoss
from regimen.estimators.trees import ExactGrower, Floats, Grower, Ints, TreeSettings


def minority_score(theta: Floats) -> Floats:
    """`sigmoid(theta) [T]`, turned around if more than half of the tasks are above 0.5: outliers are the fewer."""
    share: Floats = expit(theta)
    return 1 - share if (share > 0.5).mean() > 0.5 else share


class RobustMultiTaskGradientBoosting(BaseEstimator):
    """Gradient boosting of `T` tasks in three blocks: shared, outlier partition, and each task's own.

    `F(x, t) = p_shared(x) + (1 - s_t) p_non(x) + s_t p_out(x) + p_t(x)` with `s_t = sigmoid(theta_t)`, a number per
    task that is learned with the second block, so that tasks unlike the others do not spoil what these share. Every
    tree is fitted to the negative gradient by least squares, without a Newton step. Use the regressor or the
    classifier.

    The baselines are limiting cases: pooled boosting is `n_partition=n_task=0`, a booster per task is
    `n_shared=n_partition=0`, and plain multi-task boosting (shared, then own) is `n_partition=0`.

    How fast `theta` moves grows with the square of the targets' scale, and with a task's samples: bring targets to a
    variance of about 1, or outliers that are there may not be set apart.

    Source: Emami, Martinez-Munoz and Hernandez-Lobato, arXiv 2507.11411, and the code that they published.

    Attributes (after `fit`):
        tasks_: labels of the tasks, in the order in which they first occur: that of `theta_` and `outlier_score_`.
        theta_: `[T]`.
        outlier_score_: `[T]` in (0, 1): `sigmoid(theta)`, or 1 minus it, such that the tasks above 0.5 are not the
            majority. Which side of the partition is which has no meaning of its own.
        train_loss_: `[rounds]`, mean loss on the training data after each round.
        trees_fitted_, rows_fitted_: how many trees were fitted, and the samples that they were fitted to, all together.
    """

    def __init__(
        self,
        *,
        n_shared: int = 30,
        n_partition: int = 60,
        n_task: int = 60,
        learning_rate: float = 0.1,
        max_depth: int | None = 3,
        max_leaf_nodes: int | None = 8,
        min_samples_leaf: int = 1,
        bins: int | None = None,
        mean_gradient: bool = False,
        random_state: Any = None,
    ) -> None:
        """Make the estimator.

        Args:
            n_shared, n_partition, n_task: rounds of the blocks. A round fits one tree, two, or one per task.
            learning_rate: of trees and of `theta`.
            max_depth, max_leaf_nodes, min_samples_leaf: of a tree, see `DecisionTreeRegressor`. The smaller of the
                first two decides: with 2 leaves a tree is a single split, whatever its depth.
            bins: put each feature's values into so many bins, which is much faster from some thousand samples on;
                `None` lets every value split.
            mean_gradient: step `theta` by the mean over a task's samples. The paper's sum saturates `theta` within a
                few rounds if a task is large.
            random_state: for the start of `theta` (normal, deviation 0.1) and ties between splits.
        """
        self.n_shared, self.n_partition, self.n_task = n_shared, n_partition, n_task
        self.learning_rate = learning_rate
        self.max_depth, self.max_leaf_nodes, self.min_samples_leaf = max_depth, max_leaf_nodes, min_samples_leaf
        self.bins, self.mean_gradient, self.random_state = bins, mean_gradient, random_state

    def _fit(self, x: Floats, loss: Loss, outputs: int, task: Any) -> Self:
        """Fit to a loss of `outputs` columns."""
        self._check_settings()
        labels, code = Labels.of(task, len(x))
        random = check_random_state(self.random_state)
        # Fitted by position and not by label, so that another name for a task changes nothing but its name.
        start = 0.1 * random.standard_normal(len(labels))
        run = Rounds(loss, self._grower(x, code, len(labels), random), code, start, Parts.zeros(len(x), outputs))
        for _ in range(self.n_shared):
            run.share(self.learning_rate)
        for _ in range(self.n_partition):
            run.partition(self.learning_rate, self.mean_gradient)
        for _ in range(self.n_task):
            run.specialise(self.learning_rate)
        self._labels, self._forest = labels, run.forest
        self.theta_, self.train_loss_ = run.theta, np.array(run.losses)
        self.trees_fitted_ = self.n_shared + 2 * self.n_partition + len(labels) * self.n_task
        self.rows_fitted_ = len(x) * (self.n_shared + 2 * self.n_partition + self.n_task)
        return self

    def _grower(self, x: Floats, task: Ints, tasks: int, random: np.random.RandomState) -> Grower:
        settings = TreeSettings(self.max_depth, self.max_leaf_nodes, self.min_samples_leaf)
        if self.bins is None:
            return ExactGrower(x, task, tasks, settings, random)
        return BinnedGrower(x, task, tasks, settings, self.bins)

    def _check_settings(self) -> None:
        owner = type(self).__name__
        rounds = {name: getattr(self, name) for name in ("n_shared", "n_partition", "n_task")}
        if min(rounds.values()) < 0 or sum(rounds.values()) < 1:
            raise ValueError(f"{owner}: rounds are {rounds}; expected none below 0 and at least one in all")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"{owner}: learning_rate is {self.learning_rate}; expected above 0")
        for name, least, optional in (
            ("max_depth", 1, True),
            ("max_leaf_nodes", 2, True),
            ("min_samples_leaf", 1, False),
            ("bins", 2, True),
        ):
            value = getattr(self, name)
            if not (optional and value is None) and value < least:
                raise ValueError(f"{owner}: {name} is {value}; expected at least {least}")

    @property
    def tasks_(self) -> NDArray[Any]:
        """Labels of the tasks, in the order of `theta_`."""
        return self._labels.names

    @property
    def outlier_score_(self) -> Floats:
        """How far each task is on the side of the fewer, `[T]` in (0, 1)."""
        return minority_score(self.theta_)

    def outlier_scores(self, task: Any) -> Floats:
        """`outlier_score_` of each label in `[N]`; NaN of a label that was not there in `fit`."""
        check_is_fitted(self)
        code = self._labels.find(task, len(task))
        return np.where(code < 0, np.nan, self.outlier_score_[code])

    def _outputs(self, x: Any, task: Any) -> Floats:
        """`F [N, K]` of samples and their tasks."""
        check_is_fitted(self)
        x = self._seen(x)
        code = self._labels.codes(task, len(x))
        parts = self._forest.common(x, self.learning_rate, self._width)
        for index in np.unique(code):
            rows = code == index
            parts.own[rows] = self._forest.of_task(x[rows], int(index), self.learning_rate, self._width)
        return parts.mixed(expit(self.theta_)[code][:, None])

    def _related_outputs(self, x: Any) -> list[Floats]:
        """`F [N, K]` of samples as each of the tasks that are no outliers sees them."""
        check_is_fitted(self)
        x = self._seen(x)
        parts, share = self._forest.common(x, self.learning_rate, self._width), expit(self.theta_)
        related = np.flatnonzero(self.outlier_score_ <= 0.5)
        results = []
        for index in related:
            parts.own = self._forest.of_task(x, int(index), self.learning_rate, self._width)
            results.append(parts.mixed(share[index]))
        return results

    def _seen(self, x: Any) -> Floats:
        """Samples as the trees saw them: `DecisionTreeRegressor` compares in single precision."""
        values: Floats = validate_data(self, x, reset=False, dtype=np.float64)
        return values.astype(np.float32) if self.bins is None else values

    @property
    def _width(self) -> int:
        """`K`."""
        return 1

    def state_dict(self) -> dict[str, Any]:
        """What was fitted, as tensors and plain values; empty before `fit`."""
        if not hasattr(self, "_forest"):
            return {}
        return {
            "tasks": self._labels.names.tolist(),
            "theta": torch.from_numpy(self.theta_),
            "train_loss": torch.from_numpy(self.train_loss_),
            "features": self.n_features_in_,
            "spent": [self.trees_fitted_, self.rows_fitted_],
            "forest": self._forest.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; the settings are those of the constructor."""
        if not state:
            return
        self._labels, self._forest = Labels(np.asarray(state["tasks"])), Forest.from_state_dict(state["forest"])
        self.theta_, self.train_loss_ = state["theta"].numpy(), state["train_loss"].numpy()
        self.n_features_in_ = int(state["features"])
        self.trees_fitted_, self.rows_fitted_ = (int(count) for count in state["spent"])


class RobustMultiTaskGradientBoostingRegressor(RegressorMixin, RobustMultiTaskGradientBoosting):
    """R-MTGB with squared loss; see `RobustMultiTaskGradientBoosting`."""

    def fit(self, X: Any, y: Any, task: Any = None) -> Self:
        """Fit to samples `[N, d]`, numbers `[N]` and the samples' tasks: labels `[N]`; one task without them.

        Raises:
            ValueError: lengths differ, something is NaN or infinite, or a setting is out of its range.
        """
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        return self._fit(X, SquaredLoss(np.asarray(y, dtype=np.float64)[:, None]), 1, task)

    def predict(self, X: Any, task: Any = None) -> Floats:
        """Numbers `[N]` for samples of known tasks.

        Raises:
            ValueError: a task was not in `fit` (the known ones are named), or none is given and there were several.
        """
        return self._outputs(X, task)[:, 0]

    def predict_related(self, X: Any) -> Floats:
        """The mean `[N]` of what the tasks that are no outliers predict: for samples of an unknown task."""
        mean: Floats = np.mean(self._related_outputs(X), axis=0)[:, 0]
        return mean

    def score(self, X: Any, y: Any, sample_weight: Any = None, task: Any = None) -> float:
        """`R^2` of the predictions."""
        return float(r2_score(y, self.predict(X, task), sample_weight=sample_weight))


class RobustMultiTaskGradientBoostingClassifier(ClassifierMixin, RobustMultiTaskGradientBoosting):
    """R-MTGB with log loss over `K` classes, one tree of `K` outputs per round (for two classes, too).

    Attributes (after `fit`): `classes_`, and those of `RobustMultiTaskGradientBoosting`.
    """

    def fit(self, X: Any, y: Any, task: Any = None) -> Self:
        """Fit to samples `[N, d]`, classes `[N]` and the samples' tasks: labels `[N]`; one task without them.

        Raises:
            ValueError: lengths differ, something is NaN or infinite, or a setting is out of its range.
        """
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, index = np.unique(y, return_inverse=True)
        return self._fit(X, LogLoss(np.eye(len(self.classes_))[index]), len(self.classes_), task)

    def predict_proba(self, X: Any, task: Any = None) -> Floats:
        """Probabilities `[N, K]` of the classes, in the order of `classes_`; errors as in `predict`."""
        probabilities: Floats = softmax(self._outputs(X, task), axis=1)
        return probabilities

    def predict(self, X: Any, task: Any = None) -> NDArray[Any]:
        """The likeliest classes `[N]` of samples of known tasks.

        Raises:
            ValueError: a task was not in `fit` (the known ones are named), or none is given and there were several.
        """
        best = self._outputs(X, task).argmax(1)
        classes: NDArray[Any] = self.classes_[best]
        return classes

    def predict_related(self, X: Any) -> Floats:
        """The mean probabilities `[N, K]` of the tasks that are no outliers: for samples of an unknown task."""
        mean: Floats = np.mean([softmax(outputs, axis=1) for outputs in self._related_outputs(X)], axis=0)
        return mean

    def score(self, X: Any, y: Any, sample_weight: Any = None, task: Any = None) -> float:
        """The share of classes that are right."""
        return float(accuracy_score(y, self.predict(X, task), sample_weight=sample_weight))

    @property
    def _width(self) -> int:
        return len(self.classes_)

    def state_dict(self) -> dict[str, Any]:
        """What was fitted; empty before `fit`."""
        state = super().state_dict()
        return {**state, "classes": self.classes_.tolist()} if state else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        if state:
            self.classes_ = np.asarray(state["classes"])
        super().load_state_dict(state)
