"""The elliptical episodic bonus."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from bonus_worlds import restored, scored, walked, wandering
from torch import Tensor, nn

from regimen.checkers import check
from regimen.rewards import EllipticalBonus, Scene, elliptical_step, judge
from regimen.rollout import Rollout

PHI = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])


class Table(nn.Module):
    """Numbers of states to rows of a table."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows.clone())

    def forward(self, states: Tensor) -> Tensor:
        return self.rows[states]


def cast_of(rows: Tensor) -> dict[str, Any]:
    return {"bonus_encoder": Table(rows)}


def visited(inverse: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """One copy's bonuses for features `[R, D]` in order, and its last inverse."""
    inverse = inverse.clone()
    return torch.cat([elliptical_step(inverse, phi[None]) for phi in features]), inverse


def test_bonuses_and_inverse_are_those_of_the_worked_example() -> None:
    bonuses, inverse = visited(torch.eye(2)[None] / 0.1, PHI)
    assert bonuses.tolist() == pytest.approx([10, 0.909091, 6.571429, 1.547170], rel=1e-5)
    assert inverse[0].tolist() == [
        pytest.approx([0.429630, -0.118519], rel=1e-4),
        pytest.approx([-0.118519, 0.607407], rel=1e-4),
    ]


def test_the_component_counts_the_start_and_pays_the_rest() -> None:
    """States A to D have the features of the worked example."""
    values = scored(EllipticalBonus(ridge=0.1), walked(["ABCD"]), cast_of(PHI))
    assert values[0].tolist() == pytest.approx([0.909091, 6.571429, 1.547170], rel=1e-5)


def test_with_unit_vectors_it_counts_visits() -> None:
    ridge = 0.1
    values = scored(EllipticalBonus(ridge=ridge), walked(["ABABACAA"]), cast_of(torch.eye(3)))
    earlier = [0, 1, 1, 2, 0, 3, 4]
    assert values[0].tolist() == pytest.approx([1 / (k + ridge) for k in earlier])


def test_the_first_bonus_is_the_squared_norm_over_the_ridge() -> None:
    features = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    bonus = elliptical_step((torch.eye(5) / 0.3).repeat(7, 1, 1), features)
    assert torch.allclose(bonus, features.square().sum(1) / 0.3)


def test_the_order_of_two_visits_does_not_change_the_inverse() -> None:
    start = torch.eye(2)[None].double() / 0.1
    pair = PHI[[0, 2]].double()
    assert torch.allclose(visited(start, pair)[1], visited(start, pair.flip(0))[1])


def test_a_feature_of_zero_changes_nothing() -> None:
    _, inverse = visited(torch.eye(2)[None] / 0.1, PHI)
    after = inverse.clone()
    assert float(elliptical_step(after, torch.zeros(1, 2))) == 0
    assert torch.equal(after, inverse)


@pytest.mark.parametrize("width", [8, 64])
def test_the_updated_inverse_is_the_inverse_of_the_sum_in_float32(width: int) -> None:
    features = torch.randn(200, width, generator=torch.Generator().manual_seed(0))
    features = features / features.norm(dim=1, keepdim=True).clamp(min=1)
    bonuses, inverse = visited(torch.eye(width)[None] / 0.1, features)
    exact = torch.linalg.inv(0.1 * torch.eye(width).double() + features.double().T @ features.double())
    assert float((inverse[0] - exact).abs().max()) < 1e-5
    assert torch.equal(inverse, inverse.transpose(1, 2))
    assert bool((bonuses >= 0).all())


def test_features_of_large_norm_keep_their_precision() -> None:
    """In float32 the cancellation of the update would leave less than nothing of these bonuses."""
    rows = 1000 * torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    letters = "".join(random.Random(0).choices("ABCD", k=151))
    values = scored(EllipticalBonus(), walked([letters]), cast_of(rows))[0]
    phi = rows[[ord(letter) - ord("A") for letter in letters]].double()
    for step in (1, 10, 149):
        seen, new = phi[: step + 1], phi[step + 1]
        inverse = torch.linalg.inv(0.1 * torch.eye(3).double() + seen.T @ seen)
        assert float(values[step]) == pytest.approx(float(new @ inverse @ new), rel=1e-4)


def test_every_copy_is_scored_as_if_it_were_alone() -> None:
    pieces, cast = wandering(copies=5, steps=8, pieces=3), cast_of(torch.randn(4, 3))
    together, alone = EllipticalBonus(), [EllipticalBonus() for _ in range(5)]
    for piece in pieces:
        values = scored(together, piece, cast)
        single = torch.cat([scored(bonus, piece[row : row + 1], cast) for row, bonus in enumerate(alone)])
        assert torch.allclose(values, single)


def test_stretches_of_a_copy_in_one_rollout_follow_each_other() -> None:
    pieces, cast = wandering(copies=4, steps=7, pieces=4), cast_of(torch.randn(4, 3))
    apart, joined = EllipticalBonus(), EllipticalBonus()
    for first in (0, 2):
        expected = torch.cat([scored(apart, piece, cast) for piece in pieces[first : first + 2]])
        assert torch.allclose(scored(joined, Rollout.cat(pieces[first : first + 2]), cast), expected)


def test_an_episode_goes_on_until_the_next_start() -> None:
    bonus, cast = EllipticalBonus(ridge=1.0), cast_of(torch.eye(3))
    assert scored(bonus, walked(["AB"], ["AB"]), cast).tolist() == [[1], [1]]
    assert scored(bonus, walked(["BA"], ["BA"], goes_on="0"), cast).tolist() == [[0.5], [1]]


def test_a_restored_bonus_goes_on_in_the_middle_of_episodes() -> None:
    first, second, third = wandering(copies=6, steps=9, pieces=3)
    bonus, cast = EllipticalBonus(), cast_of(torch.randn(4, 3))
    scored(bonus, first, cast)
    resumed = restored(bonus, EllipticalBonus())
    for piece in (second, third):
        assert not bool(piece["start"][:, 0].all()), "some episode goes on"
        assert torch.equal(scored(bonus, piece, cast), scored(resumed, piece, cast))


def test_steps_that_do_not_exist_leave_no_trace() -> None:
    """A shorter sample is padded with the start of an episode that nobody learns from."""
    bonus, cast = EllipticalBonus(ridge=1.0), cast_of(torch.eye(26))
    scored(bonus, walked(["ABC"], ["AB"]), cast)
    assert scored(bonus, walked(["CA"], ["BA"], goes_on="01"), cast).tolist() == [[0.5], [0.5]]


def test_tasks_have_episodes_of_their_own() -> None:
    rollout = Rollout.cat([walked(["AB"], task="left"), walked(["AB"], task="right")])
    assert scored(EllipticalBonus(ridge=1.0), rollout, cast_of(torch.eye(2))).tolist() == [[1], [1]]


def test_no_gradient_is_kept() -> None:
    bonus, cast = EllipticalBonus(), cast_of(PHI)
    assert not bonus.score(walked(["ABCD"]), Scene(cast)).requires_grad
    assert not bonus.save_state()["inverse"]["walk"].requires_grad


def test_it_passes_the_checks() -> None:
    pieces = wandering(copies=4, steps=5, pieces=2)
    assert check(EllipticalBonus(), Rollout.cat(pieces), cast=cast_of(PHI)).messages == []


@pytest.mark.parametrize("ridge", [0.0, -1.0, float("nan")])
def test_a_ridge_that_is_not_positive_is_refused(ridge: float) -> None:
    with pytest.raises(ValueError, match=f"ridge is {ridge}, expected above 0"):
        EllipticalBonus(ridge=ridge)


def test_another_feature_width_is_refused_with_both() -> None:
    bonus = EllipticalBonus()
    scored(bonus, walked(["AB"]), cast_of(torch.eye(3)))
    with pytest.raises(ValueError, match="'bonus_encoder' gave features of width 4, and of width 3 before"):
        bonus.score(walked(["AB"]), Scene(cast_of(torch.eye(4))))


def test_features_that_are_nan_fail_the_batch_and_leave_the_memory_alone() -> None:
    bonus, spoilt = EllipticalBonus(ridge=1.0), torch.eye(3)
    scored(bonus, walked(["AB"]), cast_of(torch.eye(3)))
    spoilt[1, 1] = torch.nan
    with pytest.raises(ValueError, match="member 'bonus_encoder' gave features that are NaN or infinite"):
        bonus.score(walked(["AB"]), Scene(cast_of(spoilt)))
    _, report = judge(bonus, walked(["AB"]), Scene(cast_of(spoilt)))
    assert report.failed == 1
    assert scored(bonus, walked(["BA"], goes_on="0"), cast_of(torch.eye(3))).tolist() == [[0.5]]


@pytest.mark.parametrize(
    ("cast", "message"),
    [
        ({"policy": None}, r"needs the member 'bonus_encoder', which the cast lacks \(it has: policy\)"),
        ({"bonus_encoder": lambda states: states.float()}, r"gave features of shape \[2\] for 2 states, expected"),
    ],
)
def test_an_encoder_that_is_none_is_refused(cast: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EllipticalBonus().score(walked(["AB"]), Scene(cast))
