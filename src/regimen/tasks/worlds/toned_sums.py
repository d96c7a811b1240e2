"""Sums with a tone: two digits are added, and what is said after the digit is warm or short, which conflict.

A prompt is `"3 9"`; an answer is a digit (right if it is the sum modulo 10), any number of fillers `A` (warm) and `B`,
and the end. Objectives: `correct`, `warm` and `short`, each with a range of 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from regimen.models.small_decoder import small_decoder, word_tokenizer
from regimen.policies.multi_head import MultiHeadPolicy
from regimen.policies.token import TokenPolicy
from regimen.rollout import Rollout
from regimen.tasks.dataset import DatasetTask
from regimen.tasks.text import Row, TextEvaluator, TextPromptTask

OBJECTIVES = ("correct", "warm", "short")
LONGEST = 8
"""Tokens of an answer, its end included."""
_DIGITS = [str(digit) for digit in range(10)]


@dataclass(frozen=True)
class TonedSums:
    """Questions, noisy answers to them, and a small decoder that knows their words.

    Attributes:
        seed: of the answers, the decoder's weights, and of which questions are set apart.
        right: share of the noisy answers that are right; the others have one of the other digits.
        end: chance that a noisy answer ends after each of its words; else `A` and `B` are equally likely.
        layers, width: of the decoder.
    """

    seed: int
    right: float = 0.6
    end: float = 0.25
    layers: int = 2
    width: int = 64

    def _model(self) -> tuple[Any, Any]:
        tokenizer = word_tokenizer([*_DIGITS, "A", "B"])
        return small_decoder(
            len(tokenizer), dim=self.width, layers=self.layers, positions=32, seed=self.seed
        ), tokenizer

    def policy(self) -> TokenPolicy:
        """A decoder with random weights; it is evaluated as it samples, at temperature 1."""
        return TokenPolicy(*self._model(), max_new_tokens=LONGEST, evaluation_temperature=1.0)

    def multi_head(self) -> MultiHeadPolicy:
        """The same with a head for each objective."""
        return MultiHeadPolicy(*self._model(), OBJECTIVES, max_new_tokens=LONGEST, evaluation_temperature=1.0)

    def rows(self) -> list[Row]:
        """All hundred questions with their answers, in an order of the seed's."""
        found: list[Row] = [{"question": f"{a} {b}", "answer": str((a + b) % 10)} for a in range(10) for b in range(10)]
        Random(self.seed).shuffle(found)
        return found

    def demonstrations(self, policy: TokenPolicy, count: int) -> DatasetTask:
        """Noisy answers to questions at random."""
        random, rows = Random(self.seed), self.rows()
        asked = [random.choice(rows) for _ in range(count)]
        answers = [self._noisy(str(row["answer"]), random) for row in asked]
        return DatasetTask("demonstrations", policy.demonstrations([str(row["question"]) for row in asked], answers))

    def _noisy(self, answer: str, random: Random) -> str:
        digit = answer if random.random() < self.right else random.choice([d for d in _DIGITS if d != answer])
        words = [digit]
        while len(words) < LONGEST and random.random() >= self.end:
            words.append(random.choice("AB"))
        return " ".join(words)

    def questions(
        self,
        name: str,
        rows: Sequence[Row] | None = None,
        *,
        group_size: int = 1,
        evaluated: str | None = None,
        knobs: Mapping[str, float] | None = None,
        answers: int = 1000,
    ) -> TextPromptTask:
        """Questions to the policy.

        Args:
            name: of the task.
            rows: all of them by default.
            group_size: answers to each.
            evaluated: a member of the cast, of which `answers` answers are measured by all objectives.
            knobs: values that hold while it is.
            answers: how many, every question as often as another.
        """
        rows = self.rows() if rows is None else rows
        asked = list(rows) * max(answers // len(rows), 1)
        measure = TextEvaluator(asked, "{question}", MEASURES, knobs=knobs, batch_size=1000) if evaluated else None
        return TextPromptTask(name, rows, order="random", group_size=group_size, evaluate=measure, evaluated=evaluated)


def correct(rollout: Rollout) -> Tensor:
    """`[B]`, 1 where the first word is the answer."""
    pairs = zip(_words(rollout), rollout["answer"].tolist(), strict=True)
    return _numbers([float(words[:1] == [answer]) for words, answer in pairs], rollout)


def warm(rollout: Rollout) -> Tensor:
    """`[B]`, words `A` in eighths."""
    return _numbers([words.count("A") / LONGEST for words in _words(rollout)], rollout)


def short(rollout: Rollout) -> Tensor:
    """`[B]`, minus the words in eighths."""
    return _numbers([-len(words) / LONGEST for words in _words(rollout)], rollout)


MEASURES = {"correct": correct, "warm": warm, "short": short}


def _words(rollout: Rollout) -> list[list[str]]:
    return [text.split() for text in rollout["text"].tolist()]


def _numbers(values: list[float], rollout: Rollout) -> Tensor:
    return torch.tensor(values, device=rollout.mask.device)
