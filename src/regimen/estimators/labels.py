"""Names of tasks as numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regimen.estimators.trees import Ints

# What a single task is called that was given no name.
ONE = 0


@dataclass(frozen=True)
class Labels:
    """The names of tasks: integers, texts, or anything that can be sorted. A task's code is its place here."""

    names: NDArray[Any]

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def of(cls, task: Any, samples: int) -> tuple[Labels, Ints]:
        """The names among some labels `[N]`, in the order in which they first occur, and each sample's code.

        Raises:
            ValueError: there are not as many as samples, or they cannot be told apart (NaN, or of different kinds).
        """
        names, first, inverse = np.unique(column(task, samples), return_index=True, return_inverse=True)
        order = first.argsort()
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        return cls(names[order]), rank[inverse]

    def codes(self, task: Any, samples: int) -> Ints:
        """Each sample's code, int `[N]`.

        Raises:
            ValueError: a label is not among the names; none are given, and there are several names.
        """
        if task is None and len(self) == 1:
            return np.zeros(samples, dtype=np.intp)
        if task is None:
            raise ValueError(f"task is None, but there are {len(self)} tasks: {self._listed()}; give each sample's")
        code = self.find(task, samples)
        if (code < 0).any():
            unknown = np.unique(column(task, samples)[code < 0]).tolist()[:5]
            raise ValueError(
                f"task holds {', '.join(map(repr, unknown))}, which was not there in fit; expected one of "
                f"{self._listed()} (predict_related serves unknown tasks)"
            )
        return code

    def find(self, task: Any, samples: int) -> Ints:
        """Each sample's code, -1 for a label that is not among the names: int `[N]`."""
        place = {name: index for index, name in enumerate(self.names.tolist())}
        names, inverse = np.unique(column(task, samples), return_inverse=True)
        return np.array([place.get(name, -1) for name in names.tolist()], dtype=np.intp)[inverse]

    def _listed(self) -> str:
        names = [repr(name) for name in self.names.tolist()]
        return ", ".join(names[:20]) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")


def column(task: Any, samples: int) -> NDArray[Any]:
    """Labels as an array `[N]`; the same one for all samples if there are none.

    Raises:
        ValueError: see `Labels.of`.
    """
    if task is None:
        return np.full(samples, ONE)
    labels = np.asarray(task)
    if labels.shape != (samples,):
        raise ValueError(f"task has shape {list(labels.shape)}, expected [{samples}]: a label for each sample")
    if labels.dtype.kind == "O":
        texts = [isinstance(label, str) for label in labels.tolist()]
        if any(texts) != all(texts) or (labels == None).any():  # noqa: E711
            raise ValueError("task holds texts beside other labels, or None; expected all integers or all texts")
        labels = np.array(labels.tolist())
    if labels.dtype.kind == "f" and np.isnan(labels).any():
        raise ValueError(f"task holds NaN for {int(np.isnan(labels).sum())} samples; drop those, or name their task")
    return labels
