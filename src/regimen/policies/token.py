"""Language models as policies: a token is a decision step."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from regimen.knobs import Knob
from regimen.models.causal_lm import CausalLM
from regimen.policies.decoding import Completions, Sampling, decode
from regimen.policies.reading import states_before
from regimen.policies.sequences import Sequences
from regimen.policies.stopping import StopAt
from regimen.policies.token_steps import TokenSteps
from regimen.policies.vision import Processor, expand_placeholders
from regimen.policies.without_adapters import WithoutAdapters
from regimen.rollout import Rollout, Steps

# Stands for an answer while a chat template is read; templates pass private characters on.
_ANSWER = "\ue000answer\ue001"


class TokenPolicy(nn.Module):
    """A causal language model as a policy.

    A sample is one sequence: the prompt's tokens, then the policy's own; `actions [B, T]` holds them, `mask` all of
    them, `loss_mask` the policy's own. Padding stands at the end only. Columns are `text`, what the policy said, and
    `truncated`, whether it was cut off. A context has a `prompt` (a text), and may have a `prefix` with which the
    answer is made to begin, and whatever the `processor` reads.

    A rollout is scored under the temperature and the truncation that it was sampled with; one without recorded
    log-probabilities (somebody's answers, or the likeliest tokens at temperature 0) at temperature 1. Optional columns
    per step change how it is scored: `visible` bool `[B, T, T]`, which token may see which of those before it, and
    `positions` int64 `[B, T]`.
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
            ValueError: the tokenizer has no end-of-text token, or no chat template where one is asked for, or there
                is a system message without chat.
        """
        super().__init__()
        if tokenizer.eos_token_id is None:
            raise ValueError("TokenPolicy: the tokenizer has no eos_token, so no answer could end; set one")
        if chat and not tokenizer.chat_template:
            raise ValueError("TokenPolicy: chat=True, but the tokenizer has no chat_template; set one, or chat=False")
        if system is not None and not chat:
            raise ValueError("TokenPolicy: system is given, which only a chat template has a place for; set chat=True")
        self.network = model if isinstance(model, CausalLM) else CausalLM(model)
        self.heads = nn.ModuleDict(dict(heads or {}))
        self.tokenizer, self.chat, self.system, self.processor = tokenizer, chat, system, processor
        self.stop = StopAt(tokenizer, stop, _further_ends(self.network.base, tokenizer.eos_token_id))
        self.knobs: tuple[Knob, ...] = (
            Knob("temperature", temperature, 0.0, evaluation=evaluation_temperature, doc="divides the logits"),
            Knob("top_k", top_k, 0, integer=True, doc="keep at most so many tokens; 0 for all"),
            Knob("top_p", top_p, 1e-6, 1.0, doc="keep tokens up to this probability"),
            Knob("max_new_tokens", max_new_tokens, 1, integer=True, doc="longest answer"),
        )
        self.version = 0

    @classmethod
    def from_pretrained(
        cls,
        path: Path | str,
        *,
        lora_rank: int | None = None,
        options: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> Self:
        """A policy from a folder (of a model or of adapters) or a name on the Hugging Face hub.

        Args:
            path: folder or name.
            lora_rank, options: see `CausalLM.from_pretrained`.
            settings: of the policy. One that is shown images needs a `processor` too.
        """
        from transformers import AutoTokenizer

        network = CausalLM.from_pretrained(path, lora_rank=lora_rank, **(options or {}))
        return cls(network, AutoTokenizer.from_pretrained(path), **settings)

    def save_pretrained(self, path: Path | str) -> None:
        """Model (or adapters), tokenizer and image processor, as `transformers` and `peft` store them; no heads."""
        self.network.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)
        if self.processor is not None:
            self.processor.save_pretrained(path)

    @property
    def device(self) -> torch.device:
        """Where the policy's weights are."""
        return next(self.network.parameters()).device

    def encode(self, prompt: str) -> Tensor:
        """int64 `[L]`, the tokens that the model is shown for a prompt; an image is a single placeholder.

        Raises:
            ValueError: it has none.
        """
        text = prompt if self.processor is None else self.processor.mark(prompt)
        if self.chat:
            messages = [{"role": "system", "content": self.system}] if self.system else []
            messages.append({"role": "user", "content": text})
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = self.tokenizer(text, add_special_tokens=not self.chat)["input_ids"]
        if not ids:
            raise ValueError(f"TokenPolicy: prompt {prompt!r:.60} has no tokens; a prompt needs at least one")
        return torch.tensor(ids, dtype=torch.int64)

    def _starts(self, prompts: Sequence[str], images: dict[str, Tensor] | None) -> list[Tensor]:
        """The tokens of prompts, each text encoded once, with as many placeholders as the images have tokens."""
        known = {prompt: self.encode(prompt) for prompt in dict.fromkeys(prompts)}
        starts = [known[prompt] for prompt in prompts]
        if self.processor is None or images is None:
            return starts
        placeholder, counts = self.network.base.config.image_token_id, self.processor.counts(images).cpu()
        return [expand_placeholders(start, placeholder, count) for start, count in zip(starts, counts, strict=True)]

    def encode_answer(self, text: str) -> Tensor:
        """int64 `[L]`, the tokens of a part of an answer, without special tokens around it."""
        return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)

    def encode_reply(self, text: str, after: Tensor, role: str = "user") -> Tensor:
        """int64 `[L]`, the tokens of somebody else's turn, up to where the policy speaks again.

        Args:
            text: what was said.
            after: int64 `[A]`, the turn of the policy before it; the chat template does not end it a second time.
            role: of the speaker, in the chat template.

        Raises:
            ValueError: the chat template does not show an answer as it is.
        """
        if not self.chat:
            return self.encode_answer(text)
        turns = [("user", "?"), ("assistant", _ANSWER), (role, text)]
        messages = [{"role": speaker, "content": content} for speaker, content in turns]
        shown = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        _, answer, glue = shown.partition(_ANSWER)
        if not answer:
            raise ValueError("TokenPolicy: the chat template hides or changes the assistant's message; mend it")
        if len(after) and int(after[-1]) in self.stop.ends:
            before, _, rest = glue.partition(self.tokenizer.decode(after[-1:]))
            glue = glue if before.strip() else rest
        return self.encode_answer(glue)

    @torch.no_grad()
    def sample(self, contexts: TensorDict, knobs: Mapping[str, float], rng: torch.Generator) -> Rollout:
        """One answer per context; log-probabilities only where `temperature` is above 0."""
        prompts = list(contexts["prompt"].tolist())
        images = None if self.processor is None else self.processor(contexts)
        starts = self._starts(prompts, images)
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
        """Sample on from sequences of tokens, each int64 `[L]`; equal ones (with equal images) are read once.

        Raises:
            ValueError: a sequence and its continuation would not fit the model.
        """
        limit = int(knobs["max_new_tokens"])
        sampling = Sampling(knobs["temperature"], int(knobs["top_k"]), knobs["top_p"], limit)
        self._check_room(max(len(start) for start in starts) + sampling.max_new_tokens)
        seeds = torch.randint(2**62, (len(starts),), generator=rng, device=rng.device).to(self.device)
        distinct, rows = _distinct(starts, images)
        shown = None if images is None else {name: value[distinct].to(self.device) for name, value in images.items()}
        prompts = [starts[place] for place in distinct]
        return decode(self.network, prompts, rows.to(self.device), sampling, self.stop, seeds, shown)

    def decode(self, sequences: Sequence[Tensor]) -> list[str]:
        """The texts of token sequences, special tokens left out."""
        texts: list[str] = self.tokenizer.batch_decode([s.tolist() for s in sequences], skip_special_tokens=True)
        return texts

    def distribution(self, rollout: Rollout, where: Tensor | None = None) -> TokenSteps:
        """The distribution of the policy's own steps (`loss_mask`), among `where` if it is given.

        Raises:
            ValueError: an own step has nothing before it, or a sequence is longer than the model's.
        """
        where = rollout.loss_mask if where is None else where & rollout.loss_mask
        if bool(where[:, 0].any()):
            raise ValueError("TokenPolicy.distribution: the first token of a sequence cannot be the policy's own step")
        if rollout.get("positions") is None:
            self._check_room(rollout.steps)
        temperature = None if rollout.logprobs is None else rollout.knobs.get("temperature", None)
        if temperature is None:
            temperature = torch.ones(len(rollout), device=where.device)
        steps = Steps(where)
        kept = None if (sizes := rollout.get("kept")) is None else steps.of(sizes)
        images = None if self.processor is None else self.processor(rollout.context)
        return TokenSteps(
            steps, steps.of(rollout.actions), states_before(self.network, rollout, where, images),
            steps.of_rows(temperature), kept, self.network.logits, dict(self.heads),
        )  # fmt: skip

    def logprob(self, rollout: Rollout) -> Tensor:
        """Differentiable log-probability `[B, T]` of the policy's own tokens."""
        return self.distribution(rollout).logprob

    def demonstrations(
        self,
        prompts: Sequence[str],
        answers: Sequence[str],
        end: bool = True,
        context: TensorDict | None = None,
    ) -> TensorDict:
        """Answers that somebody else wrote, as rows for a `DatasetTask`: table `[N]` with the fields of a sample.

        Args:
            prompts, answers: texts.
            end: add the end-of-text token, which the policy then learns to give.
            context: table `[N]` of what the `processor` reads.

        Raises:
            ValueError: not as many answers as prompts, an answer without tokens, or a sequence longer than the
                model's.
        """
        if len(prompts) != len(answers):
            raise ValueError(f"demonstrations: {len(prompts)} prompts and {len(answers)} answers; expected one each")
        last = torch.tensor([self.tokenizer.eos_token_id] if end else [], dtype=torch.int64)
        images = None if self.processor is None else self.processor(TensorDict() if context is None else context)
        starts = self._starts(prompts, images)
        bodies = [torch.cat([self.encode_answer(answer), last]) for answer in answers]
        lengths = torch.tensor([len(body) for body in bodies])
        if not bool(lengths.all()):
            raise ValueError(f"demonstrations: answer {int(lengths.argmin())} has no tokens; give it one, or end=True")
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        tokens = nn.utils.rnn.pad_sequence(bodies, batch_first=True)
        done = Completions(tokens, mask, torch.zeros(mask.shape), None, torch.ones(len(bodies), dtype=torch.bool))
        fields = Sequences.of(starts, [starts[0][:0]] * len(starts), done).fields(scored=False)
        self._check_room(fields["actions"].shape[1])
        return TensorDict(fields | ({} if context is None else {"context": context}), batch_size=[len(starts)])

    def reference(self) -> TokenPolicy | WithoutAdapters:
        """A frozen policy with the present weights, or these weights with their adapters switched off."""
        if self.network.has_adapters:
            return WithoutAdapters(self)
        return copy.deepcopy(self).requires_grad_(False).eval()

    @property
    def longest(self) -> int | None:
        """Tokens that a sequence may have, if the model has a limit (`max_position_embeddings`)."""
        limit: int | None = getattr(self.network.config, "max_position_embeddings", None)
        return limit

    def _check_room(self, tokens: int) -> None:
        limit = self.longest
        if limit is not None and tokens > limit:
            raise ValueError(
                f"TokenPolicy: a prompt with its answer has up to {tokens} tokens, expected no more than the model's "
                f"{limit} (max_position_embeddings); lower the knob max_new_tokens, or shorten prompts and answers"
            )

    def extra_repr(self) -> str:
        """Settings, for `repr` and the run's configuration."""
        return f"chat={self.chat}, system={self.system!r}, stop={self.stop.texts}"


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


def _further_ends(model: Any, end: int) -> list[int]:
    """Tokens that end an answer beside the tokenizer's own, where the model's settings for generation name it too."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return named if isinstance(named, list) and end in named else []
