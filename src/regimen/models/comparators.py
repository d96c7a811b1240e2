"""Judges of pairs: which of two samples is better, by one of several criteria, in one of several tasks (OneReward)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from regimen.functions.verdicts import symmetric_probability
from regimen.models.inpainting import paste
from regimen.rollout import Rollout


@dataclass(frozen=True)
class Questions:
    """What a judge of pairs is asked: one criterion about one sample each, `R` questions.

    Attributes:
        context: `[R]`, of the samples.
        task, criterion: names, `R` of each.
        row: int64 `[R]`, which sample; place: int64 `[R]`, which of the criteria.
    """

    context: TensorDict
    task: Sequence[str]
    criterion: Sequence[str]
    row: Tensor
    place: Tensor

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True)
class Criteria:
    """Which criteria samples of each task are judged by.

    Attributes:
        of_tasks: task to criteria.
        names: all criteria, each once, in order.
    """

    of_tasks: Mapping[str, Sequence[str]]
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        names = tuple(dict.fromkeys(name for named in self.of_tasks.values() for name in named))
        if not names:
            raise ValueError(f"Criteria: {dict(self.of_tasks)} names no criterion; expected at least one")
        object.__setattr__(self, "names", names)

    def check(self, task: str, criterion: str) -> None:
        """Raise `ValueError` if a criterion does not apply to a task."""
        if criterion not in self.of_tasks.get(task, ()):
            raise ValueError(
                f"criterion '{criterion}' does not apply to task '{task}', whose criteria are: "
                f"{', '.join(self.of_tasks.get(task, ())) or 'none'}; ask for one of these"
            )

    def applicable(self, rollout: Rollout) -> Tensor:
        """Bool `[B, K]`: which of the criteria apply to each sample."""
        table = [[name in self.of_tasks.get(task, ()) for name in self.names] for task in rollout.task_names]
        return torch.tensor(table, device=rollout.task.device)[rollout.task]

    def questions(self, rollout: Rollout, asked: Tensor | None = None) -> Questions:
        """Every criterion that applies to each sample, or those of `asked` (bool `[B, K]`), sample by sample."""
        row, place = (self.applicable(rollout) if asked is None else asked).nonzero(as_tuple=True)
        task = [rollout.task_names[index] for index in rollout.task[row].tolist()]
        return Questions(rollout.context[row], task, [self.names[k] for k in place.tolist()], row, place)


class Comparator(Protocol):
    """A judge of pairs."""

    criteria: Criteria

    def compare(self, questions: Questions, a: Tensor, b: Tensor) -> Tensor:
        """Log-odds `[R]` that the first is better, of `a, b [R, ...]` shown in this order."""
        ...


def preference(comparator: Comparator, questions: Questions, a: Tensor, b: Tensor) -> Tensor:
    """The probability `[R]` that `a` beats `b [R, ...]`, asked in both orders; see `symmetric_probability`."""
    return symmetric_probability(comparator.compare(questions, a, b), comparator.compare(questions, b, a))


Told = tuple[str, ...]
"""Of `task` and `criterion`, what a judge is told of a question."""


class EncoderComparator(nn.Module):
    """A small judge of pairs: an encoder sees each candidate beside its context, and a head compares what it saw.

    Attributes:
        criteria: what it may be asked.
        told: what it is told of a question; what it is not told is 0 in its place. Told neither the task nor the
            criterion, it is a judge of whatever its labels agree on.
    """

    def __init__(
        self,
        encoder: nn.Module,
        hidden: int,
        criteria: Criteria,
        told: Told = ("task", "criterion"),
    ) -> None:
        """Make a judge.

        Args:
            encoder: `(candidate [R, ...], context, condition [R, tasks + criteria]) -> [R, hidden]`.
            hidden: see there.
            criteria, told: see the class.

        Raises:
            ValueError: `told` names something else.
        """
        super().__init__()
        if odd := set(told) - {"task", "criterion"}:
            raise ValueError(f"EncoderComparator: told={told} has {', '.join(sorted(odd))}; expected task, criterion")
        self.encoder, self.criteria, self.told = encoder, criteria, tuple(told)
        self.head = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.SiLU(), nn.Linear(hidden, 1))

    def compare(self, questions: Questions, a: Tensor, b: Tensor) -> Tensor:
        """Log-odds `[R]` that the first is better.

        Raises:
            ValueError: a criterion does not apply to the task that it is asked of.
        """
        condition = self._condition(questions, a.device)
        seen = [self.encoder(candidate, questions.context, condition) for candidate in (a, b)]
        margin: Tensor = self.head(torch.cat(seen, 1)).squeeze(1)
        return margin

    def _condition(self, questions: Questions, device: torch.device) -> Tensor:
        """`[R, tasks + criteria]`, of zeros and ones."""
        for task, criterion in set(zip(questions.task, questions.criterion, strict=True)):
            self.criteria.check(task, criterion)
        tasks, width = len(self.criteria.of_tasks), len(self.criteria.of_tasks) + len(self.criteria.names)
        condition = torch.zeros(len(questions), width, device=device)
        rows = torch.arange(len(questions), device=device)
        if "task" in self.told:
            names = list(self.criteria.of_tasks)
            condition[rows, torch.tensor([names.index(name) for name in questions.task], device=device)] = 1
        if "criterion" in self.told:
            condition[rows, tasks + questions.place.to(device)] = 1
        return condition


class PastedComparator(nn.Module):
    """A judge that is shown candidates inside a mask, and around it the picture that they were made from.

    What a model changed where nothing was asked of it, or an autoencoder lost there, neither wins nor gets a gradient.
    """

    criteria: Criteria

    def __init__(self, judge: Any, around: Callable[[TensorDict], tuple[Tensor, Tensor]]) -> None:
        """Make a judge.

        Args:
            judge: a module that is a `Comparator`.
            around: contexts to pictures `[R, C, H, W]` and masks `[R, 1, H, W]`, 1 where candidates are shown.
        """
        super().__init__()
        self.judge, self.criteria, self._around = judge, judge.criteria, around

    def compare(self, questions: Questions, a: Tensor, b: Tensor) -> Tensor:
        """Log-odds `[R]` that the first is better; `ValueError` as the judge, or as `check_mask`."""
        picture, mask = self._around(questions.context)
        margin: Tensor = self.judge.compare(questions, paste(a, picture, mask), paste(b, picture, mask))
        return margin


Score = Callable[[Questions, Tensor], Tensor]
"""Questions and candidates `[R, ...]` to how good each is, `[R]`."""


def best_and_worst(
    criteria: Criteria, score: Score, rollout: Rollout, candidates: Sequence[Tensor]
) -> tuple[Questions, Tensor, Tensor]:
    """Every question about a rollout, with its best and its worst candidate.

    Args:
        criteria: what is asked.
        score: how good a candidate is by a criterion.
        rollout: `B` samples.
        candidates: `M` answers `[B, ...]` to each sample's context.

    Returns:
        the questions, and two tensors `[R, ...]`.
    """
    questions, answers = criteria.questions(rollout), torch.stack(list(candidates), 1)
    shown = answers[questions.row]
    scores = torch.stack([score(questions, shown[:, place]) for place in range(len(candidates))], 1)
    rows = torch.arange(len(questions), device=shown.device)
    return questions, shown[rows, scores.argmax(1)], shown[rows, scores.argmin(1)]


def labelled_pairs(
    criteria: Criteria, score: Score, rollout: Rollout, candidates: Sequence[Tensor], wrong: float, rng: torch.Generator
) -> dict[str, Tensor]:
    """Columns for `PairwiseVerdictObjective`: of each question the best and the worst candidate, in random order.

    Args:
        criteria, score, rollout, candidates: see `best_and_worst`.
        wrong: share of the labels that are turned around.

    Returns:
        `first, second [B, K, ...]`, `label [B, K]` (1 if the first is said to be better) and `asked`, bool `[B, K]`.

    Raises:
        ValueError: a share outside [0, 1].
    """
    if not 0 <= wrong <= 1:
        raise ValueError(f"labelled_pairs: wrong={wrong}; expected a share in [0, 1]")
    questions, best, worst = best_and_worst(criteria, score, rollout, candidates)
    ahead, flipped = torch.rand(2, len(questions), generator=rng, device=rng.device)
    ahead, flipped = ahead < 0.5, flipped < wrong
    wide = ahead.view(-1, *[1] * (best.ndim - 1))
    asked = torch.zeros(len(rollout), len(criteria.names), dtype=torch.bool, device=best.device)
    asked[questions.row, questions.place] = True

    def spread(values: Tensor) -> Tensor:
        table = values.new_zeros(*asked.shape, *values.shape[1:])
        table[asked] = values
        return table

    return {
        "first": spread(torch.where(wide, best, worst)),
        "second": spread(torch.where(wide, worst, best)),
        "label": spread((ahead != flipped).float()),
        "asked": asked,
    }
