"""Problems with worked solutions, for a pre-trained language model that imitates some and answers others.

Rows have a `question`, a `solution` to imitate, and the final `answer`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from regimen.functions.answers import boxed_text, exact_match, math_match
from regimen.policies.token import TokenPolicy
from regimen.rollout import Rollout
from regimen.tasks.demonstrations import DemonstrationTask
from regimen.tasks.text import Row, TextEvaluator, TextPromptTask, read_dataset, read_json_lines, split_rows

TEMPLATE = "{question}\n\nReason step by step, and put the final answer within \\boxed{{}}."
FIELDS = ["question", "solution", "answer"]
Split = Literal["train", "demonstrations", "validation"]


@dataclass(frozen=True)
class SolvedProblemsWorld:
    """A pre-trained model and problems with solutions.

    Attributes:
        model: a folder, or a name on the Hugging Face hub.
        train, test: a JSON-lines file, or the name of a data set on the hub, whose split of that name is read.
        lora_rank: of the adapters that are trained; `None` to train all weights.
        dtype: of the weights.
        max_new_tokens: longest answer.
        held_out: the first rows of `test`, for evaluation.
        validated, demonstrated: shares of the questions in `train` that are for probes, and that are imitated.
    """

    model: str
    train: str
    test: str
    lora_rank: int | None = None
    dtype: str = "bfloat16"
    max_new_tokens: int = 2048
    held_out: int = 500
    validated: float = 0.1
    demonstrated: float = 0.4

    verifier = staticmethod(math_match)
    read_answer = staticmethod(boxed_text)
    expected = "answer"

    def policy(self) -> TokenPolicy:
        """The model, asked by its chat template if it has one."""
        from transformers import AutoTokenizer

        return TokenPolicy.from_pretrained(
            self.model,
            lora_rank=self.lora_rank,
            options={"dtype": getattr(torch, self.dtype)},
            chat=AutoTokenizer.from_pretrained(self.model).chat_template is not None,
            max_new_tokens=self.max_new_tokens,
        )

    @cached_property
    def splits(self) -> dict[Split, list[Row]]:
        """Rows to train on, to imitate, and for probes; a question is in one of them only."""
        rows, validation = split_rows(_read(self.train, "train"), self.validated, by="question")
        # The hash is below `validated` in none of these.
        share = self.validated + (1 - self.validated) * self.demonstrated
        train, demonstrations = split_rows(rows, share, by="question")
        return {"train": train, "demonstrations": demonstrations, "validation": validation}

    def questions(self, name: str, split: Split, group_size: int) -> TextPromptTask:
        """Questions of a split; those named "questions" are evaluated on the test."""
        rows = self.splits[split]
        evaluate = None
        if name == "questions":
            tested = _read(self.test, "test")[: self.held_out]
            fields = ["question", "answer"]
            evaluate = TextEvaluator(tested, TEMPLATE, {"solved": solved}, fields=fields, batch_size=64)
        return TextPromptTask(name, rows, TEMPLATE, fields=FIELDS, group_size=group_size, evaluate=evaluate)

    def demonstrations(self) -> DemonstrationTask:
        """Solutions to imitate."""
        rows = [{name: row[name] for name in FIELDS} for row in self.splits["demonstrations"]]
        return DemonstrationTask("demonstrations", rows, TEMPLATE, answer="solution")


def solved(rollout: Rollout) -> Tensor:
    """Bool `[B]`: the answer has come to its end, and its last box holds the expected text."""
    right = [
        exact_match(boxed_text(text) or "", answer)
        for text, answer in zip(rollout["text"].tolist(), rollout["answer"].tolist(), strict=True)
    ]
    return torch.tensor(right, device=rollout.mask.device) & ~rollout["truncated"]


def _read(source: str, split: str) -> list[dict[str, Any]]:
    return read_json_lines(source) if Path(source).is_file() else read_dataset(source, split)
