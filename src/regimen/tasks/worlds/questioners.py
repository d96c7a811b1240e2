"""Who plays twenty questions: small decoders, or pre-trained models, and the torsos of a critic that reads the game."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tensordict import TensorDict
from torch import nn

from regimen.models.causal_lm import CausalLM
from regimen.models.small_decoder import small_decoder, word_tokenizer
from regimen.models.text_torso import PooledTextTorso, TextTorso
from regimen.policies.token import TokenPolicy
from regimen.tasks.dialogue import DialogueTask
from regimen.tasks.partners import OneByOne
from regimen.tasks.scripted import scripted_dialogues
from regimen.tasks.worlds.twenty_questions import TwentyQuestions


@dataclass(frozen=True)
class Questioners:
    """A game of twenty questions, policies that play it, and what a critic of utterances reads with.

    Attributes:
        seed: of the demonstrations and of small decoders' weights.
        attributes, turns: of the game.
        model: of `transformers`, the policy; a small decoder that knows the game's words if empty.
        encoder: of `transformers`, the critic's, with a vocabulary of its own; a decoder like the policy if empty.
        dim, layers: of small decoders.
    """

    seed: int
    attributes: int = 3
    turns: int = 8
    model: str = ""
    encoder: str = ""
    dim: int = 64
    layers: int = 2

    @property
    def rules(self) -> TwentyQuestions:
        """Of the game."""
        return TwentyQuestions(self.attributes, self.turns)

    def policy(self) -> TokenPolicy:
        """Who asks; in evaluation it samples, as in training."""
        if self.model:
            return TokenPolicy.from_pretrained(self.model, max_new_tokens=8, evaluation_temperature=1.0)
        tokenizer = word_tokenizer(self.rules.words)
        decoder = small_decoder(
            len(tokenizer), dim=self.dim, layers=self.layers, positions=6 * self.turns + 4, seed=self.seed
        )
        return TokenPolicy(decoder, tokenizer, max_new_tokens=3, evaluation_temperature=1.0)

    def game(self, discount: float, evaluations: int) -> DialogueTask:
        """Games with objects at random; evaluation goes through all objects in turn."""
        return DialogueTask(
            "game",
            OneByOne(self.rules),
            max_turns=self.turns,
            discount=discount,
            evaluation=range(evaluations),
            facts=("valid",),
        )

    def demonstrations(self, policy: TokenPolicy, game: DialogueTask, count: int) -> TensorDict:
        """Dialogues of somebody who asks at random half of the time, see `TwentyQuestions.half_random`."""
        first = 1_000_003 * (self.seed + 1)
        starts = range(first, first + count)
        return scripted_dialogues(game, policy, self.rules.half_random, starts, self.seed)

    def torso(self, policy: TokenPolicy) -> nn.Module:
        """What a critic reads states and utterances with."""
        if not self.encoder:
            network = CausalLM(type(policy.network.base)(policy.network.base.config))
            return TextTorso(network)
        from transformers import AutoModel, AutoTokenizer

        encoder = AutoModel.from_pretrained(self.encoder)
        return PooledTextTorso(encoder, AutoTokenizer.from_pretrained(self.encoder), policy.tokenizer)

    def reads_like_policy(self, cast: Mapping[str, Any], tasks: Any, memory: Any) -> None:
        """A `Prepare` step: a critic's decoder begins with the policy's weights."""
        if not self.encoder:
            cast["critic"].state.network.load_state_dict(cast["policy"].network.state_dict())
