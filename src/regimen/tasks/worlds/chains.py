"""Chained modular arithmetic on a scratchpad, by a small decoder that is told how many tokens it may take.

A prompt is `"3 + 4 - 1 + 2 <24> <think>"`: the question, the budget as one word, the opened thinking. Pre-training
announces budgets that have nothing to do with the length of what follows, so that every budget word is known and none
means anything yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any

import torch
from torch import Tensor

from regimen.functions.answers import exact_match
from regimen.knobs import Knob
from regimen.models.small_decoder import small_decoder, word_tokenizer
from regimen.policies.token import TokenPolicy
from regimen.rollout import Rollout
from regimen.tasks.arithmetic import chained_arithmetic, chained_vocabulary, modular_facts
from regimen.tasks.dataset import DatasetTask
from regimen.tasks.generated import GeneratedTask
from regimen.tasks.worlds.budgeted import budgeted_evaluator

TEMPLATE = "{question} <{token_budget}> <think>"
_HELD_OUT_SEED = 2**40

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class ChainsWorld:
    """Questions, the held-out ones among them, and a small decoder that knows their words.

    Attributes:
        seed: of the held-out questions, the demonstrations and the decoder's weights.
        digits, modulus, restate: see `chained_arithmetic`; `restate` is the most often that a step is stated.
        layers: of the decoder.
        longest_budget: budgets from 1 to this are words.
        max_new_tokens: longest answer.
        held_out: questions for evaluation, which are never trained on.
        verifier: whether an answer is right.
        opened: what a prompt has already opened.
    """

    seed: int
    digits: int = 4
    modulus: int = 5
    restate: int = 4
    layers: int = 2
    longest_budget: int = 48
    max_new_tokens: int = 80
    held_out: int = 500

    verifier = staticmethod(exact_match)
    opened = "<think>"

    def __post_init__(self) -> None:
        different = self.modulus**self.digits * 2 ** (self.digits - 1)
        if self.held_out >= different:
            raise ValueError(
                f"ChainsWorld: held_out is {self.held_out}, and there are {different} questions of {self.digits} "
                f"digits below {self.modulus}; hold out fewer, or take more digits"
            )

    def policy(self) -> TokenPolicy:
        """A decoder with random weights."""
        budgets = (f"<{budget}>" for budget in range(1, self.longest_budget + 1))
        tokenizer = word_tokenizer([*chained_vocabulary(self.modulus), *budgets])
        decoder = small_decoder(len(tokenizer), layers=self.layers, seed=self.seed)
        return TokenPolicy(decoder, tokenizer, max_new_tokens=self.max_new_tokens)

    @cached_property
    def test(self) -> Rows:
        """The held-out questions, each once."""
        found: dict[str, dict[str, Any]] = {}
        seed = _HELD_OUT_SEED + 1000 * self.seed
        while len(found) < self.held_out:
            found |= {row["question"]: row for row in self._chains(self.held_out, seed)}
            seed += 1
        return list(found.values())[: self.held_out]

    @cached_property
    def _tested(self) -> frozenset[str]:
        return frozenset(row["question"] for row in self.test)

    def rows(self, count: int, seed: int, restate: int = 1) -> Rows:
        """Questions that are not held out, with solutions."""
        found: Rows = []
        while len(found) < count:
            found += [row for row in self._chains(count, seed, restate) if row["question"] not in self._tested]
            seed += 1
        return found[:count]

    def _chains(self, count: int, seed: int, restate: int = 1) -> Rows:
        return chained_arithmetic(count, seed, digits=self.digits, modulus=self.modulus, restate=(1, restate))

    def facts(self, policy: TokenPolicy) -> DatasetTask:
        """Every fact `"a + b = c ;"`, to be known before chains are learned."""
        rows = modular_facts(self.modulus)
        table = policy.demonstrations([r["question"] for r in rows], [r["solution"] for r in rows], end=False)
        return DatasetTask("facts", table)

    def traces(self, policy: TokenPolicy, count: int) -> DatasetTask:
        """Verbose solutions of `count` questions, each under a budget drawn at random."""
        rows, random = self.rows(count, self.seed, self.restate), Random(self.seed)
        budgets = [random.randint(1, self.longest_budget) for _ in rows]
        prompts = [TEMPLATE.format(token_budget=b, **row) for row, b in zip(rows, budgets, strict=True)]
        return DatasetTask("traces", policy.demonstrations(prompts, [row["solution"] for row in rows]))

    def questions(self, group_size: int, budget: int) -> GeneratedTask:
        """Fresh questions under the knob `token_budget`, evaluated on the held-out ones under `budget`."""
        return GeneratedTask(
            "questions",
            self.rows,
            TEMPLATE,
            reads=[Knob("token_budget", budget, 1, self.longest_budget, integer=True)],
            group_size=group_size,
            evaluate=budgeted_evaluator(self.test, TEMPLATE, solved, budget),
        )


def solved(rollout: Rollout) -> Tensor:
    """Bool `[B]`: the answer has come to its end, and what stands last in it is right."""
    ends = [f"<answer> {answer} </answer>" for answer in rollout["answer"].tolist()]
    right = [text.endswith(end) for text, end in zip(rollout["text"].tolist(), ends, strict=True)]
    return torch.tensor(right, device=rollout.mask.device) & ~rollout["truncated"]
