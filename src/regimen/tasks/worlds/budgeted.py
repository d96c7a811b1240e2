"""How answers to questions are measured under a token budget that the prompt states."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from regimen.rollout import Rollout
from regimen.tasks.text import Row, Template, TextEvaluator


def tokens(rollout: Rollout) -> Tensor:
    """`[B]`, tokens of the answer, its end included: those that `LengthReward` counts."""
    return rollout.loss_mask.sum(1)


def budgeted_evaluator(
    rows: Sequence[Row],
    template: Template,
    solved: Callable[[Rollout], Tensor],
    budget: int,
    *,
    slack: float = 1.25,
    batch_size: int = 500,
) -> TextEvaluator:
    """Measures `accuracy`, mean `tokens`, and `accuracy_cut`, under one budget whatever was trained with.

    Args:
        rows: held-out rows with `question` and `answer`.
        template: states the budget, `{token_budget}`.
        solved: bool `[B]`, whether an answer has come to its end and is right.
        budget: tokens.
        slack: for `accuracy_cut`, an answer is cut at `slack * budget` tokens, which the unfinished do not survive.
        batch_size: rows that are answered at once.
    """

    def solved_in_time(rollout: Rollout) -> Tensor:
        return solved(rollout) & (tokens(rollout) <= slack * budget)

    measures = {"accuracy": solved, "tokens": tokens, "accuracy_cut": solved_in_time}
    knobs, fields = {"token_budget": budget}, ["question", "answer"]
    return TextEvaluator(rows, template, measures, knobs=knobs, fields=fields, batch_size=batch_size)
