"""Rated answers as preference pairs of several objectives, for a pre-trained language model with a head for each.

Records are in UltraFeedback's form: an instruction, and completions that are rated by several aspects.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from regimen.policies.multi_head import MultiHeadPolicy
from regimen.policies.token import TokenPolicy
from regimen.rollout import Rollout
from regimen.tasks.dataset import DatasetTask
from regimen.tasks.worlds.readers import rated_answers, ratings_of


@dataclass(frozen=True)
class TextPair:
    """Two answers to a prompt, and the number of the objective by which one is better."""

    prompt: str
    chosen: str
    rejected: str
    objective: int


def text_pairs(records: Sequence[Mapping[str, Any]], objectives: Sequence[str]) -> list[TextPair]:
    """Of every record and by every objective, the answer rated best and that rated worst, where they differ."""
    return [pair for record in records for pair in _pairs_of(record, objectives)]


def _pairs_of(record: Mapping[str, Any], objectives: Sequence[str]) -> Iterator[TextPair]:
    rated = [(answer["response"], ratings_of(answer, objectives)) for answer in record["completions"]]
    known = [(text, ratings) for text, ratings in rated if ratings is not None]
    for place in range(len(objectives) if known else 0):
        best, worst = (pick(known, key=lambda one: one[1][place]) for pick in (max, min))
        if best[1][place] > worst[1][place]:
            yield TextPair(record["instruction"], best[0], worst[0], place)


def pair_rows(policy: TokenPolicy, pairs: Sequence[TextPair]) -> TensorDict:
    """Rows for a `DatasetTask`: a pair each, with the column `objective` on both sides.

    Raises:
        ValueError: there are no pairs, or what `TokenPolicy.demonstrations` refuses.
    """
    if not pairs:
        raise ValueError("pair_rows: there are no pairs; give more records, or objectives by which answers differ")
    prompts, tag = [pair.prompt for pair in pairs], torch.tensor([pair.objective for pair in pairs])
    rejected = policy.demonstrations(prompts, [pair.rejected for pair in pairs])
    rejected.set("columns", TensorDict({"objective": tag}, batch_size=[len(pairs)]))
    return (
        policy.demonstrations(prompts, [pair.chosen for pair in pairs]).set("objective", tag).set("rejected", rejected)
    )


@dataclass(frozen=True)
class RatedAnswers:
    """A pre-trained model, and pairs to train it on and to try it on.

    Attributes:
        model: a folder, or a name on the Hugging Face hub.
        data: UltraFeedback by its name on the hub, or a file of JSON lines in its form.
        objectives: aspects by which answers are rated.
        records: how many prompts; held_out: the share of them, the last ones, that is not trained on.
        longest: tokens of a prompt with its answer; longer pairs are left out.
        lora_rank, dtype: of adapters, if there are any, and of the weights.
    """

    model: str
    data: str
    objectives: tuple[str, ...] = ("helpfulness", "honesty", "truthfulness")
    records: int = 10_000
    held_out: float = 0.05
    longest: int = 768
    lora_rank: int | None = None
    dtype: str = "bfloat16"

    def policy(self) -> TokenPolicy:
        """The model."""
        return TokenPolicy.from_pretrained(self.model, **self._settings())

    def multi_head(self) -> MultiHeadPolicy:
        """The model with a head for each objective."""
        return MultiHeadPolicy.from_pretrained(self.model, objectives=self.objectives, **self._settings())

    def _settings(self) -> dict[str, Any]:
        from transformers import AutoTokenizer

        chat = AutoTokenizer.from_pretrained(self.model).chat_template is not None
        options = {"dtype": getattr(torch, self.dtype)}
        return {"lora_rank": self.lora_rank, "options": options, "chat": chat, "evaluation_temperature": 1.0}

    @cached_property
    def _records(self) -> list[dict[str, Any]]:
        return rated_answers(self.data)[: self.records]

    def pairs(self, policy: TokenPolicy, held_out: bool = False) -> TensorDict:
        """Rows of pairs, see `pair_rows`."""
        cut = max(int(len(self._records) * (1 - self.held_out)), 1)
        found = text_pairs(self._records[cut:] if held_out else self._records[:cut], self.objectives)
        return pair_rows(policy, [pair for pair in found if self._fits(policy, pair)])

    def _fits(self, policy: TokenPolicy, pair: TextPair) -> bool:
        answer = max(len(policy.encode_answer(text)) for text in (pair.chosen, pair.rejected))
        return len(policy.encode(pair.prompt)) + answer < self.longest

    def training(self, policy: TokenPolicy) -> list[DatasetTask]:
        """A task for each objective, so that every iteration has as many pairs of each."""
        rows = self.pairs(policy)
        return [DatasetTask(name, rows[rows["objective"] == place]) for place, name in enumerate(self.objectives)]

    def answers(self, policy: TokenPolicy, evaluated: str) -> DatasetTask:
        """Held-out pairs, evaluated by which answers a member of the cast has come to prefer."""

        def measure(cast: Mapping[str, Any], rows: TensorDict) -> dict[str, float]:
            return {
                name: preferred(cast[evaluated], cast["policy"], rows[rows["objective"] == place])
                for place, name in enumerate(self.objectives)
            }

        return DatasetTask("answers", self.pairs(policy, held_out=True), evaluate=measure)


@torch.no_grad()
def preferred(policy: Any, reference: Any, rows: TensorDict, batch_size: int = 16) -> float:
    """Share of pairs whose chosen answer gained more over a reference than the rejected one; half of equal gains.

    The policy answers as it does when nobody says otherwise (of several heads, with equal weights).
    """
    gaps = [
        _gain(policy, reference, part) - _gain(policy, reference, part["rejected"]) for part in rows.split(batch_size)
    ]
    gap = torch.cat(gaps) if gaps else torch.zeros(1)
    return float(((gap > 0).double() + 0.5 * (gap == 0).double()).mean())


def _gain(policy: Any, reference: Any, rows: TensorDict) -> Tensor:
    fields = {name: rows[name] for name in ("actions", "mask", "loss_mask")}
    rollout = Rollout.create(task="pairs", group=torch.arange(len(rows)), **fields).to(policy.device)
    difference: Tensor = policy.distribution(rollout).logprob - reference.distribution(rollout).logprob
    return difference.sum(1).double().cpu()
