"""A language model with a head for each objective: trained head by head, mixed by weights when it is asked."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from regimen.knobs import Knob
from regimen.models.causal_lm import CausalLM
from regimen.models.linear_heads import LinearHeads, mixture_weights
from regimen.policies.decoding import Completions
from regimen.policies.token import TokenPolicy
from regimen.policies.token_steps import TokenSteps
from regimen.rollout import Rollout


@dataclass(frozen=True)
class MultiHeadSteps(TokenSteps):
    """The distribution over the next token, whose states have the weights of `heads_count` heads behind them.

    Attributes:
        heads_count: `H`; states are `[R, D + H]`.
    """

    heads_count: int

    @cached_property
    def hidden(self) -> Tensor:
        """`[B, T, D]`, the state before each step."""
        return self.steps.spread(self.states[:, : -self.heads_count])


class MultiHeadPolicy(TokenPolicy):
    """A `TokenPolicy` whose output layer is a `LinearHeads`: a head for each of several objectives.

    It samples from the mixture of heads under the knobs `head/<objective>`, whose scale does not matter: equal weights
    by default, one of them alone, or whatever a user wants. Head `i` alone is what it is scored under where the
    rollout's column `objective` says `i` (int64 `[B]`); without that column it is scored under the weights with which
    it was sampled. So preference pairs that are tagged with an objective train that objective's head and the network
    under all heads, and nothing else.

    Source: arXiv 2510.01167, section 3 (MAH-DPO).
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        objectives: Sequence[str],
        *,
        column: str = "objective",
        head_noise: float = 0.0,
        **settings: Any,
    ) -> None:
        """Take a model, whose output layer is replaced.

        Args:
            model, tokenizer, settings: of `TokenPolicy`. A model that is to have adapters has them already.
            objectives: names of the heads.
            column: which says whose head scores a sample.
            head_noise: see `LinearHeads`. A reference must have the same noise: take a copy of this policy, or record
                its log-probabilities.

        Raises:
            ValueError: the output layer is not a linear one.
        """
        super().__init__(model, tokenizer, **settings)
        base = self.network.base
        layer = base.get_output_embeddings()
        if type(layer) is not nn.Linear:
            raise ValueError(
                f"MultiHeadPolicy: the output layer of {type(base).__name__} is a {type(layer).__name__}; expected a "
                "plain nn.Linear, so give a model without adapters or heads there"
            )
        _put_output(base, LinearHeads(layer, objectives, noise=head_noise))
        self.objectives, self.column = tuple(objectives), column
        heads = (Knob(self.knob(name), 1.0, low=0.0, doc="share of a head") for name in self.objectives)
        self.knobs = (*self.knobs, *heads)

    @classmethod
    def from_pretrained(
        cls,
        path: Path | str,
        objectives: Sequence[str] = (),
        *,
        lora_rank: int | None = None,
        options: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> Self:
        """A policy from a folder or a name on the hub, see `TokenPolicy.from_pretrained`."""
        return super().from_pretrained(path, lora_rank=lora_rank, options=options, objectives=objectives, **settings)

    @staticmethod
    def knob(objective: str) -> str:
        """The knob that weights an objective's head."""
        return f"head/{objective}"

    @property
    def output(self) -> LinearHeads:
        """The heads."""
        layer: LinearHeads = self.network.base.get_output_embeddings()
        return layer

    @torch.no_grad()
    def complete(
        self,
        starts: Sequence[Tensor],
        knobs: Mapping[str, float],
        rng: torch.Generator,
        images: Mapping[str, Tensor] | None = None,
    ) -> Completions:
        """Sample on from sequences of tokens, from the mixture of heads under the knobs."""
        with self.output.mixed(torch.tensor([knobs[self.knob(name)] for name in self.objectives])):
            return super().complete(starts, knobs, rng, images)

    def distribution(self, rollout: Rollout, where: Tensor | None = None) -> MultiHeadSteps:
        """The distribution at the policy's own steps, under each sample's head or mixture of heads.

        Raises:
            ValueError: as for `TokenPolicy`; a sample's objective has no head, or its weights are all 0.
        """
        found = super().distribution(rollout, where)
        weights = found.steps.of_rows(self.weights(rollout)).to(found.states.dtype)
        there = {field.name: getattr(found, field.name) for field in fields(found)}
        there["states"] = torch.cat([found.states, weights], -1)
        return MultiHeadSteps(**there, heads_count=len(self.objectives))

    def weights(self, rollout: Rollout) -> Tensor:
        """`[B, H]` with sum 1: under which weights of the heads each sample is scored."""
        objective = rollout.get(self.column)
        if objective is not None:
            return self._one_head(objective)
        absent = [name for name in self.objectives if rollout.knob(self.knob(name)) is None]
        if len(absent) == len(self.objectives):
            return torch.full((len(rollout), len(absent)), 1 / len(absent), device=rollout.mask.device)
        if absent:
            raise ValueError(f"MultiHeadPolicy: the rollout was sampled without the knob '{self.knob(absent[0])}'")
        columns = [rollout.knob(self.knob(name)) for name in self.objectives]
        return mixture_weights(torch.stack([c for c in columns if c is not None], -1), self.objectives)

    def _one_head(self, objective: Tensor) -> Tensor:
        count = len(self.objectives)
        if objective.is_floating_point() or bool(((objective < 0) | (objective >= count)).any()):
            raise ValueError(
                f"MultiHeadPolicy: the column '{self.column}' holds {objective.unique().tolist()[:5]}; expected whole "
                f"numbers from 0 to {count - 1}, for the heads {', '.join(self.objectives)}"
            )
        return one_hot(objective, count).float()

    def merged(self, weights: Mapping[str, float]) -> CausalLM:
        """A copy of the model with one output layer, the mixture under some weights (0 where none is given).

        Raises:
            ValueError: a weight of something that is no objective, or weights that `mixture_weights` refuses.
        """
        if unknown := sorted(set(weights) - set(self.objectives)):
            raise ValueError(
                f"MultiHeadPolicy: there is no head '{unknown[0]}'; there are: {', '.join(self.objectives)}"
            )
        output, base = self.output, self.network.base
        layer = output.merge(torch.tensor([float(weights.get(name, 0.0)) for name in self.objectives]))
        base.set_output_embeddings(layer)
        try:
            return CausalLM(copy.deepcopy(self.network.model))
        finally:
            base.set_output_embeddings(output)

    def save_pretrained(self, path: Path | str) -> None:
        """Not for several heads: `merged(weights).model.save_pretrained(path)` stores a mixture."""
        raise NotImplementedError(
            "MultiHeadPolicy.save_pretrained: transformers has no model with several output layers; store a mixture by "
            "merged(weights).model.save_pretrained(path), or all heads by their state_dict"
        )

    def reference(self) -> TokenPolicy:
        """A frozen copy, adapters and heads as they are now."""
        return copy.deepcopy(self).requires_grad_(False).eval()


def _put_output(base: Any, layer: nn.Module) -> None:
    """Put a layer in the place of a model's output layer, which is then tied to nothing."""
    base.set_output_embeddings(layer)
    for config in (base.config, base.config.get_text_config()):
        config.tie_word_embeddings = False
