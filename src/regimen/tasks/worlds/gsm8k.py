"""Grade-school word problems for a language model that is told how many tokens it may take.

Rows are those of GSM8K: a `question`, and in `answer` a solution whose last line is `#### 18`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from regimen.functions.answers import hash_answer, math_match, numeric_match, tag_text
from regimen.knobs import Knob
from regimen.policies.token import TokenPolicy
from regimen.rollout import Rollout
from regimen.tasks.text import Row, TextPromptTask, read_dataset, read_json_lines
from regimen.tasks.worlds.budgeted import budgeted_evaluator

TEMPLATE = (
    "{question}\n\nThink between <think> and </think>, then give the final number between <answer> and </answer>. "
    "Use exactly {token_budget} tokens."
)
_VERIFIERS: dict[str, Callable[[str, Any], bool]] = {"numeric": numeric_match, "math-verify": math_match}


@dataclass(frozen=True)
class GSM8KWorld:
    """A pre-trained model and word problems.

    Attributes:
        model: a folder, or a name on the Hugging Face hub.
        train, test: a JSON-lines file, or the name of a data set on the hub, whose split of that name is read.
        rule: which verifier judges: `"numeric"`, or `"math-verify"` (an extra).
        lora_rank: of the adapters that are trained; `None` to train all weights.
        dtype: of the weights.
        max_new_tokens: longest answer.
        held_out: the first rows of `test`, for evaluation.
        opened: what a prompt has already opened.
    """

    model: str
    train: str
    test: str
    rule: Literal["numeric", "math-verify"] = "numeric"
    lora_rank: int | None = None
    dtype: str = "bfloat16"
    max_new_tokens: int = 512
    held_out: int = 500

    opened = ""

    @property
    def verifier(self) -> Callable[[str, Any], bool]:
        """Whether an answer is right, for the judge."""
        return _VERIFIERS[self.rule]

    def policy(self) -> TokenPolicy:
        """The model, asked by its chat template if it has one; an answer ends with its closing tag."""
        from transformers import AutoTokenizer

        chat = AutoTokenizer.from_pretrained(self.model).chat_template is not None
        return TokenPolicy.from_pretrained(
            self.model,
            lora_rank=self.lora_rank,
            options={"dtype": getattr(torch, self.dtype)},
            chat=chat,
            stop=["</answer>"],
            max_new_tokens=self.max_new_tokens,
        )

    @cached_property
    def rows(self) -> list[Row]:
        """Questions to train on, with their final numbers."""
        return final_numbers(_read(self.train, "train"), self.train)

    @cached_property
    def tested(self) -> list[Row]:
        """Questions for evaluation."""
        return final_numbers(_read(self.test, "test")[: self.held_out], self.test)

    def questions(self, group_size: int, budget: int) -> TextPromptTask:
        """Questions under the knob `token_budget`, evaluated on the held-out ones under `budget`."""
        return TextPromptTask(
            "questions",
            self.rows,
            TEMPLATE,
            reads=[Knob("token_budget", budget, 1, integer=True)],
            group_size=group_size,
            evaluate=budgeted_evaluator(self.tested, TEMPLATE, solved, budget, batch_size=64),
        )


def final_numbers(rows: Sequence[Row], source: str = "GSM8K") -> list[Row]:
    """Rows of `question` and `answer`, the number after `####`.

    Raises:
        ValueError: a row has no question or no such number; source and row are named.
    """
    found: list[Row] = []
    for number, row in enumerate(rows, 1):
        answer = hash_answer(str(row.get("answer", "")))
        if not answer or "question" not in row:
            raise ValueError(
                f"{source}, row {number}: fields {', '.join(row)}, final number {answer!r}; expected a `question`, and "
                "an `answer` that ends with '#### 18'. Repair or drop the row"
            )
        found.append({"question": row["question"], "answer": answer})
    return found


def solved(rollout: Rollout) -> Tensor:
    """Bool `[B]`: the answer has come to its end, and the number in its last answer tag is right."""
    right = [
        numeric_match(tag_text(text[text.rfind("<answer>") :], "answer") or "", answer)
        for text, answer in zip(rollout["text"].tolist(), rollout["answer"].tolist(), strict=True)
    ]
    return torch.tensor(right, device=rollout.mask.device) & ~rollout["truncated"]


def _read(source: str, split: str) -> list[dict[str, Any]]:
    return read_json_lines(source) if Path(source).is_file() else read_dataset(source, split, "main")
