"""Sublayers of decoders that keep little for their backward pass and work in blocks of rows.

What is cheap (norms, rotations, gates) is computed a second time instead of being kept, and no intermediate result is
larger than a block, which stays in a processor's cache. Values and gradients are those of the plain composition.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import rms_norm, silu

from regimen.models.dense import times

BLOCK = 1024
"""Rows that a processor works on at once; other devices take all."""


def blocks(rows: int, like: Tensor) -> Iterator[slice]:
    """Slices of `rows` rows."""
    size = BLOCK if like.device.type == "cpu" else max(rows, 1)
    return (slice(start, start + size) for start in range(0, rows, size))


def side_by_side(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """One weight `[sum of widths, D]` and one bias for several layers that read the same input."""
    if len(weights) == 1:
        return weights[0], biases[0]
    if all(bias is None for bias in biases):
        return torch.cat(list(weights)), None
    pairs = zip(weights, biases, strict=True)
    return torch.cat(list(weights)), torch.cat([w.new_zeros(len(w)) if bias is None else bias for w, bias in pairs])


def _projected(x: Tensor, scale: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A projection of `scale * x / rms(x)`: `[N, D]` to `[N, W]`."""
    found = x.new_empty(len(x), len(weight))
    for rows in blocks(len(x), x):
        out = times(rms_norm(x[rows], scale.shape, scale, eps), weight)
        found[rows] = out if bias is None else out + bias
    return found


def normed_projection(
    x: Tensor, scale: Tensor, eps: float, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> Tensor:
    """Several linear layers applied to `scale * x / rms(x)` (Zhang and Sennrich 2019), side by side.

    Args:
        x: `[N, D]`; it is kept for the backward pass, and nothing else is.
        scale: `[D]`.
        eps: added to the mean square.
        weights: `[W, D]` each.
        biases: `[W]` each, or `None`.

    Returns:
        `[N, sum of W]`.
    """
    if not torch.is_grad_enabled():
        return _projected(x, scale, eps, *side_by_side(weights, biases))
    found: Tensor = _NormedProjection.apply(x, scale, eps, *weights, *biases)
    return found


def gated_projection(pair: Tensor, weight: Tensor) -> Tensor:
    """A linear layer of `silu(a) * b` (Shazeer 2020): `pair [N, 2 I]`, `a` beside `b`, and `weight [D, I]` to `[N, D]`.

    `pair` is kept for the backward pass, and nothing else is.
    """
    if not torch.is_grad_enabled():
        return _gated(pair, weight)
    found: Tensor = _GatedProjection.apply(pair, weight)
    return found


class _NormedProjection(torch.autograd.Function):
    """Several projections of `scale * x / rms(x)`, of which only `x` is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float, *maps: Any) -> Tensor:
        """`maps` are the weights, then the biases."""
        weights, biases = maps[: len(maps) // 2], maps[len(maps) // 2 :]
        ctx.save_for_backward(x, scale, *weights)
        ctx.eps, ctx.biased = eps, [bias is not None for bias in biases]
        return _projected(x, scale, eps, *side_by_side(weights, biases))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of the arguments."""
        x, scale, *weights = ctx.saved_tensors
        grad_x, grad_scale = torch.empty_like(x), torch.zeros_like(scale)
        weight, _ = side_by_side(weights, [None] * len(weights))
        grad_weight = torch.zeros_like(weight)
        for rows in blocks(len(x), x):
            inverse = (x[rows].square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
            unit = x[rows] * inverse
            grad_weight += times((unit * scale).t(), grad[rows].t()).t()
            back = times(grad[rows], weight.t())
            grad_scale += (back * unit).sum(0)
            back *= scale
            torch.mul(back - unit * (back * unit).mean(-1, keepdim=True), inverse, out=grad_x[rows])
        widths = [len(each) for each in weights]
        sums = grad.sum(0).split(widths) if any(ctx.biased) else [None] * len(widths)
        grad_biases = [total if on else None for total, on in zip(sums, ctx.biased, strict=True)]
        return grad_x, grad_scale, None, *grad_weight.split(widths), *grad_biases


def _gated(pair: Tensor, weight: Tensor) -> Tensor:
    """A projection of `silu(a) * b`, for `[N, 2 I]` with `a` beside `b`: `[N, D]`."""
    width, found = weight.shape[1], pair.new_empty(len(pair), len(weight))
    for rows in blocks(len(pair), pair):
        hidden = silu(pair[rows, :width]).mul_(pair[rows, width:])
        found[rows] = times(hidden, weight)
    return found


class _GatedProjection(torch.autograd.Function):
    """`_gated(pair, weight)`, of which only `pair` is kept."""

    @staticmethod
    def forward(ctx: Any, pair: Tensor, weight: Tensor) -> Tensor:
        """See `_gated`."""
        ctx.save_for_backward(pair, weight)
        return _gated(pair, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of both."""
        pair, weight = ctx.saved_tensors
        width, grad_pair, grad_weight = weight.shape[1], torch.empty_like(pair), torch.zeros_like(weight)
        for rows in blocks(len(pair), pair):
            gate, up = pair[rows, :width], pair[rows, width:]
            opened, back = silu(gate), times(grad[rows], weight.t())
            grad_weight += times((opened * up).t(), grad[rows].t()).t()
            torch.mul(back, opened, out=grad_pair[rows, width:])
            grad_pair[rows, :width] = torch.ops.aten.silu_backward(back * up, gate)
        return grad_pair, grad_weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021): `[N, H, d]`, the halves of `d` turned by `cos`, `sin [N, 1, d]`.

    The first half of `sin` has its sign turned.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
