"""Random network distillation and NovelD."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bonus_worlds import scored, walked, wandering
from torch import Tensor

from regimen.cast import Cast
from regimen.checkers import check
from regimen.learn import Learner
from regimen.memory import NewestRollout
from regimen.models.torsos import OneHotTorso
from regimen.objectives import FeatureDistillation
from regimen.rewards import CountBonus, EllipticalBonus, NovelDBonus, RandomDistillationBonus, Scene
from regimen.update import Update


def saying(*rows: list[float]) -> Any:
    """A member whose features of state n are the n-th row."""
    return lambda states: torch.tensor(rows)[states]


def errors_of(*errors: float) -> dict[str, Any]:
    """A cast whose predictor is wrong by so much in states A, B, ..."""
    return {"bonus_target": saying(*[[0.0]] * len(errors)), "bonus_predictor": saying(*[[e] for e in errors])}


def novelty(alpha: float, *errors: float) -> Tensor:
    """The bonus of the step from A to B."""
    return scored(NovelDBonus(RandomDistillationBonus(), alpha), walked(["AB"]), errors_of(*errors))[0, 0]


def test_the_bonus_is_the_plain_norm_of_the_error_after_the_step() -> None:
    cast = {"bonus_target": saying([1.0, 1.0], [0.0, 0.0]), "bonus_predictor": saying([1.0, 1.0], [3.0, 4.0])}
    assert scored(RandomDistillationBonus(), walked(["ABA"], ["AA"]), cast).tolist() == [[5, 0], [0, 0]]


@pytest.mark.parametrize(("alpha", "after", "expected"), [(0.1, 0.8, 0.75), (0.1, 0.04, 0.0), (0.0, 0.8, 0.8)])
def test_noveld_is_that_of_the_worked_examples(alpha: float, after: float, expected: float) -> None:
    assert float(novelty(alpha, 0.5, after)) == pytest.approx(expected)


def test_noveld_with_alpha_zero_is_rnd() -> None:
    cast = errors_of(0.3, -0.2, 0.9, 0.5)
    for piece in wandering(copies=3, steps=6, pieces=2):
        rnd = RandomDistillationBonus()
        assert torch.equal(scored(NovelDBonus(rnd, 0.0), piece, cast), scored(rnd, piece, cast))


def test_factors_of_learned_and_counted_novelty_multiply() -> None:
    cast = {"bonus_encoder": lambda states: torch.eye(26)[states], **errors_of(0.0, 2.0, 3.0)}
    rollout = walked(["ABCB"])
    assert scored(EllipticalBonus(ridge=1.0) * RandomDistillationBonus(), rollout, cast)[0].tolist() == [2, 3, 1]
    first = CountBonus("episodic", form="first")
    noveld = NovelDBonus(RandomDistillationBonus(), 0.5)
    assert scored(noveld * first, rollout, cast)[0].tolist() == [2, 2, 0]


def test_training_the_predictor_takes_the_bonus_from_what_was_visited() -> None:
    torch.manual_seed(0)
    target = torch.nn.Sequential(OneHotTorso(4), torch.nn.Linear(4, 8)).requires_grad_(False)
    cast = Cast(bonus_target=target, bonus_predictor=torch.nn.Sequential(OneHotTorso(4), torch.nn.Linear(4, 8, False)))
    rollout, bonus = walked(["ABABAB"]), RandomDistillationBonus()
    visits = walked(["ABACD"])
    before = scored(bonus, visits, cast)[0]
    update = Update(FeatureDistillation(distance="norm"), ["bonus_predictor"], learning_rate=0.03)
    memory, learner = NewestRollout(), Learner(update, cast)
    memory.add(rollout)
    for _ in range(100):
        learner.learn(memory, cast, {}, torch.Generator())
    after = scored(bonus, visits, cast)[0]
    assert bool((after[:2] < 0.15 * before[:2]).all())
    assert bool((after[2:] > 0.9 * before[2:]).all())


def test_they_pass_the_checks() -> None:
    piece, cast = wandering(copies=4, steps=5, pieces=1)[0], errors_of(0.3, -0.2, 0.9, 0.5)
    rnd = RandomDistillationBonus()
    for part in (rnd, NovelDBonus(rnd), 0.1 * NovelDBonus(rnd, 0.5) * CountBonus("episodic") + rnd):
        assert check(part, piece, cast=cast).messages == []


def test_a_negative_alpha_is_refused() -> None:
    with pytest.raises(ValueError, match=r"alpha is -0.1, expected at least 0"):
        NovelDBonus(RandomDistillationBonus(), -0.1)


@pytest.mark.parametrize(
    ("cast", "message"),
    [
        ({"bonus_target": saying([1.0], [1.0])}, "needs the member 'bonus_predictor'"),
        (
            {"bonus_target": saying([1.0], [1.0]), "bonus_predictor": saying([1.0, 2.0], [1.0, 2.0])},
            "predictor 'bonus_predictor' gave features of width 2 and target 'bonus_target' of width 1",
        ),
        (errors_of(0.0, float("inf")), "member 'bonus_predictor' gave features that are NaN or infinite"),
    ],
)
def test_members_that_do_not_fit_are_refused(cast: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandomDistillationBonus().score(walked(["AB"]), Scene(cast))
