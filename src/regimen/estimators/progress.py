"""Progress: what each step contributed to a final reward, learned from final rewards alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regimen.functions.attribution import action_ends, misfit
from regimen.rollout import Rollout


class LinearProgress:
    """Contributions `c_i = w . phi_i`, fitted by ridge regression of the final reward on the sum of the features.

    `min_w sum_b (w . sum_i phi_bi - R_b)^2 + ridge |w|^2`, in closed form and in double precision; there is no
    intercept, which no step could be given. It is fitted by `FitEstimator(member, Reading(progress.summed))`.

    Attributes:
        weights: float64 `[D]`; empty before a fit.
        misfit: `[]`, see `MeasureMisfit`; inf before it.
    """

    def __init__(self, features: Callable[[Rollout], Tensor], ridge: float = 1.0) -> None:
        """Make it.

        Args:
            features: of each step, `[B, T, D]`.
            ridge: strength of the penalty, above 0.

        Raises:
            ValueError: the penalty is not above 0.
        """
        if not ridge > 0:
            raise ValueError(f"LinearProgress: ridge is {ridge}, expected above 0")
        self.features, self.ridge = features, ridge
        self.weights = torch.empty(0, dtype=torch.float64)
        self.misfit = torch.tensor(torch.inf)

    def summed(self, rollout: Rollout) -> Tensor:
        """The sum of the features over a sample's actions, `[B, D]`."""
        ends = action_ends(rollout.mask, rollout.loss_mask, rollout.segment)
        return torch.where(ends[..., None], self.features(rollout), 0).sum(1)

    def fit(self, x: NDArray[Any], y: NDArray[Any], source: Any = None) -> Self:
        """Fit it to sums of features `[B, D]` and final rewards `[B]`; whose samples they are does not matter."""
        phi, final = (torch.as_tensor(np.asarray(values), dtype=torch.float64) for values in (x, y))
        if phi.ndim != 2 or final.shape != phi.shape[:1] or not len(phi):
            raise ValueError(
                f"LinearProgress: features of shape {list(phi.shape)} and rewards of {list(final.shape)}; expected "
                "[B, D] and [B], of at least one sample"
            )
        penalty = self.ridge * torch.eye(phi.shape[1], dtype=torch.float64)
        self.weights = torch.linalg.solve(phi.T @ phi + penalty, phi.T @ final)
        self.misfit = torch.tensor(torch.inf)
        return self

    def __call__(self, rollout: Rollout) -> Tensor:
        """Contributions `[B, T]`.

        Raises:
            ValueError: it has not been fitted.
        """
        if not len(self.weights):
            raise ValueError(
                "LinearProgress has not been fitted; let a stage of no steps do it, with "
                "prepare=[FitEstimator(member, Reading(progress.summed))]"
            )
        phi = self.features(rollout)
        ends = action_ends(rollout.mask, rollout.loss_mask, rollout.segment)
        return torch.where(ends, phi @ self.weights.to(phi.device, phi.dtype), 0)

    def state_dict(self) -> dict[str, Any]:
        """The weights and the misfit."""
        return {"weights": self.weights, "misfit": self.misfit}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.weights, self.misfit = state["weights"], state["misfit"]


class RecordedProgress:
    """Contributions that stand in a step column, as an environment that knows them tells: an oracle to compare with.

    Attributes:
        misfit: 0, as what is recorded is taken to be right.
    """

    misfit = torch.zeros(())

    def __init__(self, column: str) -> None:
        self.column = column

    def __call__(self, rollout: Rollout) -> Tensor:
        """The column `[B, T]`."""
        told: Tensor = rollout[self.column]
        return told


@dataclass(frozen=True)
class MeasureMisfit:
    """A stage's `prepare` step: how far off a member's contributions are, in sum, on samples kept apart from its fit.

    The member's `misfit` is set to the squared error of their sum over the variance of the final reward;
    `RewardRedistribution` compares it with its gate.

    Attributes:
        member: of the cast, `member(rollout) -> [B, T]`, with an attribute `misfit`.
    """

    member: str = "estimator"

    @torch.no_grad()
    def __call__(self, cast: Mapping[str, Any], tasks: Sequence[Any], memory: Any) -> None:
        """Measure it on what the stage's memory, a `HoldOut`, keeps apart.

        Raises:
            ValueError: nothing is kept apart, or the samples have no reward.
        """
        apart = getattr(memory, "apart", None)
        if apart is None or not len(apart):
            raise ValueError(
                f"MeasureMisfit('{self.member}') found no samples apart from the fit in a {type(memory).__name__}; "
                "give the stage, and those that collect, one HoldOut memory"
            )
        rollout: Rollout = apart.last()
        if rollout.reward is None:
            raise ValueError(
                f"MeasureMisfit('{self.member}'): samples of task {'/'.join(rollout.task_names)} were not judged; give "
                "the stage that collects a reward"
            )
        final = rollout.reward if rollout.reward.ndim == 1 else (rollout.reward * rollout.mask).sum(1)
        if bool((final == final[0]).all()):
            warnings.warn(
                f"MeasureMisfit('{self.member}'): all {len(final)} final rewards kept apart are {float(final[0]):g}; "
                "the estimator cannot learn from equal rewards. Explore more, or with a better policy",
                stacklevel=2,
            )
        estimator = cast[self.member]
        if isinstance(estimator, nn.Module):
            estimator.eval()
        estimator.misfit = misfit(estimator(rollout).sum(1), final).to(torch.get_default_dtype())
