"""Problems that a pre-trained language model writes about pieces of text, and that another copy of it solves.

Knowledge has rows with a `text`; the evaluation has rows with a `question` and the final `answer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from regimen.functions.answers import boxed_text, math_match, tag_text
from regimen.policies.token import TokenPolicy
from regimen.tasks.base import Evaluation
from regimen.tasks.dual_play import PROPOSER, SOLVER, DualPlayTask, Question
from regimen.tasks.text import Row, TextEvaluator, read_dataset, read_json_lines
from regimen.tasks.worlds.solved_problems import TEMPLATE as SOLVE
from regimen.tasks.worlds.solved_problems import solved

PROPOSE = (
    "{text}\n\nWrite one new and challenging mathematics problem that the text above suggests, and solve it. Give the "
    "problem between <problem> and </problem>, then its final answer between <answer> and </answer>, as \\boxed{{}}. "
    "The problem must not tell the answer."
)


@dataclass(frozen=True)
class ProposedProblemsWorld:
    """A pre-trained model, pieces of text, and problems for the evaluation.

    Attributes:
        model: a folder, or a name on the Hugging Face hub.
        knowledge, test: a JSON-lines file, or the name of a data set on the hub (its splits `train` and `test`).
        lora_rank: of the adapters that are trained; `None` to train all weights.
        dtype: of the weights.
        max_new_tokens: longest answer, of both roles; temperature: at which both are sampled in training.
        held_out: the first rows of `test`.
    """

    model: str
    knowledge: str
    test: str
    lora_rank: int | None = None
    dtype: str = "bfloat16"
    max_new_tokens: int = 6144
    held_out: int = 500
    temperature: float = 0.6

    read_answer = staticmethod(boxed_text)
    rules = ("missing", "answer_in_question", "question_in_answer", "boxed")

    @staticmethod
    def verifier(given: str, expected: object) -> bool:
        """Whether two answers are equal as mathematics; one that its writer left unreadable is equal to none."""
        try:
            return math_match(given, expected)
        except ValueError:
            return False

    def policy(self) -> TokenPolicy:
        """The model, asked by its chat template if it has one."""
        from transformers import AutoTokenizer

        return TokenPolicy.from_pretrained(
            self.model,
            lora_rank=self.lora_rank,
            options={"dtype": getattr(torch, self.dtype)},
            chat=AutoTokenizer.from_pretrained(self.model).chat_template is not None,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
        )

    def play(self, proposals: int, answers: int, proposer: str = PROPOSER) -> DualPlayTask:
        """Problems about pieces of text, and answers; the solver is evaluated on the test."""
        pieces = [{"text": row["text"]} for row in _read(self.knowledge, "train")]
        tested = _read(self.test, "test")[: self.held_out]
        measure = TextEvaluator(tested, SOLVE, {"accuracy": solved}, fields=["question", "answer"], batch_size=64)
        return DualPlayTask(
            "play",
            pieces,
            propose=PROPOSE,
            solve=SOLVE,
            parse=parse_problem,
            proposals=proposals,
            answers=answers,
            proposer=proposer,
            evaluate=_OfSolver(measure),
        )


@dataclass(frozen=True)
class _OfSolver:
    measure: TextEvaluator

    def __call__(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator) -> Evaluation:
        return self.measure(cast[SOLVER], knobs, rng)


def parse_problem(text: str) -> Question | None:
    """The problem and the last box in the answer, both after the thinking; `None` if either is missing."""
    said = text.rpartition("</think>")[2]
    problem, answer = tag_text(said, "problem"), boxed_text(tag_text(said, "answer") or "")
    return (problem, answer) if problem and answer else None


def _read(source: str, split: str) -> list[Row]:
    return list(read_json_lines(source) if Path(source).is_file() else read_dataset(source, split))
