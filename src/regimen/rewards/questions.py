"""What a question is worth that a policy has written: as hard as it can be and still solved, and unlike the others.

The rollout holds both roles: the proposals, and the answers to them. Columns link them: `question_number`, equal for a
proposal and the answers to it, and the texts `question` and `reference` (the answer that its writer gave).
Source: PasoDoble (arXiv 2511.11881).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from regimen.functions.answers import boxed_text
from regimen.functions.pass_rate import pass_rate
from regimen.rewards.base import SCORED, Expression, Reward, Scene, Score
from regimen.rewards.text import field_of
from regimen.rollout import Rollout

Rule = Callable[[str, str], bool]
"""Whether something is wrong with a question and its reference answer."""

RULES: dict[str, Rule] = {
    "missing": lambda question, reference: not question.strip() or not reference.strip(),
    "answer_in_question": lambda question, reference: bool(reference) and reference in question,
    "question_in_answer": lambda question, reference: bool(question) and question in reference,
    "boxed": lambda question, reference: boxed_text(question) is not None,
    "stated": lambda question, reference: f" = {reference} " in f" {question} ",
}
"""By name. `stated` is for domains whose answers are parts of most questions, where `answer_in_question` finds all
guilty: the answer stands behind an equals sign."""


def proposer_reward(
    rate: Tensor,
    diversity: Tensor,
    *,
    low: float = 0.2,
    diversity_floor: float = 0.3,
    base: float = 0.1,
    diversity_weight: float = 0.2,
) -> Tensor:
    """`1 - p + base + diversity_weight * d`, and 0 where `p <= low` or `d <= diversity_floor`.

    A question that (almost) nobody solves is taken for wrong; of the others the hardest is worth most.

    Args:
        rate: `[J]`, pass rates `p`; diversity: `[J]`, `d`.
        low, diversity_floor, base, diversity_weight: see above.

    Raises:
        ValueError: other shapes.
    """
    if rate.shape != diversity.shape:
        raise ValueError(f"proposer_reward: rate {list(rate.shape)}, diversity {list(diversity.shape)}; expected equal")
    worth = 1 - rate + base + diversity_weight * diversity
    return torch.where((rate > low) & (diversity > diversity_floor), worth, 0)


def jaccard(a: Collection[Hashable], b: Collection[Hashable]) -> float:
    """Shared elements over all elements of two sets; 1 of two empty ones."""
    first, second = set(a), set(b)
    return len(first & second) / len(first | second) if first or second else 1.0


def question_diversity(
    question: Collection[Hashable], history: Sequence[Collection[Hashable]], similar: float = 0.8
) -> float:
    """The share of a history whose Jaccard index with a question is at most `similar`; 1 of an empty history."""
    if not history:
        return 1.0
    return sum(jaccard(question, other) <= similar for other in history) / len(history)


def words(text: str) -> list[str]:
    """The parts of a text between spaces."""
    return text.split()


class QuestionGuard(Reward):
    """1 for a question that breaks no rule, 0 for one that does, `[B]`, component `valid`."""

    name = "valid"

    def __init__(self, rules: Iterable[str] = ("missing", "answer_in_question", "question_in_answer", "boxed")) -> None:
        """Make it of some of the `RULES`, by name; `ValueError` for one that there is not."""
        self.rules = tuple(rules)
        if odd := sorted(set(self.rules) - set(RULES)):
            raise ValueError(f"QuestionGuard: rule '{odd[0]}' is not one of {', '.join(RULES)}")

    def reasons(self, question: str, reference: str) -> tuple[str, ...]:
        """The rules that a question with its reference answer breaks."""
        return tuple(name for name in self.rules if RULES[name](question, reference))

    def score(self, rollout: Rollout, scene: Scene) -> Tensor:
        """Of every row's question."""
        pairs = zip(field_of(rollout, "question"), field_of(rollout, "reference"), strict=True)
        return torch.tensor([float(not self.reasons(*pair)) for pair in pairs], device=rollout.mask.device)


class PassRate(Reward):
    """The mean score of the answers to a row's question, `[B]`, of proposals and answers alike; component `pass_rate`.

    0 for a question that is not valid, or has no answer that could be scored.
    """

    name = "pass_rate"
    # A question and its answers are of different groups, which must not be asked about apart.
    stateful = True

    def __init__(self, answers: Expression, guard: QuestionGuard | None = None) -> None:
        """Make it.

        Args:
            answers: scores the answers, each `[B]`, such as `AnswerReward(...).on("solver")`. It is asked once, also if
                it stands in the stage's reward beside this one.
            guard: says which questions are valid; all by default.
        """
        self.answers, self.guard = answers, guard

    def score(self, rollout: Rollout, scene: Scene) -> Tensor:
        """Of every row's question.

        Raises:
            ValueError: answers that are only logged, or are scored step by step.
        """
        judged = self.answers.judge(rollout, scene).total
        if judged is None or judged.value.ndim != 1:
            raise ValueError("PassRate: answers have no total per sample; give it a reward [B] that is not .logged()")
        number, scored = rollout["question_number"], judged.status == SCORED
        rates = torch.zeros(int(number.max()) + 1 if len(number) else 0, device=number.device)
        rates[number[scored].unique()] = pass_rate(judged.value[scored], number[scored])
        return rates[number] if self.guard is None else rates[number] * _values(self.guard, rollout, scene)


class QuestionDiversity(Reward):
    """How unlike the last questions a new one is, `[B]`, of the proposals; component `diversity`.

    See `question_diversity`; a question is the set of its tokens. All of a rollout are compared with what was there
    before, and then enter the history, if the pass rate of any of them is above `low`; without a text, none does.
    """

    name = "diversity"
    stateful = True

    def __init__(
        self,
        rate: PassRate,
        *,
        low: float = 0.2,
        history: int = 100,
        similar: float = 0.8,
        tokens: Callable[[str], Sequence[Hashable]] = words,
        task: str = "proposer",
    ) -> None:
        """Make it with an empty history.

        Args:
            rate: of the questions.
            low: see above.
            history: how many of the last questions are remembered.
            similar: questions of a larger Jaccard index are alike.
            tokens: of a text; at spaces by default. Words or whole numbers, so that they can be stored.
            task: whose rows are the proposals.

        Raises:
            ValueError: no room for a history.
        """
        if history < 1:
            raise ValueError(f"QuestionDiversity: history is {history}, expected at least 1")
        self.rate, self.low, self.similar, self.tokens, self.task = rate, low, similar, tokens, task
        self.history: deque[frozenset[Hashable]] = deque(maxlen=history)

    def score(self, rollout: Rollout, scene: Scene) -> Score:
        """The diversity of every proposal."""
        proposed = of_task(rollout, self.task)
        texts, rows = field_of(rollout, "question"), proposed.nonzero().flatten()
        told = [frozenset(self.tokens(texts[row])) for row in rows.tolist()]
        rate, history = _values(self.rate, rollout, scene), list(self.history)
        unlike = [question_diversity(question, history, self.similar) for question in told]
        if bool((rate[proposed] > self.low).any()):
            self.history.extend(filter(None, told))
        values = rate.new_zeros(len(rollout)).index_copy(0, rows, rate.new_tensor(unlike))
        return Score.of(values, proposed)

    def save_state(self) -> dict[str, Any]:
        """The history, the oldest question first."""
        return {"history": [sorted(question, key=str) for question in self.history]}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self.history.clear()
        self.history.extend(frozenset(question) for question in state["history"])


class ProposerReward(Reward):
    """What a proposal is worth, `[B]`, see `proposer_reward`; component `proposal`. Not applicable to answers."""

    name = "proposal"

    def __init__(
        self,
        rate: PassRate,
        diversity: QuestionDiversity,
        *,
        low: float = 0.2,
        diversity_floor: float = 0.3,
        base: float = 0.1,
        diversity_weight: float = 0.2,
        task: str = "proposer",
    ) -> None:
        """Make it.

        Args:
            rate, diversity: of the questions; both are asked once, also if they stand beside it to be logged.
            low, diversity_floor, base, diversity_weight: see `proposer_reward`.
            task: whose rows are the proposals.
        """
        self.rate, self.diversity, self.task = rate, diversity, task
        self.low, self.diversity_floor, self.base, self.diversity_weight = low, diversity_floor, base, diversity_weight

    def score(self, rollout: Rollout, scene: Scene) -> Score:
        """Of every proposal."""
        value = proposer_reward(
            _values(self.rate, rollout, scene),
            _values(self.diversity, rollout, scene),
            low=self.low,
            diversity_floor=self.diversity_floor,
            base=self.base,
            diversity_weight=self.diversity_weight,
        )
        return Score.of(value, of_task(rollout, self.task))


def of_task(rollout: Rollout, task: str) -> Tensor:
    """Bool `[B]`, the rows of a task."""
    if task not in rollout.task_names:
        return torch.zeros(len(rollout), dtype=torch.bool, device=rollout.task.device)
    return rollout.task == rollout.task_names.index(task)


def _values(part: Reward, rollout: Rollout, scene: Scene) -> Tensor:
    """What a component scores; `ValueError` with its reason if it failed."""
    total = part.judge(rollout, scene).total
    assert total is not None, "a single component has a total"
    if total.errors and not bool(total.scored.any()):
        raise ValueError(total.errors[0])
    return total.value
