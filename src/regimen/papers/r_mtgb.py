"""R-MTGB: boosting that sets outlier tasks apart, against pooled, single-task and plain multi-task boosting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from tensordict import TensorDict

from regimen.cast import Cast
from regimen.estimators import (
    FitEstimator,
    Reading,
    RobustMultiTaskGradientBoostingClassifier,
    RobustMultiTaskGradientBoostingRegressor,
)
from regimen.lab.experiment import Arm, Claim, Paper, SeedResults
from regimen.memory import ReplayMemory
from regimen.regimen import Regimen, Stage
from regimen.tasks import DatasetTask
from regimen.tasks.worlds.related_tables import RelatedTables, digit_tables, fourier_tables, table_of

Method = Literal["r_mtgb", "mtb", "mtb_rows", "feature", "single", "pooled"]


@dataclass(frozen=True)
class Settings:
    """Numbers of a scale.

    Attributes:
        data: random functions; real digits; or a table of one's own.
        tasks, outliers: how many; of the random functions and of digits.
        dim, train, test: of the random functions, rows per task.
        train_share: of digits and of a table.
        table, target, task: a file of comma-separated values, and its columns.
        classes: whether the target is a class: log loss instead of squared.
        shared, partition, own: rounds of the three blocks.
        learning_rate, max_depth, leaves, bins: of every arm.
    """

    data: Literal["functions", "digits", "table"] = "functions"
    tasks: int = 10
    outliers: int = 2
    dim: int = 5
    train: int = 300
    test: int = 500
    train_share: float = 0.67
    table: str = "table.csv"
    target: str = "target"
    task: str = "task"
    classes: bool = False
    shared: int = 30
    partition: int = 60
    own: int = 60
    learning_rate: float = 0.1
    max_depth: int | None = 3
    leaves: int | None = 8
    bins: int | None = None


def rounds(method: Method, s: Settings) -> tuple[int, int, int]:
    """Rounds of the three blocks. All but `mtb_rows` have as many; its trees see as many rows as those of `r_mtgb`."""
    total = s.shared + s.partition + s.own
    return {
        "r_mtgb": (s.shared, s.partition, s.own),
        "mtb": (total // 2, 0, total - total // 2),
        "mtb_rows": (s.shared + s.partition, 0, s.own + s.partition),
        "feature": (total, 0, 0),
        "single": (0, 0, total),
        "pooled": (total, 0, 0),
    }[method]


def tables(seed: int, s: Settings) -> RelatedTables:
    """The data of a seed."""
    if s.data == "digits":
        return digit_tables(s.tasks, s.outliers, s.train_share, seed)
    if s.data == "table":
        return table_of(s.table, s.target, s.task, s.train_share, seed)
    return fourier_tables(s.tasks, s.outliers, s.dim, s.train, s.test, seed)


def booster(method: Method, seed: int, s: Settings) -> Any:
    """A method as a setting of one estimator."""
    shared, partition, own = rounds(method, s)
    kind = RobustMultiTaskGradientBoostingClassifier if s.classes else RobustMultiTaskGradientBoostingRegressor
    return kind(
        n_shared=shared,
        n_partition=partition,
        n_task=own,
        learning_rate=s.learning_rate,
        max_depth=s.max_depth,
        max_leaf_nodes=s.leaves,
        bins=s.bins,
        random_state=seed,
    )


def boosted(method: Method, seed: int, s: Settings) -> Regimen:
    """An arm: read every row once, then fit. There is no policy, and nothing is judged."""
    data = tables(seed, s)
    if method == "feature":
        data = data.with_task_as_feature()
    tasks = [DatasetTask(name, rows, order="sequential") for name, rows in data.train.items()]
    size = sum(len(task.rows) for task in tasks)
    shares = {f"mixture/{task.name}": len(task.rows) for task in tasks} if len(tasks) > 1 else {}
    memory = ReplayMemory(size)
    fit = FitEstimator("booster", Reading("x"), target="y")
    stages = [
        Stage("read", tasks, 1, size, memory=memory, knobs=shares),
        Stage("fit", tasks, 0, size, memory=memory, prepare=[fit]),
    ]
    held_out = DatasetTask("test", data.test, evaluate=partial(errors, names=data.names, outliers=data.outliers))
    return Regimen(Cast(booster=booster(method, seed, s)), stages, evaluations=[held_out])


# What is measured


def errors(
    cast: Mapping[str, Any], rows: TensorDict, names: tuple[str, ...], outliers: tuple[str, ...]
) -> dict[str, float]:
    """Mean over tasks of their errors on held-out rows, over all tasks, related ones and outliers; and what it cost.

    The error of numbers is the root of the mean square, that of classes the share that is wrong. `isolated` is 1 if the
    outliers, all of them and no other task, are on the side of the fewer.
    """
    model = cast["booster"]
    if not model.state_dict():
        return {}
    x, y, task = (rows[column].numpy() for column in ("x", "y", "task"))
    wrong = np.square(model.predict(x, np.array(names)[task]) - y)
    mean = np.bincount(task, wrong) / np.bincount(task)
    error = mean if hasattr(model, "classes_") else np.sqrt(mean)
    odd = np.isin(names, outliers)
    found = {"error": error.mean(), "trees": model.trees_fitted_, "tree_rows": model.rows_fitted_}
    if outliers:
        found |= {"error_related": error[~odd].mean(), "error_outliers": error[odd].mean()}
    if outliers and model.n_partition:
        found["isolated"] = set(model.tasks_[model.outlier_score_ > 0.5]) == set(outliers)
    return {name: float(value) for name, value in found.items()}


def gain(other: Method, metric: str, seed: SeedResults) -> float:
    """How much lower the error of R-MTGB is than another method's."""
    return seed[other].final[f"test/{metric}"] - seed["r_mtgb"].final[f"test/{metric}"]


def relative_gain(other: Method, seed: SeedResults) -> float:
    """The same as a part of the other's error."""
    return gain(other, "error", seed) / seed[other].final["test/error"]


METHODS: dict[Method, str] = {
    "r_mtgb": "R-MTGB",
    "mtb": "multi-task boosting (shared, then own)",
    "mtb_rows": "multi-task boosting, fitted to as many rows",
    "feature": "pooled, the task a feature",
    "single": "a booster per task",
    "pooled": "pooled, the task ignored",
}


def lower(other: Method, metric: str = "error", where: str = "", judged: bool = True) -> Claim:
    """The error of R-MTGB is lower than another method's."""
    text = f"Test error{where}: {METHODS[other]} minus R-MTGB"
    return Claim(f"{metric}_{other}", text, partial(gain, other, metric), ["r_mtgb", other], judged=judged)


PAPER = Paper(
    slug="r-mtgb",
    title="Robust-Multi-Task Gradient Boosting",
    arxiv="2507.11411",
    verb="judge, adapt",
    policy="none",
    claim="With a few outlier tasks among many related ones, R-MTGB puts the outliers on one side of its partition, "
    "and has a lower mean test error than plain multi-task, single-task and pooled boosting with as many rounds.",
    arms=[Arm(method, title, partial(boosted, method)) for method, title in METHODS.items()],
    claims=[
        lower("mtb"),
        lower("single"),
        lower("pooled"),
        Claim(
            "isolated",
            "The outliers, and no other tasks, are on the side of the fewer (1 or 0)",
            lambda seed: seed["r_mtgb"].final["test/isolated"],
            ["r_mtgb"],
            above=0.5,
        ),
        lower("mtb_rows", judged=False),
        lower("feature", judged=False),
        Claim(
            "relative_mtb",
            "The first as a part of the error of multi-task boosting",
            partial(relative_gain, "mtb"),
            ["r_mtgb", "mtb"],
            judged=False,
        ),
        lower("mtb", "error_related", ", related tasks", judged=False),
        lower("mtb", "error_outliers", ", outliers", judged=False),
        lower("single", "error_outliers", ", outliers", judged=False),
    ],
    metrics={
        "test/error": "test error, mean over tasks",
        "test/error_related": "test error, related tasks",
        "test/error_outliers": "test error, outliers",
        "test/isolated": "outliers isolated",
        "test/trees": "trees fitted",
        "test/tree_rows": "rows that trees were fitted to",
    },
    scales={
        "quick": Settings(tasks=4, outliers=1, train=100, test=100, shared=10, partition=20, own=20),
        "default": Settings(),
        "digits": Settings(data="digits", classes=True),
        "full": Settings(data="table", bins=255),
    },
)
