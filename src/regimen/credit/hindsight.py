"""Values in hindsight: what the end of a sample says about each of its steps, as targets of a process reward model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regimen.functions.returns import discounted_return, on_last_step
from regimen.knobs import Knob
from regimen.rollout import Rollout


def hindsight_values(final: Tensor, mask: Tensor, discount: float = 0.9) -> Tensor:
    """`v_t = discount^(T - t) * final` for the steps `t = 1 .. T` of a sample, `[B, T]`; 0 where there is no step.

    Source: arXiv 2510.01167, section 3 (hindsight relabelling; the formula is a reconstruction).

    Args:
        final: `[B]`, how the sample ended (1 for a right answer).
        mask: bool `[B, T]`, the steps.
        discount: in [0, 1]; at 1 all steps have the same value.

    Raises:
        ValueError: a discount outside [0, 1], or shapes that do not fit.
    """
    if not 0 <= discount <= 1:
        raise ValueError(f"hindsight_values: discount is {discount}, expected in [0, 1]")
    values = discounted_return(on_last_step(final, mask), torch.full(mask.shape, discount, device=mask.device), mask)
    return torch.where(mask, values, 0)


@dataclass(frozen=True)
class HindsightValues:
    """Writes `hindsight_values` of the policy's own steps into a step column.

    `ValueObjective(member="process", target="step_value", aggregate="sequence")` then fits a `ProcessValue` to them.

    Attributes:
        key: the total `"reward"`, or the name of a raw component `[B]`.
        discount: see above.
        column: step column `[B, T]`.

    Samples that the component did not score leave the loss.
    """

    key: str = "reward"
    discount: float = 0.9
    column: str = "step_value"

    def __post_init__(self) -> None:
        if not 0 <= self.discount <= 1:
            raise ValueError(f"HindsightValues: discount is {self.discount}, expected in [0, 1]")

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """It reads none."""
        return ()

    def __call__(self, rollout: Rollout, knobs: Mapping[str, float], cast: Mapping[str, Any]) -> Rollout:
        """The rollout with its step values.

        Raises:
            ValueError: the rollout has no such reward, or one with a value per step.
        """
        components = {} if rollout.rewards is None else dict(rollout.rewards.items())
        final = rollout.reward if self.key == "reward" else components.get(self.key, None)
        if final is None or final.ndim != 1:
            there = "none" if final is None else f"of shape {list(final.shape)}"
            raise ValueError(
                f"HindsightValues: the reward '{self.key}' is {there} (components: {', '.join(components) or 'none'}); "
                "expected one value per sample"
            )
        learned = rollout.loss_mask & final.isfinite()[:, None]
        values = hindsight_values(final.nan_to_num(), learned, self.discount)
        return rollout.replace(loss_mask=learned).with_step_columns(**{self.column: values})
