"""Two policies that train each other: one writes questions, the other answers them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from tensordict import NonTensorStack, TensorDict
from torch import Tensor

from regimen.knobs import Knob
from regimen.policies.base import Policy
from regimen.rollout import Rollout
from regimen.tasks.base import Evaluation
from regimen.tasks.rows import Order, RowReader
from regimen.tasks.text import Row, Template, check_template, readable_fields, render, text_table

PROPOSER, SOLVER = "proposer", "solver"
NO_QUESTION = ("", "")

Question = tuple[str, str]
"""A question and the answer that its writer gave, texts."""
ParseQuestion = Callable[[str], Question | None]
"""What a proposal asks; `None` for a text that asks nothing."""
CastEvaluator = Callable[[Mapping[str, Any], Mapping[str, float], torch.Generator], Evaluation]


class DualPlayTask:
    """A proposer writes questions about pieces of knowledge, and a solver answers them.

    A rollout has the samples of both, as two tasks: `proposer`, whose groups are the questions about one piece, and
    `solver`, whose groups are the answers to one question. Both have the columns `question` and `reference` (texts,
    empty where a proposal asks nothing) and `question_number`, equal for a proposal and the answers to it. A proposal
    that asks nothing is put to the solver as an empty question, so that every iteration has as many samples; judge it
    with a `QuestionGuard`. Source: PasoDoble (arXiv 2511.11881).

    Attributes:
        group_size: samples to one piece of knowledge, `proposals * (1 + answers)`.
        collects: the names of the two tasks; group_sizes: of each.
    """

    generates = True
    collects = (PROPOSER, SOLVER)

    def __init__(
        self,
        name: str,
        knowledge: Sequence[Row],
        *,
        propose: Template,
        solve: Template = "{question}",
        parse: ParseQuestion,
        proposals: int = 6,
        answers: int = 6,
        proposer: str = PROPOSER,
        solver: str = SOLVER,
        evaluate: CastEvaluator | None = None,
        order: Order = "shuffle",
    ) -> None:
        """Make a task of pieces of knowledge.

        Args:
            name: unique within a regimen.
            knowledge: rows of fields, see `text_table`.
            propose: the proposer's prompt, made of a row; see `render`.
            solve: the solver's prompt, made of a `question`.
            parse: finds question and answer in a proposal.
            proposals: questions about a piece; answers: to a question.
            proposer, solver: the members of the cast.
            evaluate: of the cast; it must not use the judge that trains.
            order: how pieces are drawn, see `RowReader`.

        Raises:
            ValueError: fewer than two proposals or answers, of which no group could be made; rows or templates that do
                not fit.
        """
        if proposals < 2 or answers < 2:
            raise ValueError(
                f"task '{name}': proposals={proposals}, answers={answers}; expected at least 2 of each, for they are "
                "compared with each other"
            )
        self.name, self.rows = name, text_table(knowledge, owner=f"task '{name}'")
        check_template(propose, readable_fields(self.rows), [], f"task '{name}', propose")
        check_template(solve, ["question"], [], f"task '{name}', solve")
        self.propose, self.solve, self.parse = propose, solve, parse
        self.proposals, self.answers, self.group_size = proposals, answers, proposals * (1 + answers)
        self.proposer, self.solver, self._evaluate = proposer, solver, evaluate
        self.group_sizes = (proposals, answers)
        self._reader = RowReader(len(self.rows), order, name)

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """It reads none."""
        return ()

    def collect(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator, size: int) -> Rollout:
        """The proposals about `size // group_size` pieces, then the answers to them.

        Raises:
            ValueError: `size` is not a multiple of `group_size`.
        """
        if size < 1 or size % self.group_size:
            raise ValueError(
                f"task '{self.name}' was asked for {size} samples, expected a multiple of its group_size "
                f"{self.group_size}, {self.proposals} proposals with {self.answers} answers to each"
            )
        drawn = self._reader.draw(size // self.group_size, rng).repeat_interleave(self.proposals)
        proposed = say(cast[self.proposer], render(self.propose, self.rows[drawn], knobs), knobs, rng)
        questions = [self.parse(text) or NO_QUESTION for text in proposed["text"].tolist()]
        number = torch.arange(len(questions), device=rng.device)
        told = linked(proposed, PROPOSER, questions, number, number // self.proposals)
        solver = cast[self.solver]
        return Rollout.cat([told, answers_to(questions, SOLVER, solver, self.solve, self.answers, knobs, rng)])

    def evaluate(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator) -> Evaluation:
        """What the evaluator finds; nothing if the task has none."""
        return Evaluation({}) if self._evaluate is None else self._evaluate(cast, knobs, rng)

    def state_dict(self) -> dict[str, Any]:
        """Pieces still to come in this epoch."""
        return self._reader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._reader.load_state_dict(state)


def say(policy: Policy, prompts: Sequence[str], knobs: Mapping[str, float], rng: torch.Generator) -> Rollout:
    """A policy's answers to prompts."""
    return policy.sample(TensorDict({"prompt": NonTensorStack(*prompts)}, [len(prompts)]).to(rng.device), knobs, rng)


def answers_to(
    questions: Sequence[Question],
    task: str,
    solver: Policy,
    solve: Template,
    answers: int,
    knobs: Mapping[str, float],
    rng: torch.Generator,
) -> Rollout:
    """Samples of a task: the solver's answers to each question, which are a group."""
    table = TensorDict({"question": NonTensorStack(*(question for question, _ in questions))}, [len(questions)])
    number = torch.arange(len(questions), device=rng.device).repeat_interleave(answers)
    asked = [prompt for prompt in render(solve, table, knobs) for _ in range(answers)]
    each = [question for question in questions for _ in range(answers)]
    return linked(say(solver, asked, knobs, rng), task, each, number, number)


def linked(rollout: Rollout, task: str, questions: Sequence[Question], number: Tensor, group: Tensor) -> Rollout:
    """Samples of a task with the columns that link proposals and answers."""
    texts, references = (NonTensorStack(*column) for column in zip(*questions, strict=True))
    named = Rollout(rollout.data, (task,)).replace(group=group)
    return named.with_columns(question=texts, reference=references, question_number=number)


class QuestionSource(Protocol):
    """Gives questions, such as a `QuestionMemory`."""

    def draw(self, count: int) -> Sequence[Question]:
        """The next `count` questions, fewer if there are fewer."""
        ...


class QuestionReview:
    """A solver answers questions that were kept; the samples have the columns of a `DualPlayTask`'s.

    It asks fewer than it was told to if fewer are kept, and an empty one if there are none. Where the questions stand
    is the state of their source.
    """

    generates = True

    def __init__(
        self,
        name: str,
        source: QuestionSource,
        *,
        solve: Template = "{question}",
        answers: int = 6,
        solver: str = SOLVER,
    ) -> None:
        """Make a task of kept questions.

        Args:
            name: unique within a regimen.
            source: gives them.
            solve, answers, solver: as in `DualPlayTask`.

        Raises:
            ValueError: fewer than two answers.
        """
        if answers < 2:
            raise ValueError(f"task '{name}': answers={answers}; expected at least 2, for they are compared")
        check_template(solve, ["question"], [], f"task '{name}', solve")
        self.name, self.source, self.solve, self.solver, self.group_size = name, source, solve, solver, answers

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """It reads none."""
        return ()

    def collect(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator, size: int) -> Rollout:
        """Answers to the next `size // group_size` questions."""
        questions = list(self.source.draw(size // self.group_size)) or [NO_QUESTION]
        return answers_to(questions, self.name, cast[self.solver], self.solve, self.group_size, knobs, rng)

    def evaluate(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator) -> Evaluation:
        """Nothing."""
        return Evaluation({})

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the source has it."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore."""
