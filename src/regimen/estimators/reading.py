"""How an estimator reads rollouts, and the step of a stage that fits one to what was collected."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regimen.rollout import Rollout


@dataclass(frozen=True)
class Reading:
    """What an estimator is shown of each sample. Called with an estimator and a rollout, it asks the one of the other.

    Attributes:
        inputs: side column `[B, ...]`, or a function of the rollout that gives `[B, ...]`; flattened to `[B, d]`.
        source: side column or context entry that says whose sample it is (an annotator, a user); by default the task
            that it was collected from.
    """

    inputs: str | Callable[[Rollout], Tensor]
    source: str | None = None

    def features(self, rollout: Rollout) -> NDArray[Any]:
        """`[B, d]`."""
        values = rollout[self.inputs] if isinstance(self.inputs, str) else self.inputs(rollout)
        return np.asarray(values.detach().flatten(1).cpu().double().numpy())

    def sources(self, rollout: Rollout) -> NDArray[Any] | None:
        """Labels `[B]`; `None` if the rollout does not tell."""
        if self.source is None:
            return np.array(rollout.task_names)[rollout.task.cpu().numpy()]
        told = rollout.get(self.source)
        if told is None:
            told = rollout.context.get(self.source, None)
        return None if told is None else np.array(told.tolist())

    def __call__(self, estimator: Any, rollout: Rollout) -> Tensor:
        """What the estimator predicts, `[B]`, or a classifier's probabilities `[B, K]`.

        A sample of a source that was not there in its `fit`, or of none, gets the mean over the sources that are no
        outliers.
        """
        x, sources = self.features(rollout), self.sources(rollout)
        values = estimator.predict_related(x)
        if sources is not None:
            known = estimator.outlier_scores(sources) >= 0
            predict = getattr(estimator, "predict_proba", estimator.predict)
            if known.any():
                values[known] = predict(x[known], sources[known])
        return _tensor(values, rollout)

    def outlier_scores(self, estimator: Any, rollout: Rollout) -> Tensor:
        """How much of an outlier each sample's source is, `[B]` in (0, 1); NaN of an unknown one."""
        sources = self.sources(rollout)
        scores = np.full(len(rollout), np.nan) if sources is None else estimator.outlier_scores(sources)
        return _tensor(scores, rollout)


@dataclass(frozen=True)
class FitEstimator:
    """A stage's `prepare` step: fits a member of the cast to what the stage's memory holds.

    A stage before it collects, into a `ReplayMemory` that both share.

    Attributes:
        member: name of the estimator.
        reading: what it is shown.
        target: side column of what it is to predict, `[B]`; by default the total reward that was judged.
    """

    member: str
    reading: Reading
    target: str | None = None

    def __call__(self, cast: Mapping[str, Any], tasks: Sequence[Any], memory: Any) -> None:
        """Fit it.

        Raises:
            ValueError: the memory holds nothing, or its samples have no reward.
        """
        if not len(memory):
            raise ValueError(
                f"FitEstimator('{self.member}') found the stage's memory empty; let a stage before it collect into the "
                "same ReplayMemory"
            )
        rollout: Rollout = memory.last()
        cast[self.member].fit(self.reading.features(rollout), self._targets(rollout), self.reading.sources(rollout))

    def _targets(self, rollout: Rollout) -> NDArray[Any]:
        value = rollout.reward if self.target is None else rollout[self.target]
        if value is None:
            raise ValueError(
                f"FitEstimator('{self.member}') needs the reward of the samples of task "
                f"{'/'.join(rollout.task_names)}, and they were not judged; give the stage that collects a reward, or "
                "name a column as target"
            )
        return np.asarray((value if value.ndim == 1 else (value * rollout.mask).sum(1)).cpu().numpy())


def _tensor(values: NDArray[Any], rollout: Rollout) -> Tensor:
    return torch.from_numpy(values).to(rollout.mask.device, torch.get_default_dtype())
