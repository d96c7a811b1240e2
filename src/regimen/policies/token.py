"""Language models as policies: a token is a decision step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from regimen.functions.categorical import token_logprob
from regimen.knobs import Knob
from regimen.models.causal_lm import CausalLM
from regimen.policies.decoding import Completions, Sampling, decode
from regimen.policies.stopping import StopAt
from regimen.rollout import Rollout

Processor = Callable[[TensorDict], dict[str, Tensor]]
"""Contexts to what a vision-language model reads beside tokens, each `[B, n, ...]`: see `regimen.policies.vision`."""


@dataclass(frozen=True)
class TokenSteps:
    """The distribution over the next token at every recorded step (a `StepDistribution`).

    Attributes:
        where: bool `[B, T]`, the `R` steps that are described, in row order.
        tokens: int64 `[R]`, what was taken.
        states: `[B, T, D]`, the hidden state from which each step's token was predicted (0 at the first).
        temperature: `[R]`, under which it was sampled.
        kept: int64 `[R]`, size of the support if the sampler was truncated.
        network: gives logits.
        heads: further heads by name, see `head`.
    """

    where: Tensor
    tokens: Tensor
    states: Tensor
    temperature: Tensor
    kept: Tensor | None
    network: CausalLM
    heads: Mapping[str, nn.Module]

    @property
    def hidden(self) -> Tensor:
        """`[B, T, D]`, hidden states, for critics and other heads."""
        return self.states

    def head(self, name: str) -> Tensor:
        """What a further head of the policy makes of the hidden states, `[B, T, ...]`; `KeyError` if there is none."""
        if name not in self.heads:
            raise KeyError(f"the policy has no head '{name}'; it has: {', '.join(self.heads) or 'none'}")
        found: Tensor = self.heads[name](self.states)
        return found

    @cached_property
    def logits(self) -> Tensor:
        """`[R, V]`, after the temperature and before any truncation."""
        return self.network.logits(self.states[self.where]) / self.temperature[:, None]

    @cached_property
    def logprob(self) -> Tensor:
        """`[B, T]`, of the tokens taken, under the distribution that they were sampled from."""
        return self._spread(token_logprob(self.logits, self.tokens, self.kept))

    def entropy(self) -> Tensor:
        """`[B, T]`, in nats, of the distribution before truncation."""
        logp = self.logits.log_softmax(-1)
        return self._spread(-(logp.exp() * logp).sum(-1))

    def kl(self, other: TokenSteps, estimator: str = "exact") -> Tensor:
        """`[B, T]`, KL(self || other) over the whole vocabulary, before truncation.

        Raises:
            ValueError: an estimator other than `"exact"`.
        """
        if estimator != "exact":
            raise ValueError(f"KL estimator '{estimator}' is not known to a token policy; expected exact, k1, k2 or k3")
        mine, theirs = self.logits.log_softmax(-1), other.logits.log_softmax(-1)
        return self._spread((mine.exp() * (mine - theirs)).sum(-1))

    def _spread(self, values: Tensor) -> Tensor:
        return torch.zeros(self.where.shape, device=values.device).masked_scatter(self.where, values)


class TokenPolicy(nn.Module):
    """A causal language model as a policy.

    A sample is one sequence: the prompt's tokens, then the policy's own; `actions [B, T]` holds them, `mask` all of
    them, `loss_mask` the policy's own. Padding stands at the end only. Columns are `text`, what the policy said, and
    `truncated`, whether it was cut off. A context has a `prompt` (a text), and may have a `prefix` with which the
    answer is made to begin, and whatever the `processor` reads.

    Optional columns of a rollout change how it is scored: `visible` bool `[B, T, T]`, which token sees which (in place
    of the causal mask), and `positions` int64 `[B, T]`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        chat: bool = False,
        system: str | None = None,
        stop: Sequence[str] = (),
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        evaluation_temperature: float = 0.0,
        processor: Processor | None = None,
        heads: Mapping[str, nn.Module] | None = None,
    ) -> None:
        """Make a policy of a model and its tokenizer.

        Args:
            model: a `transformers` causal language model, or a `CausalLM` (with adapters, say).
            tokenizer: of `transformers`, with an end-of-text token.
            chat: prompts are a user's messages under the tokenizer's chat template.
            system: the system message that goes before them.
            stop: texts that end an answer, beside the end-of-text token; they stay part of it.
            max_new_tokens, temperature, top_k, top_p: defaults of the knobs of the same names.
            evaluation_temperature: 0 takes the likeliest token.
            processor: for images, see `regimen.policies.vision`.
            heads: further heads on the hidden states, for objectives that need them.

        Raises:
            ValueError: the tokenizer has no end-of-text token, or no chat template where one is asked for.
        """
        super().__init__()
        if tokenizer.eos_token_id is None:
            raise ValueError("TokenPolicy: the tokenizer has no eos_token, so no answer could end; set one")
        if chat and not tokenizer.chat_template:
            raise ValueError("TokenPolicy: chat=True, but the tokenizer has no chat_template; set one, or chat=False")
        self.network = model if isinstance(model, CausalLM) else CausalLM(model)
        self.heads = nn.ModuleDict(dict(heads or {}))
        self.tokenizer, self.chat, self.system, self.processor = tokenizer, chat, system, processor
        self.stop = StopAt(tokenizer, stop)
        self.knobs = (
            Knob("temperature", temperature, 0.0, evaluation=evaluation_temperature, doc="divides the logits"),
            Knob("top_k", top_k, 0, integer=True, doc="keep at most so many tokens; 0 for all"),
            Knob("top_p", top_p, 1e-6, 1.0, doc="keep tokens up to this probability"),
            Knob("max_new_tokens", max_new_tokens, 1, integer=True, doc="longest answer"),
        )
        self.version = 0

    @classmethod
    def from_pretrained(cls, path: Path | str, *, lora_rank: int | None = None, **settings: Any) -> Self:
        """A policy from a folder or a name on the Hugging Face hub; with LoRA adapters (extra `peft`) if given a rank."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        network = CausalLM(AutoModelForCausalLM.from_pretrained(path))
        if lora_rank is not None:
            network.lora(lora_rank, 2.0 * lora_rank)
        return cls(network, AutoTokenizer.from_pretrained(path), **settings)

    def save_pretrained(self, path: Path | str) -> None:
        """Model (or adapters) and tokenizer as `transformers` and `peft` store them."""
        self.network.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)

    @property
    def device(self) -> torch.device:
        """Where the policy's weights are."""
        return next(self.network.parameters()).device

    def encode(self, prompt: str) -> Tensor:
        """int64 `[L]`, the tokens that the model is shown for a prompt.

        Raises:
            ValueError: it has none.
        """
        if self.chat:
            messages = [{"role": "system", "content": self.system}] if self.system else []
            messages.append({"role": "user", "content": prompt})
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = self.tokenizer(prompt)["input_ids"]
        if not ids:
            raise ValueError(f"TokenPolicy: prompt {prompt!r:.60} has no tokens; a prompt needs at least one")
        return torch.tensor(ids, dtype=torch.int64)

    def encode_answer(self, text: str) -> Tensor:
        """int64 `[L]`, the tokens of a part of an answer, without special tokens around it."""
        return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)

    @torch.no_grad()
    def sample(self, contexts: TensorDict, knobs: Mapping[str, float], rng: torch.Generator) -> Rollout:
        """One answer per context; log-probabilities only where `temperature` is above 0."""
        prompts = list(contexts["prompt"].tolist())
        images = None if self.processor is None else self.processor(contexts)
        known = {prompt: self.encode(prompt) for prompt in dict.fromkeys(prompts)}
        starts = [known[prompt] for prompt in prompts]
        if "prefix" in contexts.keys():  # noqa: SIM118
            prefixes = [self.encode_answer(prefix) for prefix in contexts["prefix"].tolist()]
        else:
            prefixes = [starts[0][:0]] * len(starts)
        answers = self.complete([torch.cat(pair) for pair in zip(starts, prefixes, strict=True)], knobs, rng, images)
        sequences = Sequences.of(starts, prefixes, answers)
        return Rollout.create(
            task="policy",
            group=torch.arange(len(prompts), device=self.device),
            context=contexts.to(self.device),
            knobs=knobs,
            columns={"text": self.decode(sequences.answer_tokens()), "truncated": ~answers.ended},
            version=torch.full((len(prompts),), self.version, device=self.device),
            **sequences.fields(scored=knobs["temperature"] > 0),
        )

    @torch.no_grad()
    def complete(
        self,
        starts: Sequence[Tensor],
        knobs: Mapping[str, float],
        rng: torch.Generator,
        images: Mapping[str, Tensor] | None = None,
    ) -> Completions:
        """Sample on from sequences of tokens, each int64 `[L]`; equal neighbours are read once.

        Raises:
            ValueError: a sequence and its continuation would not fit the model.
        """
        sampling = Sampling(
            knobs["temperature"], int(knobs["top_k"]), knobs["top_p"], int(knobs["max_new_tokens"])
        )  # fmt: skip
        self._check_room(max(len(start) for start in starts) + sampling.max_new_tokens)
        seeds = torch.randint(2**62, (len(starts),), generator=rng, device=rng.device).to(self.device)
        distinct, rows = _distinct(starts, images)
        shown = None if images is None else {name: value[distinct] for name, value in images.items()}
        return decode(
            self.network, [starts[i].to(self.device) for i in distinct], rows.to(self.device), sampling, self.stop,
            seeds, shown,
        )  # fmt: skip

    def decode(self, sequences: Sequence[Tensor]) -> list[str]:
        """The texts of token sequences, special tokens left out."""
        texts: list[str] = self.tokenizer.batch_decode([s.tolist() for s in sequences], skip_special_tokens=True)
        return texts

    def distribution(self, rollout: Rollout, where: Tensor | None = None) -> TokenSteps:
        """The distribution of the policy's own steps (`loss_mask`), among `where` if it is given.

        Raises:
            ValueError: the rollout was sampled at temperature 0, or an own step has nothing before it.
        """
        where = rollout.loss_mask if where is None else where & rollout.loss_mask
        temperature = rollout.knobs.get("temperature", torch.ones(len(rollout), device=self.device))
        if bool((temperature <= 0).any()):
            raise ValueError(
                "TokenPolicy.distribution: the rollout was sampled with knob temperature = 0 (the likeliest token), "
                "which has no log-probability; set temperature > 0 for training"
            )
        if bool(where[:, 0].any()):
            raise ValueError("TokenPolicy.distribution: the first token of a sequence cannot be the policy's own step")
        row, _ = where.nonzero(as_tuple=True)
        kept = None if rollout.observations is None else rollout.observations["kept"][where]
        return TokenSteps(
            where, rollout.actions[where], self._states(rollout), temperature[row], kept, self.network, dict(self.heads)
        )  # fmt: skip

    def _states(self, rollout: Rollout) -> Tensor:
        """`[B, T, D]`: the state before each token."""
        table = rollout.columns
        images = None if self.processor is None else self.processor(rollout.context)
        visible = table.get("visible", None)
        hidden = self.network.hidden(
            rollout.actions,
            mask=rollout.mask if images else None,
            visible=None if visible is None else visible & torch.ones_like(visible).tril(),
            positions=table.get("positions", None),
            images=images,
        )
        return torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], 1)

    def logprob(self, rollout: Rollout) -> Tensor:
        """Differentiable log-probability `[B, T]` of the policy's own tokens."""
        return self.distribution(rollout).logprob

    def demonstrations(self, prompts: Sequence[str], answers: Sequence[str], end: bool = True) -> TensorDict:
        """Answers that somebody else wrote, as rows for a `DatasetTask`: table `[N]` with the fields of a sample.

        Args:
            prompts, answers: texts.
            end: add the end-of-text token, which the policy then learns to give.
        """
        last = torch.tensor([self.tokenizer.eos_token_id] if end else [], dtype=torch.int64)
        starts = [self.encode(prompt) for prompt in prompts]
        bodies = [torch.cat([self.encode_answer(answer), last]) for answer in answers]
        lengths = torch.tensor([len(body) for body in bodies])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        tokens = nn.utils.rnn.pad_sequence(bodies, batch_first=True)
        done = Completions(tokens, mask, torch.zeros(mask.shape), None, torch.ones(len(bodies), dtype=torch.bool))
        fields = Sequences.of(starts, [starts[0][:0]] * len(starts), done).fields(scored=False)
        return TensorDict(fields, batch_size=[len(starts)])

    def reference(self) -> TokenPolicy:
        """A frozen policy with the present weights, or these weights with their adapters switched off."""
        if self.network.has_adapters:
            return _WithoutAdapters(self)
        return copy.deepcopy(self).requires_grad_(False).eval()

    def _check_room(self, tokens: int) -> None:
        limit = getattr(self.network.config, "max_position_embeddings", None)
        if limit is not None and tokens > limit:
            raise ValueError(
                f"TokenPolicy: a prompt and its answer may have {tokens} tokens, more than the {limit} of the model "
                "(max_position_embeddings); lower the knob max_new_tokens or shorten the prompt"
            )

    def extra_repr(self) -> str:
        """Settings, for `repr` and the run's configuration."""
        return f"chat={self.chat}, system={self.system!r}, stop={self.stop.texts}"


@dataclass(frozen=True)
class Sequences:
    """Prompts, forced prefixes and answers laid out in rows, with padding at the end only.

    Attributes:
        tokens: int64 `[B, T]`; mask: bool `[B, T]`; own: bool `[B, T]`, the policy's own steps.
        prompts: int64 `[B]`, lengths of the prompts.
        logprobs: `[B, T]`; kept: int64 `[B, T]` or `None`.
    """

    tokens: Tensor
    mask: Tensor
    own: Tensor
    prompts: Tensor
    logprobs: Tensor
    kept: Tensor | None

    @classmethod
    def of(cls, starts: Sequence[Tensor], prefixes: Sequence[Tensor], answers: Completions) -> Self:
        """Lay out `B` rows."""
        device = answers.tokens.device
        prompts = torch.tensor([len(start) for start in starts], device=device)
        given = prompts + torch.tensor([len(prefix) for prefix in prefixes], device=device)
        length = given + answers.mask.sum(1)
        place = torch.arange(int(length.max()), device=device)
        mask, first = place < length[:, None], place < given[:, None]
        own = mask & ~first
        tokens = torch.zeros(mask.shape, dtype=torch.int64, device=device)
        tokens[first] = torch.cat([x for pair in zip(starts, prefixes, strict=True) for x in pair]).to(device)
        tokens[own] = answers.tokens[answers.mask]
        logprobs = torch.zeros(mask.shape, device=device)
        logprobs[own] = answers.logprobs[answers.mask]
        kept = None
        if answers.kept is not None:
            kept = torch.zeros_like(tokens)
            kept[own] = answers.kept[answers.mask]
        return cls(tokens, mask, own, prompts, logprobs, kept)

    def answer_tokens(self) -> list[Tensor]:
        """What comes after each prompt, forced prefix included."""
        lengths = self.mask.sum(1).tolist()
        return [row[p:n] for row, p, n in zip(self.tokens, self.prompts.tolist(), lengths, strict=True)]

    def fields(self, scored: bool) -> dict[str, Any]:
        """The fields of a rollout."""
        found: dict[str, Any] = {"actions": self.tokens, "mask": self.mask, "loss_mask": self.own}
        if scored:
            found["logprobs"] = self.logprobs
        if scored and self.kept is not None:
            found["observations"] = {"kept": self.kept}
        return found


def _distinct(starts: Sequence[Tensor], images: Mapping[str, Tensor] | None) -> tuple[list[int], Tensor]:
    """The rows at which each distinct start comes first, and for every row which of those it is."""
    parts = [value.numpy(force=True) for value in (images or {}).values()]
    place: dict[bytes, int] = {}
    first, rows = list[int](), list[int]()
    for row, start in enumerate(starts):
        key = b"".join([start.numpy(force=True).tobytes(), *(part[row].tobytes() for part in parts)])
        if key not in place:
            place[key] = len(place)
            first.append(row)
        rows.append(place[key])
    return first, torch.tensor(rows)


class _WithoutAdapters(TokenPolicy):
    """A policy's base weights: the same network with its adapters off."""

    def __init__(self, policy: TokenPolicy) -> None:
        nn.Module.__init__(self)
        # A list keeps the policy out of this module's own parameters.
        self._policy = [policy]
        self.version = policy.version

    @property
    def device(self) -> torch.device:
        return self._policy[0].device

    def sample(self, contexts: TensorDict, knobs: Mapping[str, float], rng: torch.Generator) -> Rollout:
        policy = self._policy[0]
        with policy.network.adapters_disabled():
            return policy.sample(contexts, knobs, rng)

    def distribution(self, rollout: Rollout, where: Tensor | None = None) -> TokenSteps:
        policy = self._policy[0]
        with policy.network.adapters_disabled(), torch.no_grad():
            return policy.distribution(rollout, where)

    def reference(self) -> Self:
        return self
