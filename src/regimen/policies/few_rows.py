"""Networks of dense layers on a few rows, by numpy: one call of torch costs more than the arithmetic of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from regimen.models.dense import Dense
from regimen.models.torsos import MLPTorso
from regimen.policies.distributions import ActionDistribution

# Multiplications in a layer from which on torch's faster products make up for its calls, and numpy's start threads.
_MANY = 2**18

Rows: TypeAlias = Any
"""An array of numpy, `[R, D]`."""


class LinearHead(Protocol):
    """A head that describes actions by what linear layers make of the features."""

    @property
    def outputs(self) -> list[nn.Linear]:
        """The layers."""
        ...

    def described(self, outputs: list[Tensor], temperature: Tensor | float) -> ActionDistribution:
        """By what each layer gives, `[R, ...]`."""
        ...


class FewRows:
    """A torso and a head as numpy computes them, to single precision, with the weights they have now (not copied)."""

    def __init__(self, torso: MLPTorso, head: LinearHead) -> None:
        self._torso, self._outputs = [*map(_function, torso.layers)], [*map(_function, head.outputs)]
        self._described = head.described

    def __call__(self, observations: Tensor, temperature: float) -> ActionDistribution:
        """The distribution at observations `[R, ...]`."""
        rows = observations.float().numpy(force=True).reshape(len(observations), -1)
        for function in self._torso:
            rows = function(rows)
        return self._described([torch.from_numpy(function(rows)) for function in self._outputs], temperature)


def suits(torso: nn.Module, outputs: list[nn.Linear], rows: int) -> bool:
    """Whether all layers are dense with biases, in single precision on the CPU, unwatched and small for `rows` rows."""
    if type(torso) is not MLPTorso:
        return False
    layers: list[nn.Module] = [*torso.layers, *outputs]
    known = all(type(layer) in (Dense, nn.Linear, nn.Tanh, nn.ReLU) for layer in layers)
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    if not known or any(layer.bias is None for layer in linear):
        return False
    weights = [weight for layer in linear for weight in (layer.weight, layer.bias)]
    fits = all(weight.dtype == torch.float32 and weight.device.type == "cpu" for weight in weights)
    return fits and not any(map(watched, (torso, *layers))) and rows * max(weight.numel() for weight in weights) < _MANY


def watched(module: nn.Module) -> bool:
    """Whether somebody is told when the module is called."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _function(layer: nn.Module) -> Callable[[Rows], Rows]:
    if not isinstance(layer, nn.Linear):
        # In place: the first layer is dense, so that what comes here is no one else's.
        return _tanh if isinstance(layer, nn.Tanh) else _relu
    weight, bias = layer.weight.detach().numpy().T, layer.bias.detach().numpy()

    def dense(rows: Rows) -> Rows:
        product = np.dot(rows, weight)
        product += bias
        return product

    return dense


def _tanh(rows: Rows) -> Rows:
    return np.tanh(rows, out=rows)


def _relu(rows: Rows) -> Rows:
    return np.maximum(rows, 0, out=rows)
