"""Contexts of denoisers: how their per-sample tensors are read, checked and replaced.

A context is a dict or a TensorDict of tensors `[B, ...]`. Missing and None mean the same: the sample has no
such thing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

Context = Mapping[str, Tensor]


def lookup(context: Context, key: str) -> Tensor | None:
    """The tensor under `key`, or None where it is missing, None, or not a tensor."""
    value = context.get(key, None)
    return value if isinstance(value, Tensor) else None


def required(context: Context, key: str, owner: str) -> Tensor:
    """The tensor under `key`; a missing one is a ValueError that names owner, key and the keys there are."""
    value = lookup(context, key)
    if value is None:
        raise ValueError(f"{owner} needs '{key}' in the context, which has {sorted(context.keys())}")
    return value


def replaced(context: Context, **tensors: Tensor) -> Context:
    """A shallow copy of the context, of its own kind (dict or TensorDict), with tensors replaced or added."""
    if isinstance(context, TensorDictBase):
        return cast(Context, context.copy().update(tensors))
    return {**context, **tensors}


def reference_of(context: Context, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Reference images of the rows that have one (Wei et al. 2025, Kontext conditioning).

    Args:
        context: may hold `reference [B, C, H, W]` and `has_reference` bool `[B]` (default: every row has
            one).
        x: noisy images `[B, C, H, W]`, which give the reference's size.

    Returns:
        `(None, None)` when no row has a reference; `(reference, None)` when every row has one; otherwise
        `(reference, has_reference)` with the reference of the other rows set to 0. On an accelerator a
        given `has_reference` is always handed on, because looking at its values would stall the device.

    Raises:
        ValueError: the reference is of another size than `x`, or `has_reference` is not `[B]`.
    """
    reference, has = lookup(context, "reference"), lookup(context, "has_reference")
    if reference is None:
        return None, None
    if reference.shape != x.shape:
        raise ValueError(
            f"reference has size {tuple(reference.shape)}, the noisy images {tuple(x.shape)}; they must agree"
        )
    if has is None:
        return reference, None
    if has.shape != x.shape[:1]:
        raise ValueError(f"has_reference has shape {tuple(has.shape)}; it should have {tuple(x.shape[:1])}")
    has = has.bool()
    if not has.is_cuda:
        if bool(has.all()):
            return reference, None
        if not bool(has.any()):
            return None, None
    return reference.masked_fill(~has.view(-1, 1, 1, 1), 0.0), has


def embed_condition(table: nn.Embedding, condition: Tensor) -> Tensor:
    """Rows `[B, D]` of an embedding table whose last row is the null condition.

    Raises:
        ValueError: an index out of range (seen on CPU tensors only; an accelerator reports it by itself).
    """
    try:
        rows: Tensor = table(condition)
    except IndexError:
        low, high = condition.min().item(), condition.max().item()
        null = table.num_embeddings - 1
        raise ValueError(
            f"condition spans [{low}, {high}] and should lie in [0, {null}]; {null} is the null condition"
        ) from None
    return rows


def null_condition(context: Context, null: int) -> Context:
    """The context with every `condition` replaced by the null condition; unchanged where it has none."""
    condition = lookup(context, "condition")
    return context if condition is None else replaced(context, condition=torch.full_like(condition, null))


def null_prompts(context: Context, owner: str) -> Context:
    """The context with `prompt_embeds` and `pooled` replaced by `null_prompt_embeds` and `null_pooled`.

    Raises:
        ValueError: a replacement is missing (zeros in its place would silently guide away from nothing).
    """
    owner = f"{owner}.unconditional"
    keys = [key for key in ("prompt_embeds", "pooled") if lookup(context, key) is not None]
    return replaced(context, **{key: required(context, f"null_{key}", owner) for key in keys})
