"""One linear layer for each of several objectives, on the same features: which of them speaks is decided row by row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import add
from typing import Any, cast

import torch
from torch import Tensor, nn

from regimen.models.dense import product

_NOISE_SEED = 42


def mixture_weights(weights: Tensor, names: Sequence[str]) -> Tensor:
    """Weights `[..., H]` of `H` named heads, scaled to sum 1.

    Raises:
        ValueError: not one weight for each head, one that is negative or not finite, or all of them 0.
    """
    if weights.shape[-1:] != (len(names),):
        raise ValueError(
            f"mixture_weights: weights {list(weights.shape)} for {len(names)} heads ({', '.join(names)}); expected one "
            "for each"
        )
    total = weights.sum(-1, keepdim=True)
    if not bool((weights >= 0).all() and (total > 0).all() and total.isfinite().all()):
        raise ValueError(
            f"mixture_weights: the heads {', '.join(names)} have weights {weights.flatten()[: len(names)].tolist()}; "
            "expected finite numbers of at least 0, and one above 0"
        )
    return weights / total


class LinearHeads(nn.Module):
    """`H` linear layers in the place of one, for the output layer of a language model or of an action policy.

    It reads the weights where `MultiHead` does, behind the features; being linear, it multiplies a row by one matrix,
    however many heads there are, where `MultiHead` asks all heads.

    Of features with weights behind them, `[..., D + H]`, it gives for every row the mixture of the layers' outputs
    under the row's own weights, and a layer of weight 0 gets no gradient from the row. Of plain features `[..., D]` it
    gives the mixture in force, see `mixed`. Because the layers are linear, a mixture is one layer, see `merge`; of
    logits, it is the geometric mean of the layers' distributions, renormalised.

    A state of a single layer loads into all of them.
    """

    def __init__(self, layer: nn.Linear, names: Sequence[str], *, noise: float = 0.0) -> None:
        """Make the layers, each a copy of one.

        Args:
            layer: where all of them start. Its weights are copied, so that heads of a model with tied embeddings are
                not tied.
            names: of the heads, unique.
            noise: deviation of normal noise on every head's weights, which has a seed of its own for each.

        Raises:
            ValueError: no names, or one that is there twice; a deviation below 0.
        """
        super().__init__()
        if isinstance(names, str) or not names or len(set(names)) < len(names):
            raise ValueError(f"LinearHeads: names is {names!r}; expected a list of different names, one for each head")
        if noise < 0:
            raise ValueError(f"LinearHeads: noise is {noise}, expected at least 0")
        self.names, self.width, self.noise = tuple(names), layer.in_features, noise
        self.heads = nn.ModuleList(self._copy(layer, place) for place in range(len(names)))
        self._in_force: tuple[Tensor, Tensor | None] | None = None
        self.register_load_state_dict_pre_hook(_from_one)

    def _copy(self, layer: nn.Linear, place: int) -> nn.Linear:
        copied = _linear(layer.weight.detach().clone(), None if layer.bias is None else layer.bias.detach().clone())
        copied.weight.data = self.disturbed(copied.weight.data, place)
        return copied

    def disturbed(self, weight: Tensor, place: int) -> Tensor:
        """A weight with the noise that a head starts with."""
        if not self.noise:
            return weight
        rng = torch.Generator().manual_seed(_NOISE_SEED + 100 * place)
        drawn = torch.randn(weight.shape, generator=rng)
        return weight + self.noise * drawn.to(weight)

    def forward(self, features: Tensor) -> Tensor:
        """`[..., V]` of features `[..., D]` or `[..., D + H]`, see above.

        Raises:
            ValueError: another number of features, or weights that `mixture_weights` refuses.
        """
        if features.shape[-1] == self.width:
            return product(features, *self._mixture())
        if features.shape[-1] != self.width + len(self.names):
            raise ValueError(
                f"LinearHeads: features {list(features.shape)}; expected {self.width} in the last dimension, or "
                f"{self.width} and a weight for each of the heads {', '.join(self.names)}"
            )
        rows = features.flatten(0, -2)
        found = self._by_row(rows[:, : self.width], rows[:, self.width :])
        return found.unflatten(0, features.shape[:-1])

    def _by_row(self, features: Tensor, weights: Tensor) -> Tensor:
        """`[R, V]`: rows of equal weights together."""
        distinct, place = mixture_weights(weights, self.names).unique(dim=0, return_inverse=True)
        if len(distinct) == 1:
            return product(features, *self._merged(distinct[0]))
        order = place.argsort(stable=True)
        parts = features.index_select(0, order).split(place.bincount(minlength=len(distinct)).tolist())
        outputs = [product(part, *self._merged(row)) for part, row in zip(parts, distinct, strict=True)]
        return torch.cat(outputs).index_select(0, order.argsort())

    def _mixture(self) -> tuple[Tensor, Tensor | None]:
        return self._merged(torch.ones(len(self.names))) if self._in_force is None else self._in_force

    def _merged(self, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight `[V, D]` and bias `[V]` of a mixture, with gradients into the heads that have a part in it."""
        shares = mixture_weights(weights.float(), self.names).tolist()
        used = [(share, cast(nn.Linear, head)) for share, head in zip(shares, self.heads, strict=True) if share > 0]
        if len(used) == 1:
            return used[0][1].weight, used[0][1].bias
        weight = reduce(add, [share * head.weight for share, head in used])
        without = used[0][1].bias is None
        return weight, None if without else reduce(add, [share * head.bias for share, head in used])

    @contextmanager
    def mixed(self, weights: Tensor) -> Iterator[None]:
        """Plain features get the mixture under weights `[H]` while in this context; one product, and no gradient."""
        before = self._in_force
        with torch.no_grad():
            self._in_force = self._merged(weights)
        try:
            yield
        finally:
            self._in_force = before

    @torch.no_grad()
    def merge(self, weights: Tensor) -> nn.Linear:
        """The mixture under weights `[H]` as one layer, a copy."""
        weight, bias = self._merged(weights)
        return _linear(weight.clone(), None if bias is None else bias.clone())

    def extra_repr(self) -> str:
        """Names, for `repr` and the run's configuration."""
        return f"names={list(self.names)}, noise={self.noise}"


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer of given weights, without drawing others first."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


def _from_one(layer: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take a single layer's weights for every head's."""
    for name in ("weight", "bias"):
        single = state.pop(prefix + name, None)
        if single is not None:
            for place in range(len(layer.heads)):
                value = layer.disturbed(single, place) if name == "weight" else single
                state[f"{prefix}heads.{place}.{name}"] = value
