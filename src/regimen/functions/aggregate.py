"""How a loss per step `[B, T]` becomes one number: which step counts how much."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Aggregate = Literal["sequence", "token", "constant"]


def aggregate_weights(mask: Tensor, aggregate: Aggregate = "sequence", horizon: int | None = None) -> Tensor:
    """Weights `[B, T]` with which the sum of a loss per step is its aggregate over a batch.

    - `"sequence"`: mean over a sample's steps, then over samples that have any (GRPO, Shao et al. 2024, eq. 3);
    - `"token"`: mean over all steps of the batch (DAPO, Yu et al. 2025, eq. 8);
    - `"constant"`: sum over steps divided by `B * horizon` (Dr. GRPO, Liu et al. 2025), `horizon` = `T` unless
      given, so that long samples are not down-weighted.

    Weights are computed once for a whole batch; any split of it into micro-batches then sums to the same loss.

    Args:
        mask: bool `[B, T]`, steps that are learned from.
        aggregate: one of the above.
        horizon: steps per sample for `"constant"`.

    Raises:
        ValueError: unknown aggregate, a mask that is not two-dimensional, or a horizon below 1.
    """
    if horizon is not None and horizon < 1:
        raise ValueError(f"aggregate_weights: horizon is {horizon}, expected at least 1")
    if mask.ndim != 2:
        raise ValueError(f"aggregate_weights: mask has shape {list(mask.shape)}, expected [B, T]")
    weights = mask.to(torch.get_default_dtype())
    if aggregate == "token":
        return weights / weights.sum().clamp(min=1)
    if aggregate == "constant":
        return weights / (mask.shape[0] * (mask.shape[1] if horizon is None else horizon))
    if aggregate == "sequence":
        lengths = weights.sum(1, keepdim=True)
        return weights / lengths.clamp(min=1) / (lengths > 0).sum().clamp(min=1)
    raise ValueError(f"aggregate '{aggregate}' is not one of {', '.join(get_args(Aggregate))}")


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` is true; 0 where it is true nowhere. Shapes `[...]` equal; result `[]`."""
    if values.shape != mask.shape:
        raise ValueError(f"masked_mean: values {list(values.shape)} and mask {list(mask.shape)} differ")
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)
