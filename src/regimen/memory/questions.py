"""A buffer of questions that are worth asking again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from regimen.memory.base import NewestRollout
from regimen.rollout import Rollout

BETTER = 0.01
"""A pass rate has improved if it has risen by more than this."""


@dataclass
class KeptQuestion:
    """A question in the buffer.

    Attributes:
        question, reference: texts.
        best: the highest pass rate that it had.
        stale: in how many rollouts since it was not higher.
    """

    question: str
    reference: str
    best: float
    stale: int = 0


class QuestionMemory:
    """Keeps the newest rollout to learn from, and of all rollouts the questions that are neither too easy nor too hard.

    A question enters whose pass rate lies strictly inside the window. In a later rollout it leaves if every answer to
    it is right, or after `max_stale` rollouts in which its pass rate did not improve. Reads the columns `question`,
    `reference` and `question_number`, and the component `pass_rate`. Source: PasoDoble (arXiv 2511.11881), whose
    released code never evicts.
    """

    def __init__(self, low: float = 0.2, high: float = 1.0, max_stale: int = 3) -> None:
        """Make an empty buffer; `ValueError` for an empty window, or `max_stale` below 1."""
        if low >= high or max_stale < 1:
            raise ValueError(
                f"QuestionMemory: low={low}, high={high}, max_stale={max_stale}; expected low below high and at least 1"
            )
        self.low, self.high, self.max_stale = low, high, max_stale
        self.questions: list[KeptQuestion] = []
        self._next, self._newest = 0, NewestRollout()

    def __len__(self) -> int:
        return len(self._newest)

    def add(self, rollout: Rollout) -> None:
        """Take in the questions of a judged rollout.

        Raises:
            ValueError: it has no pass rates.
        """
        if rollout.rewards is None or "pass_rate" not in rollout.rewards.keys():  # noqa: SIM118
            raise ValueError("QuestionMemory: the rollout has no reward component 'pass_rate'; add PassRate(...)")
        number = rollout["question_number"].tolist()
        first = {key: row for row, key in reversed(list(enumerate(number)))}
        questions, references = rollout["question"].tolist(), rollout["reference"].tolist()
        rate = rollout.rewards["pass_rate"]
        # As tensors: 1 / 5 in single precision is above 0.2 in double.
        rates, inside = rate.tolist(), ((rate > self.low) & (rate < self.high)).tolist()
        for row in sorted(first.values()):
            self._see(questions[row], references[row], rates[row], inside[row])
        self._newest.add(rollout)

    def _see(self, question: str, reference: str, rate: float, inside: bool) -> None:
        known = next((k for k in self.questions if (k.question, k.reference) == (question, reference)), None)
        if known is None:
            if inside:
                self.questions.append(KeptQuestion(question, reference, rate))
            return
        if rate > known.best + BETTER:
            known.best, known.stale = rate, 0
        else:
            known.stale += 1
        if rate >= 1 or known.stale >= self.max_stale:
            self._drop(known)

    def _drop(self, known: KeptQuestion) -> None:
        place = self.questions.index(known)
        self.questions.remove(known)
        self._next -= place < self._next

    def draw(self, count: int) -> list[tuple[str, str]]:
        """The next `count` questions with their references, round and round; all of them if there are fewer."""
        count = min(count, len(self.questions))
        places = [(self._next + offset) % len(self.questions) for offset in range(count)]
        self._next = (places[-1] + 1) % len(self.questions) if places else 0
        return [(self.questions[place].question, self.questions[place].reference) for place in places]

    def newest(self) -> Rollout:
        """The rollout that came last."""
        return self._newest.newest()

    def sample(self, size: int, rng: torch.Generator) -> Rollout:
        """`size` samples of it, with replacement."""
        return self._newest.sample(size, rng)

    def state_dict(self) -> dict[str, Any]:
        """The questions, and which of them is next."""
        return {"questions": [dataclasses.asdict(kept) for kept in self.questions], "next": self._next}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.questions = [KeptQuestion(**kept) for kept in state["questions"]]
        self._next = int(state["next"])
