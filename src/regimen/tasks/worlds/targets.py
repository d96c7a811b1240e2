"""Target-making by a small decoder: four kinds of questions that share none, and demonstrations that are partly wrong.

A prompt is `"4 7 3 9 -> 1 7"`, its answer a postfix expression, `"4 7 + 3 - 9 +"`. Targets are written digit by digit,
so that a target that was never asked for has no unknown words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any, Literal

import torch
from torch import Tensor

from regimen.models.small_decoder import small_decoder, word_tokenizer
from regimen.policies.token import TokenPolicy
from regimen.rollout import Rollout
from regimen.tasks.base import Evaluation
from regimen.tasks.demonstrations import DemonstrationTask
from regimen.tasks.target_making import reaches_target, target_fault, target_making
from regimen.tasks.text import TextEvaluator, TextPromptTask

Split = Literal["train", "demonstrations", "validation", "test"]
Rows = list[dict[str, Any]]
# Shares of the different questions, from which to which.
_SPLITS: dict[Split, tuple[float, float]] = {
    "test": (0.0, 0.2),
    "validation": (0.2, 0.3),
    "demonstrations": (0.3, 0.6),
    "train": (0.6, 1.0),
}


@dataclass(frozen=True)
class TargetsWorld:
    """Questions in four disjoint splits, and a small decoder that knows their words.

    Two questions are the same if their numbers are, in any order, and their targets.

    Attributes:
        seed: of the questions, the demonstrations and the decoder's weights.
        numbers, largest, target: see `target_making`.
        unseen: targets that are never trained on.
        demonstrated: demonstrations.
        corrupted: share of them that are wrong: an operation is exchanged.
        dim, layers: of the decoder.
        max_new_tokens: longest answer.
        held_out: questions for evaluation, of each kind.
        drawn: questions that the splits are made of, equal ones included.
    """

    seed: int
    numbers: int = 4
    largest: int = 9
    target: tuple[int, int] = (10, 24)
    unseen: tuple[int, int] = (25, 30)
    operations: str = "+-"
    demonstrated: int = 2000
    corrupted: float = 0.25
    dim: int = 64
    layers: int = 2
    max_new_tokens: int = 10
    held_out: int = 200
    drawn: int = 12_000

    verifier = staticmethod(reaches_target)
    read_answer = None
    expected = "question"

    def policy(self) -> TokenPolicy:
        """A decoder with random weights."""
        tokenizer = word_tokenizer([*"0123456789", *self.operations, "->"])
        decoder = small_decoder(len(tokenizer), dim=self.dim, layers=self.layers, positions=64, seed=self.seed)
        return TokenPolicy(decoder, tokenizer, max_new_tokens=self.max_new_tokens)

    @cached_property
    def splits(self) -> dict[Split, Rows]:
        """Rows by split; a question is in one of them only, in whatever orders its numbers are given.

        Raises:
            ValueError: a split has fewer rows than are asked for.
        """
        rows = self._rows(self.target, self.drawn)
        kinds = sorted({same_question(row) for row in rows})
        Random(self.seed).shuffle(kinds)
        split_of: dict[tuple[str, ...], Split] = {}
        for split, (first, last) in _SPLITS.items():
            split_of |= dict.fromkeys(kinds[int(first * len(kinds)) : int(last * len(kinds))], split)
        found: dict[Split, Rows] = {split: [] for split in _SPLITS}
        for row in rows:
            found[split_of[same_question(row)]].append(row)
        found["test"] = _first(found["test"], self.held_out, "questions of the test")
        demonstrations = _first(found["demonstrations"], self.demonstrated, "demonstrations")
        wrong, random = int(self.corrupted * self.demonstrated), Random(self.seed)
        found["demonstrations"] = [
            corrupt(row, self.operations, random) if place < wrong else row for place, row in enumerate(demonstrations)
        ]
        return found

    @cached_property
    def _unseen(self) -> Rows:
        return self._rows(self.unseen, self.held_out)

    def _rows(self, target: tuple[int, int], drawn: int) -> Rows:
        """Different texts of questions, each with a solution, in an order that the seed decides."""
        rows = target_making(
            drawn, self.seed, numbers=self.numbers, largest=self.largest, target=target,
            operations=self.operations, notation="postfix",
        )  # fmt: skip
        return list({row["question"]: row for row in rows}.values())

    def questions(self, name: str, split: Split, group_size: int) -> TextPromptTask:
        """Questions of a split; those named "questions" are evaluated on held-out ones."""
        evaluate = self.evaluate if name == "questions" else None
        return TextPromptTask(name, self.splits[split], prompt, group_size=group_size, evaluate=evaluate)

    def demonstrations(self, name: str = "demonstrations") -> DemonstrationTask:
        """The demonstrations, some of them wrong."""
        return DemonstrationTask(name, self.splits["demonstrations"], prompt)

    def evaluate(self, policy: TokenPolicy, knobs: Mapping[str, float], rng: torch.Generator) -> Evaluation:
        """`solved`, the likeliest answer to held-out questions; `sampled`, one at temperature 1; `unseen`, targets that
        are never trained on.
        """
        found: dict[str, float] = {}
        samples: dict[str, Tensor | list[str]] = {}
        for name, rows, temperature in (
            ("solved", self.splits["test"], 0.0),
            ("sampled", self.splits["test"], 1.0),
            ("unseen", self._unseen, 0.0),
        ):
            asked = TextEvaluator(rows, prompt, {name: solved}, knobs={"temperature": temperature}, batch_size=500)
            answer = asked(policy, knobs, rng)
            found |= answer.metrics
            samples |= answer.samples if name == "solved" else {}
        return Evaluation(found, samples)


def prompt(row: Mapping[str, Any], knobs: Mapping[str, float]) -> str:
    """The question, its target digit by digit: `"4 7 3 9 -> 1 7"`."""
    given, _, target = str(row["question"]).partition("-> ")
    return f"{given}-> {' '.join(target)}"


def same_question(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Equal for rows with the same numbers, in any order, and the same target."""
    given, _, target = str(row["question"]).partition(" -> ")
    return (*sorted(given.split()), target)


def corrupt(row: Mapping[str, Any], operations: str, random: Random) -> dict[str, Any]:
    """A row whose answer uses its numbers and misses its target: an operation is exchanged."""
    words = str(row["answer"]).split()
    places = [place for place, word in enumerate(words) if not word.isdecimal()]
    choices = [(place, other) for place in places for other in operations if other != words[place]]
    for place, other in random.sample(choices, len(choices)):
        answer = " ".join([*words[:place], other, *words[place + 1 :]])
        if target_fault(answer, row["question"]) == "value":
            return {**row, "answer": answer}
    raise ValueError(f"no exchange of an operation makes '{row['answer']}' miss the target of '{row['question']}'")


def solved(rollout: Rollout) -> Tensor:
    """Bool `[B]`: the answer has come to its end, uses the numbers given and makes the target."""
    pairs = zip(rollout["text"].tolist(), rollout["question"].tolist(), strict=True)
    right = [reaches_target(text, question) for text, question in pairs]
    return torch.tensor(right, device=rollout.mask.device) & ~rollout["truncated"]


def _first(rows: Rows, count: int, what: str) -> Rows:
    if len(rows) < count:
        raise ValueError(
            f"TargetsWorld: {count} {what} are asked for and there are {len(rows)}; ask for fewer, or widen the range "
            "of numbers or targets"
        )
    return rows[:count]
