"""Acting for a stretch of steps: what is settled before the first, and what waits until after the last."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from regimen.models.dense import Dense, product
from regimen.models.torsos import MLPTorso, Observations
from regimen.policies.distributions import ActionDistribution


@dataclass(frozen=True)
class Acted:
    """What a policy does in one step of `N` copies.

    Attributes:
        actions: `[N, ...]`.
        logprobs: `[N]`; none at temperature 0, or of a deterministic policy.
        memory: `[N, ...]`, what a policy with memory keeps for its next step.
        described: what the actions were drawn from, in the place of `logprobs`: see `logprobs_of`.
    """

    actions: Tensor
    logprobs: Tensor | None = None
    memory: Tensor | None = None
    described: ActionDistribution | None = None


@runtime_checkable
class Actor(Protocol):
    """A policy that acts step by step."""

    def act(
        self,
        observations: Observations,
        memory: Tensor | None,
        begins: Tensor,
        knobs: Mapping[str, float],
        rng: torch.Generator,
    ) -> Acted:
        """One action for each of `N` copies; see `ActionPolicy.act`."""
        ...


Act: TypeAlias = Callable[[Observations, Tensor | None, Tensor], Acted]
"""`Actor.act` under knobs and with a random stream that are settled."""


def logprobs_of(steps: Sequence[Acted], device: torch.device) -> Tensor | None:
    """Log-probabilities `[N, T]` of the actions of `T` steps, those that wait all at once, on their policy's device."""
    described = [step.described for step in steps if step.described is not None]
    if described:
        actions = torch.cat([step.actions for step in steps]).to(device)
        return described[0].cat(described).logprob(actions).view(len(steps), -1).t()
    known = [step.logprobs for step in steps if step.logprobs is not None]
    return torch.stack(known, 1) if known else None


def unwrapped(module: nn.Module) -> Callable[[Any], Tensor]:
    """A module as functions that are called one after the other, with its present weights; to the same numbers.

    On the few rows of a step, calling a module costs as much as its arithmetic. Modules that are not known here, or
    that something watches, are called as they are.
    """
    functions = list(_functions(module))

    def network(rows: Any) -> Tensor:
        for function in functions:
            rows = function(rows)
        return cast(Tensor, rows)

    return network


def _functions(module: nn.Module) -> list[Callable[[Any], Any]]:
    kind, watched = type(module), bool(module._forward_hooks or module._forward_pre_hooks)
    if watched or kind not in (Dense, nn.Linear, nn.Tanh, nn.ReLU, nn.Sequential, MLPTorso):
        return [module]
    if isinstance(module, nn.Linear):
        return [partial(product if kind is Dense else linear, weight=module.weight, bias=module.bias)]
    if isinstance(module, nn.Sequential):
        return [function for layer in module for function in _functions(layer)]
    if isinstance(module, MLPTorso):
        return [module.as_rows, *_functions(module.layers)]
    return [torch.tanh if kind is nn.Tanh else torch.relu]
