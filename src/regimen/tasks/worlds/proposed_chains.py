"""Chained modular arithmetic by two roles of one small decoder: it writes questions with answers, and it answers them.

A piece of knowledge is an expression, `"3 + 4 - 1"`. The proposer writes another that begins like it, with a worked
solution: `"<problem> 3 + 4 + 2 - 0 </problem> 3 + 4 = 2 ; ... </think> <answer> 4 </answer>"`. The solver is given the
question and writes the solution. The decoder has read such texts of both roles, in which the final answer is wrong more
often the longer the question is: it knows how to calculate, and states the result unreliably.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any

import torch
from torch import Tensor

from regimen.functions.answers import exact_match, tag_text
from regimen.models.small_decoder import small_decoder, word_tokenizer
from regimen.policies.token import TokenPolicy
from regimen.rollout import Rollout
from regimen.tasks.arithmetic import APPLY, chained_arithmetic, chained_vocabulary, modular_facts
from regimen.tasks.base import Evaluation
from regimen.tasks.dataset import DatasetTask
from regimen.tasks.dual_play import PROPOSER, SOLVER, DualPlayTask, Question, say
from regimen.tasks.text import TextEvaluator
from regimen.tasks.worlds.chains import solved

PROPOSE, SOLVE = "<propose> {piece}", "<solve> {question} <think>"
_HELD_OUT_SEED = 2**40

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class ProposedChainsWorld:
    """Expressions, the held-out ones among them, and a small decoder that has read noisy texts of both roles.

    Attributes:
        seed: of the held-out questions, the texts and the decoder's weights.
        longest: operands; the shortest expressions have 2.
        modulus: of all values.
        noise: for each operand, the probability that a text's final answer is wrong.
        layers, dim: of the decoder.
        held_out: questions for the evaluation, equally many of each length; they are in no text.
        pieces: of knowledge.
        probed: proposals that the evaluation looks at.
    """

    seed: int
    longest: int = 5
    modulus: int = 5
    noise: float = 0.08
    layers: int = 2
    dim: int = 64
    held_out: int = 400
    pieces: int = 2000
    probed: int = 200

    verifier = staticmethod(exact_match)
    read_answer = "answer"
    # Digits are parts of most questions.
    rules = ("missing", "question_in_answer", "boxed", "stated")

    def policy(self) -> TokenPolicy:
        """A decoder with random weights."""
        words = (*chained_vocabulary(self.modulus), "<problem>", "</problem>", "<propose>", "<solve>")
        tokenizer = word_tokenizer(words)
        decoder = small_decoder(len(tokenizer), dim=self.dim, layers=self.layers, seed=self.seed)
        return TokenPolicy(decoder, tokenizer, max_new_tokens=8 * self.longest + 8)

    @cached_property
    def test(self) -> Rows:
        """The held-out questions, each once as far as there are so many: equally many of each length."""
        lengths = range(2, self.longest + 1)
        found: Rows = []
        for operands in lengths:
            rows = self._chains(20 * self.held_out, _HELD_OUT_SEED + self.seed, (operands, operands))
            distinct = list({row["question"]: row for row in rows}.values())
            # Of the shortest there are few: half of them are kept for the texts.
            found += distinct[: min(self.held_out // len(lengths), len(distinct) // 2)]
        return found

    @cached_property
    def _tested(self) -> frozenset[str]:
        return frozenset(row["question"] for row in self.test)

    def _chains(self, count: int, seed: int, operands: tuple[int, int]) -> Rows:
        return chained_arithmetic(count, seed, digits=operands, modulus=self.modulus, restate=1)

    def rows(self, count: int, seed: int) -> Rows:
        """Questions that are not held out, of all lengths."""
        rows = self._chains(2 * count + 100, seed, (2, self.longest))
        return [row for row in rows if row["question"] not in self._tested][:count]

    def texts(self, count: int) -> tuple[list[str], list[str]]:
        """Prompts and answers: `count` of each role, with wrong answers among them."""
        rows, tails, random = self.rows(count, self.seed), self.rows(count, self.seed + 1), Random(self.seed)
        prompts, answers = [], []
        for row, tail in zip(rows, tails, strict=True):
            solution, piece = self._noisy(row, random), _begun(row["question"], tail["question"])
            prompts += [SOLVE.format(**row), PROPOSE.format(piece=piece)]
            answers += [solution, f"<problem> {row['question']} </problem> {solution}"]
        return prompts, answers

    def _noisy(self, row: Mapping[str, Any], random: Random) -> str:
        if random.random() >= self.noise * row["operands"]:
            return str(row["solution"])
        wrong = random.choice([value for value in range(self.modulus) if str(value) != row["answer"]])
        trace, _, _ = row["solution"].partition("<answer>")
        return f"{trace}<answer> {wrong} </answer>"

    def facts(self, policy: TokenPolicy) -> DatasetTask:
        """Every fact `"a + b = c ;"`, to be known before chains are learned."""
        rows = modular_facts(self.modulus)
        table = policy.demonstrations([r["question"] for r in rows], [r["solution"] for r in rows], end=False)
        return DatasetTask("facts", table)

    def corpus(self, policy: TokenPolicy, count: int) -> DatasetTask:
        """The texts of both roles."""
        return DatasetTask("corpus", policy.demonstrations(*self.texts(count)))

    def play(self, proposals: int, answers: int, proposer: str = PROPOSER) -> DualPlayTask:
        """Questions about fresh expressions, and answers; evaluated on held-out questions."""
        pieces = [{"piece": row["question"]} for row in self.rows(self.pieces, self.seed + 2)]
        return DualPlayTask(
            "play",
            pieces,
            propose=PROPOSE,
            solve=SOLVE,
            parse=parse_question,
            proposals=proposals,
            answers=answers,
            proposer=proposer,
            evaluate=_Evaluator(self, proposer),
        )

    def value(self, question: str) -> str | None:
        """The true answer to a question, `None` for one that is no expression."""
        first, *rest = question.split() or [""]
        digits = {str(value) for value in range(self.modulus)}
        if first not in digits or len(rest) % 2:
            return None
        value = int(first)
        for operation, operand in zip(rest[::2], rest[1::2], strict=True):
            if operation not in APPLY or operand not in digits:
                return None
            value = APPLY[operation](value, int(operand)) % self.modulus
        return str(value)


def parse_question(text: str) -> Question | None:
    """What stands between `<problem>` and `</problem>`, and the answer; `None` if either is missing."""
    question, answer = tag_text(text, "problem"), tag_text(text, "answer")
    return (question, answer) if question and answer else None


def _begun(question: str, tail: str) -> str:
    """The first two operands of one expression, and all but those of another."""
    return " ".join([*question.split()[:3], *tail.split()[3:]])


class _Evaluator:
    """Measures the solver on held-out questions by true arithmetic, and looks at what the proposer writes."""

    def __init__(self, world: ProposedChainsWorld, proposer: str) -> None:
        self.world, self.proposer = world, proposer

    def __call__(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator) -> Evaluation:
        sampled = self._solver({"temperature": 1.0})(cast[SOLVER], knobs, rng)
        likeliest = self._solver({"temperature": 0.0})(cast[SOLVER], knobs, rng)
        greedy = {f"greedy_{name}": value for name, value in likeliest.metrics.items() if name == "accuracy"}
        shown, metrics = self._proposals(cast[self.proposer], knobs, rng)
        return Evaluation(sampled.metrics | greedy | metrics, {**sampled.samples, "proposals": shown})

    def _solver(self, knobs: Mapping[str, float]) -> TextEvaluator:
        rows = self.world.test
        shares = {n: sum(r["operands"] == n for r in rows) / len(rows) for n in range(2, self.world.longest + 1)}

        def of_length(operands: int, rollout: Rollout) -> Tensor:
            return solved(rollout) * (rollout["operands"] == operands) / shares[operands]

        measures: dict[str, Any] = {"accuracy": solved}
        for operands in shares:
            measures[f"accuracy_{operands}"] = lambda rollout, n=operands: of_length(n, rollout)
        return TextEvaluator(
            rows, SOLVE, measures, knobs=knobs, fields=["question", "answer", "operands"], batch_size=500
        )

    def _proposals(
        self, proposer: TokenPolicy, knobs: Mapping[str, float], rng: torch.Generator
    ) -> tuple[list[str], dict[str, float]]:
        pieces = self.world.rows(self.world.probed, self.world.seed + 3)
        prompts = [PROPOSE.format(piece=row["question"]) for row in pieces]
        texts = say(proposer, prompts, {**knobs, "temperature": 1.0}, rng)["text"].tolist()
        asked = [question for text in texts if (question := parse_question(text)) is not None]
        true = [self.world.value(question) == answer for question, answer in asked]
        operands = [len(question.split()) / 2 + 0.5 for question, _ in asked]
        several = max(len(asked), 1)
        return texts[:8], {
            "formed": len(asked) / len(texts),
            "true": sum(true) / several,
            "distinct": len({question for question, _ in asked}) / len(texts),
            "operands": sum(operands) / several,
        }
