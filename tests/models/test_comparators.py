"""Which criteria are asked of which task, what a judge is told, and how pairs are labelled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from regimen.models.comparators import Criteria, EncoderComparator, Questions, labelled_pairs, preference
from regimen.rollout import Rollout

CRITERIA = Criteria({"fill": ("brightness", "contrast"), "remove": ("darkness",)})


class Beside(nn.Module):
    """A candidate's numbers beside the condition."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 + 5, 6)

    def forward(self, candidate: Tensor, context: TensorDict, condition: Tensor) -> Tensor:
        seen: Tensor = self.layer(torch.cat([candidate, condition], 1)).tanh()
        return seen


def rollout(*tasks: str, rows: int = 4, **columns: Any) -> Rollout:
    parts = [
        Rollout.create(task=task, group=torch.arange(rows), mask=torch.ones(rows, 1, dtype=torch.bool),
                       context={"x": torch.arange(rows)}, columns={n: v for n, v in columns.items()})
        for task in tasks
    ]  # fmt: skip
    return Rollout.cat(parts)


def said(told: tuple[str, ...], samples: Rollout) -> tuple[Questions, Tensor]:
    torch.manual_seed(0)
    judge = EncoderComparator(Beside(), 6, CRITERIA, told)
    questions = CRITERIA.questions(samples)
    same = torch.tensor([[0.3, -0.2, 0.5]]).expand(len(questions), -1)
    return questions, judge.compare(questions, same, -same).detach()


def test_each_task_is_asked_its_own_criteria_whatever_the_order_of_tasks() -> None:
    for tasks in (("fill", "remove"), ("remove", "fill"), ("remove", "other", "fill")):
        samples = rollout(*tasks, rows=2)
        questions = CRITERIA.questions(samples)
        found = list(zip(questions.task, questions.criterion, strict=True))
        assert sorted(found) == [("fill", "brightness")] * 2 + [("fill", "contrast")] * 2 + [("remove", "darkness")] * 2
        assert len(questions) == 6
        assert [CRITERIA.names[k] for k in questions.place.tolist()] == list(questions.criterion)


def test_a_judge_tells_questions_apart_only_by_what_it_is_told() -> None:
    samples = rollout("fill", "remove", rows=1)
    for told, different in ((("task", "criterion"), 3), (("criterion",), 3), (("task",), 2), ((), 1)):
        _, margin = said(told, samples)
        assert len({round(float(m), 6) for m in margin}) == different


def test_the_order_of_tasks_in_a_batch_changes_nothing() -> None:
    one, forward = said(("task", "criterion"), rollout("fill", "remove", rows=1))
    other, backward = said(("task", "criterion"), rollout("remove", "fill", rows=1))
    assert dict(zip(one.criterion, forward.tolist(), strict=True)) == pytest.approx(
        dict(zip(other.criterion, backward.tolist(), strict=True))
    )


def test_preferences_of_a_pair_and_of_the_swapped_pair_add_up_to_one() -> None:
    torch.manual_seed(1)
    judge, questions = EncoderComparator(Beside(), 6, CRITERIA), CRITERIA.questions(rollout("fill"))
    a, b = torch.randn(2, len(questions), 3)
    assert torch.allclose(preference(judge, questions, a, b) + preference(judge, questions, b, a), torch.ones(8))
    assert torch.allclose(preference(judge, questions, a, a), torch.full((8,), 0.5))
    assert not torch.allclose(judge.compare(questions, a, a), torch.zeros(8))  # The place itself has weight.


def bright(questions: Questions, images: Tensor) -> Tensor:
    sign = torch.tensor([-1.0 if name == "darkness" else 1.0 for name in questions.criterion])
    return sign * images.sum(1)


def test_best_and_worst_are_paired_by_each_criterion_in_random_order() -> None:
    candidates = [torch.full((50, 3), value) for value in (0.0, 2.0, 1.0)]
    samples = Rollout.cat([rollout("fill", rows=25), rollout("remove", rows=25)])
    found = labelled_pairs(CRITERIA, bright, samples, candidates, 0.0, torch.Generator().manual_seed(0))
    assert found["asked"].tolist() == [[True, True, False]] * 25 + [[False, False, True]] * 25
    first, second = found["first"][..., 0][found["asked"]], found["second"][..., 0][found["asked"]]
    assert {frozenset(pair) for pair in zip(first.tolist(), second.tolist(), strict=True)} == {frozenset((0.0, 2.0))}
    dark = torch.tensor([False] * 50 + [True] * 25)
    assert torch.equal(found["label"][found["asked"]] == 1, (first > second) != dark)
    assert 20 < int((first > second).sum()) < 55


def test_a_share_of_the_labels_is_wrong() -> None:
    candidates = [torch.zeros(4000, 1), torch.ones(4000, 1)]
    samples = rollout("remove", rows=4000)
    found = labelled_pairs(CRITERIA, bright, samples, candidates, 0.1, torch.Generator().manual_seed(0))
    right = (found["label"] == 1) == (found["first"] < found["second"]).squeeze(2)
    assert float(right[found["asked"]].float().mean()) == pytest.approx(0.9, abs=0.02)


def test_what_cannot_be_asked_is_named() -> None:
    judge, samples = EncoderComparator(Beside(), 6, CRITERIA), rollout("remove", rows=1)
    questions = CRITERIA.questions(samples, torch.tensor([[True, False, False]]))
    with pytest.raises(ValueError, match="'brightness' does not apply to task 'remove', whose criteria are: darkness"):
        judge.compare(questions, torch.zeros(1, 3), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="names no criterion"):
        Criteria({"fill": ()})
    with pytest.raises(ValueError, match="has colour; expected task, criterion"):
        EncoderComparator(Beside(), 6, CRITERIA, ("task", "colour"))
    with pytest.raises(ValueError, match=r"wrong=2; expected a share"):
        labelled_pairs(CRITERIA, bright, samples, [torch.zeros(1, 1)], 2, torch.Generator())
