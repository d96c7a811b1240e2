"""Tables of related tasks, some of which are outliers: what multi-task estimators are tried on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict
from torch import Tensor

Numbers = NDArray[np.float64]
_FEATURES = 500


@dataclass(frozen=True)
class RelatedTables:
    """Tasks with the same columns: `x [N, d]`, `y [N]`, `task [N]` (int64, the place in `names`).

    Attributes:
        names: of the tasks.
        train: rows to fit to, by task; test: rows that were held out, of all tasks.
        outliers: names of the tasks that were made unlike the others; empty where nobody knows.
    """

    names: tuple[str, ...]
    train: dict[str, TensorDict]
    test: TensorDict
    outliers: tuple[str, ...] = ()

    def with_task_as_feature(self) -> RelatedTables:
        """The same tables with each row's task, one-hot, among its features."""
        train = {name: self._widened(rows) for name, rows in self.train.items()}
        return RelatedTables(self.names, train, self._widened(self.test), self.outliers)

    def _widened(self, rows: TensorDict) -> TensorDict:
        told = torch.nn.functional.one_hot(rows["task"], len(self.names)).to(rows["x"].dtype)
        return rows.clone(False).set("x", torch.cat([rows["x"], told], 1))


def random_fourier(rng: np.random.Generator, dim: int) -> Callable[[Numbers], Numbers]:
    """A smooth random function of `[N, dim]`: `sum_j a_j sqrt(2 / M) cos(w_j . x / l + b_j)`.

    `M = 500`, `l = dim / 4`, `a, w ~ N(0, 1)` and `b ~ U(0, 2 pi)`: a draw of a Gaussian process of variance 1.
    """
    a, w = rng.standard_normal(_FEATURES), rng.standard_normal((dim, _FEATURES)) / (0.25 * dim)
    b = rng.uniform(0, 2 * np.pi, _FEATURES)
    return lambda x: np.cos(x @ w + b) @ a * np.sqrt(2 / _FEATURES)


def fourier_tables(tasks: int, outliers: int, dim: int, train: int, test: int, seed: int) -> RelatedTables:
    """Tasks that share most of their function, and outliers that share another one among themselves.

    `y = 0.9 f(x) + 0.1 f_t(x)` with `x ~ U(-1, 1)^dim`; outliers have another `f`. No noise. This is the fourth
    scenario of R-MTGB (arXiv 2507.11411). Which tasks are the outliers is drawn, too.

    Raises:
        ValueError: there are not fewer outliers than tasks.
    """
    if not 0 <= outliers < tasks:
        raise ValueError(f"fourier_tables: {outliers} outliers of {tasks} tasks; expected fewer")
    rng = np.random.default_rng(seed)
    common, other = random_fourier(rng, dim), random_fourier(rng, dim)
    odd = set(rng.choice(tasks, outliers, replace=False).tolist())
    x, y = [], []
    for task in range(tasks):
        own, shared = random_fourier(rng, dim), other if task in odd else common
        x.append(rng.uniform(-1, 1, (train + test, dim)))
        y.append(0.9 * shared(x[-1]) + 0.1 * own(x[-1]))
    names = [f"task{task}" for task in range(tasks)]
    return _split(names, x, y, [train] * tasks, [names[task] for task in sorted(odd)])


def digit_tables(tasks: int, outliers: int, train: float, seed: int) -> RelatedTables:
    """scikit-learn's digits (1797 images, 64 features), shared out over tasks that ask whether the digit is 5 or more.

    In the outliers, which are drawn, the answer is turned around. `train` is the share of rows that is fitted to.
    """
    from sklearn.datasets import load_digits

    rng = np.random.default_rng(seed)
    images, digits = load_digits(return_X_y=True)
    odd = set(rng.choice(tasks, outliers, replace=False).tolist())
    parts = np.array_split(rng.permutation(len(images)), tasks)
    x = [images[part] / 16 for part in parts]
    y = [((digits[part] >= 5) != (task in odd)).astype(float) for task, part in enumerate(parts)]
    names = [f"task{task}" for task in range(tasks)]
    sizes = [int(train * len(part)) for part in parts]
    return _split(names, x, y, sizes, [names[task] for task in sorted(odd)])


def table_of(path: Path | str, target: str, task: str, train: float, seed: int) -> RelatedTables:
    """A table of one's own, in a file of comma-separated values: numbers and categories, which become one-hot.

    Args:
        path: of the file.
        target, task: names of the columns of what is predicted (numbers; classes as integers) and of the tasks.
        train: share of each task's rows that is fitted to, drawn at random.
        seed: of that draw.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is not there, or a task has fewer than two rows, or a value is missing.
    """
    import pandas as pd

    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no table '{path}'; expected a file of comma-separated values")
    frame: Any = pd.read_csv(path)
    if absent := [name for name in (target, task) if name not in frame]:
        raise ValueError(f"{path} has no column {', '.join(absent)}; it has: {', '.join(frame.columns)}")
    if frame.isna().to_numpy().any():
        raise ValueError(f"{path} has {int(frame.isna().to_numpy().sum())} missing values; fill them or drop the rows")
    sizes = frame[task].value_counts()
    if (sizes < 2).any():
        raise ValueError(f"{path}: task {sizes.idxmin()!r} has {sizes.min()} row; expected at least 2 of each task")
    frame = frame.sample(frac=1, random_state=seed)
    features = pd.get_dummies(frame.drop(columns=[target, task])).astype(float)
    names = sorted(frame[task].unique().tolist())
    rows = [(frame[task] == name).to_numpy() for name in names]
    x = [features.to_numpy()[mine] for mine in rows]
    y = [frame[target].to_numpy(dtype=float)[mine] for mine in rows]
    counts = [min(max(int(train * len(part)), 1), len(part) - 1) for part in x]
    return _split([str(name) for name in names], x, y, counts, [])


def _split(
    names: list[str], x: list[Numbers], y: list[Numbers], sizes: list[int], outliers: list[str]
) -> RelatedTables:
    """The first rows of each task to fit to, the others held out."""

    def rows(task: int, part: slice) -> TensorDict:
        values: dict[str, Tensor] = {"x": torch.from_numpy(x[task][part]), "y": torch.from_numpy(y[task][part])}
        count = len(values["y"])
        return TensorDict({**values, "task": torch.full((count,), task)}, batch_size=[count])

    train = {name: rows(task, slice(size)) for task, (name, size) in enumerate(zip(names, sizes, strict=True))}
    test = [rows(task, slice(size, None)) for task, size in enumerate(sizes)]
    return RelatedTables(tuple(names), train, torch.cat(test, 0), tuple(outliers))
