"""Dense layers that give products of large matrices to oneDNN.

On processors of other makers than Intel, MKL, to which torch gives them, takes about twice as long (AMD EPYC, AVX-512:
256 x 256 x 256 in 320 us, and 160 us by oneDNN).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

# Multiplications from which on oneDNN's preparations pay, with a gradient, which is written in Python, and without.
_LARGE = {True: 2**22, False: 2**20}


def large(rows: Tensor, weight: Tensor) -> bool:
    """Whether the product of rows `[R, inputs]` and weights, both in single precision on the CPU, pays for oneDNN."""
    # What is soonest told comes first: of small products the question must not cost more than the answer.
    if rows.ndim != 2 or rows.shape[0] * weight.numel() < _LARGE[torch.is_grad_enabled()]:
        return False
    fits = rows.dtype == weight.dtype == torch.float32 and rows.device.type == weight.device.type == "cpu"
    return fits and torch.backends.mkldnn.is_available() and not torch.is_autocast_enabled("cpu")


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`rows [R, inputs]` times `weight [outputs, inputs]` transposed, plus `bias [outputs]`: `[R, outputs]`."""
    if not large(rows, weight):
        return linear(rows, weight, bias)
    multiply = _Product.apply if torch.is_grad_enabled() else _by_onednn
    found: Tensor = multiply(rows, weight, bias)
    return found


def times(rows: Tensor, weight: Tensor) -> Tensor:
    """`product` without a gradient, for code that knows its own."""
    return _by_onednn(rows, weight) if large(rows, weight) else rows @ weight.t()


class _Product(torch.autograd.Function):
    """The product by oneDNN, and its gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return _by_onednn(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        rows, weight = ctx.saved_tensors
        # A gradient of the gradient is asked for where gradients are recorded here; torch knows that of its own.
        multiply = linear if torch.is_grad_enabled() else _by_onednn
        to_rows, to_weight, to_bias = ctx.needs_input_grad
        turned = weight.stride(0) == 1  # Their gradient lies in memory as the weights do, and is not copied.
        return (
            multiply(gradient, weight.t()) if to_rows else None,
            _slope(multiply, gradient, rows, turned) if to_weight else None,
            gradient.sum(0) if to_bias else None,
        )


def _slope(multiply: Any, gradient: Tensor, rows: Tensor, turned: bool) -> Tensor:
    found: Tensor = multiply(rows.t(), gradient.t()).t() if turned else multiply(gradient.t(), rows.t())
    return found


def _by_onednn(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    weight = weight if weight.is_mkldnn else _dense(weight)
    found: Tensor = torch.ops.mkldnn._linear_pointwise(_dense(rows), weight, bias, "none", [], "")
    return found


def _dense(matrix: Tensor) -> Tensor:
    """The matrix without gaps between its rows or columns: with gaps oneDNN takes a thousand times as long."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


@dataclass
class FixedDense:
    """`product` without a gradient, by weights that do not change: oneDNN gets them in the layout it works with."""

    weight: Tensor
    bias: Tensor | None
    _packed: Tensor | None = field(default=None, init=False)

    def __call__(self, rows: Tensor) -> Tensor:
        """`[R, inputs]` to `[R, outputs]`."""
        if not large(rows, self.weight):
            return linear(rows, self.weight, self.bias)
        if self._packed is None:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(_dense(self.weight.detach()), len(rows))
        return _by_onednn(rows, self._packed, self.bias)


class Dense(nn.Linear):
    """`nn.Linear` by `product`."""

    def forward(self, input: Tensor) -> Tensor:
        """`[R, inputs]` to `[R, outputs]`."""
        return product(input, self.weight, self.bias)
