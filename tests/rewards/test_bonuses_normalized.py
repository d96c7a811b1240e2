"""Rewards divided by their running deviation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bonus_worlds import restored, scored, walked, wandering

from regimen.checkers import check
from regimen.knobs import Knob, Knobs
from regimen.rewards import (
    CountBonus,
    EnvironmentReward,
    FirstApplicable,
    NormalizedReward,
    Scene,
    Score,
    judge,
    reward_from,
)
from regimen.rewards.normalized import RunningMoments
from regimen.rollout import Rollout

ENVIRONMENT = EnvironmentReward()


def paid(values: list[list[float]], mask: list[list[bool]] | None = None, task: str = "walk") -> Rollout:
    reward = torch.tensor(values)
    exists = torch.ones_like(reward, dtype=torch.bool) if mask is None else torch.tensor(mask)
    group = torch.zeros(len(reward), dtype=torch.int64)
    return Rollout.create(task=task, group=group, mask=exists, step_columns={"env_reward": reward})


def drawn(count: int = 3, scale: float = 1.0, seed: int = 0, task: str = "walk") -> list[Rollout]:
    rng = torch.Generator().manual_seed(seed)
    return [paid((scale * torch.randn(4, 5, generator=rng) + 2 * scale).tolist(), task=task) for _ in range(count)]


def test_a_batch_is_taken_in_before_it_is_divided() -> None:
    assert scored(NormalizedReward(ENVIRONMENT), paid([[1.0, 3.0]])).tolist() == [[1, 3]]
    assert scored(NormalizedReward(ENVIRONMENT), paid([[2.0, 6.0]])).tolist() == [[1, 3]]


def test_cumulative_moments_are_those_of_everything_so_far() -> None:
    reward, seen = NormalizedReward(ENVIRONMENT), []
    for piece in drawn():
        seen.append(piece["env_reward"])
        deviation = torch.cat(seen).std(correction=0)
        assert torch.allclose(scored(reward, piece), piece["env_reward"] / deviation)


def test_centred_values_have_mean_zero_and_deviation_one() -> None:
    normalized = scored(NormalizedReward(ENVIRONMENT, center=True), drawn(1)[0])
    assert float(normalized.mean()) == pytest.approx(0, abs=1e-6)
    assert float(normalized.std(correction=0)) == pytest.approx(1)


def test_exponential_moments_are_averages_over_batches() -> None:
    moments = RunningMoments()
    moments.update(torch.tensor([1.0, 3.0]), decay=0.9)
    assert (moments.mean, moments.variance) == (2, 1)
    moments.update(torch.tensor([10.0]), decay=0.9)
    square = 0.9 * 5 + 0.1 * 100
    assert moments.mean == pytest.approx(2.8)
    assert moments.variance == pytest.approx(square - 2.8**2)


def test_exponential_moments_forget_and_cumulative_ones_do_not() -> None:
    averaged, lasting = (NormalizedReward(ENVIRONMENT, kind, decay=0.5) for kind in ("ema", "cumulative"))  # type: ignore[arg-type]
    for piece in [*drawn(3, scale=100.0), *drawn(20, scale=1.0, seed=1)]:
        forgot, kept = scored(averaged, piece), scored(lasting, piece)
    assert float(forgot.std()) == pytest.approx(1, rel=0.3)
    assert float(kept.std()) < 0.1


def test_steps_that_do_not_exist_do_not_count() -> None:
    rollout = paid([[1.0, 3.0, 99.0]], [[True, True, False]])
    assert scored(NormalizedReward(ENVIRONMENT), rollout).tolist() == [[1, 3, 0]]
    centred, _ = judge(NormalizedReward(ENVIRONMENT, center=True), rollout, Scene())
    assert centred.reward.tolist() == [[-1, 1, 0]]


def test_samples_that_did_not_score_do_not_count() -> None:
    @reward_from
    def some(rollout: Rollout) -> Score:
        return Score.of(torch.tensor([1.0, 3.0, 77.0]), torch.tensor([True, True, False]))

    judged, report = judge(NormalizedReward(some), paid([[0.0]] * 3), Scene())
    assert judged.reward.tolist() == [1, 3, 0]
    assert judged.loss_mask.flatten().tolist() == [True, True, False]
    assert report.counts["walk", "some"] == (2, 1, 0)


def test_constant_values_are_left_as_they_are() -> None:
    assert scored(NormalizedReward(ENVIRONMENT), paid([[0.1, 0.1, 0.1]])).tolist() == [pytest.approx([0.1] * 3)]
    assert scored(NormalizedReward(ENVIRONMENT), paid([[0.0, 0.0]])).tolist() == [[0, 0]]


@pytest.mark.parametrize("center", [False, True])
def test_per_task_the_scale_of_a_tasks_rewards_does_not_matter(center: bool) -> None:
    plain, scaled = (NormalizedReward(ENVIRONMENT, per="task", center=center) for _ in range(2))
    for small, large, other in zip(drawn(), drawn(scale=100.0), drawn(seed=1, task="run"), strict=True):
        a, b = scored(plain, Rollout.cat([small, other])), scored(scaled, Rollout.cat([large, other]))
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_moments_of_a_task_do_not_depend_on_its_place() -> None:
    first, second = drawn(1)[0], drawn(1, 5.0, 1, "run")[0]
    plain, turned = (NormalizedReward(ENVIRONMENT, per="task") for _ in range(2))
    for _ in range(2):
        a = scored(plain, Rollout.cat([first, second]))
        b = scored(turned, Rollout.cat([second, first]))
        assert torch.equal(a, torch.cat([b[4:], b[:4]]))


def test_components_are_logged_raw() -> None:
    judged, _ = judge(NormalizedReward(ENVIRONMENT), paid([[2.0, 6.0]]), Scene())
    assert judged.rewards["environment"].tolist() == [[2, 6]]
    assert judged.reward.tolist() == [[1, 3]]


def test_the_weight_of_a_named_bonus_is_a_knob() -> None:
    bonus = CountBonus("episodic", form="first") * CountBonus()
    reward = ENVIRONMENT + 0.5 * NormalizedReward(bonus, name="bonus")
    assert {knob.name: knob.default for knob in reward.knobs} == {"weight/environment": 1.0, "weight/bonus": 0.5}
    rollout = walked(["ABAC"]).with_step_columns(env_reward=torch.tensor([[0.0, 0.0, 1.0]]))
    raw = scored(CountBonus("episodic", form="first") * CountBonus(), rollout)
    expected = rollout["env_reward"] + 0.5 * raw / raw.std(correction=0)
    assert torch.allclose(scored(reward, rollout), expected)
    assert torch.equal(scored(reward, rollout, **{"weight/bonus": 0.0}), rollout["env_reward"])
    given = ENVIRONMENT + Knob("beta", 0.5) * NormalizedReward(CountBonus())
    assert "beta" in Knobs.of(given)


def test_a_reward_that_stands_twice_is_taken_in_once() -> None:
    once, twice = NormalizedReward(ENVIRONMENT), NormalizedReward(ENVIRONMENT)
    for piece in drawn():
        expected = scored(once, piece)
        assert torch.equal(scored(twice.when(twice, above=-100.0), piece), expected)
    assert twice.save_state() == once.save_state()


@pytest.mark.parametrize("options", [{}, {"moments": "ema", "decay": 0.7}, {"per": "task", "center": True}])
def test_a_restored_reward_goes_on(options: dict[str, Any]) -> None:
    def build() -> Any:
        return ENVIRONMENT + 0.1 * NormalizedReward(CountBonus("episodic"), **options).on("walk")

    def paying(piece: Rollout) -> Rollout:
        return piece.with_step_columns(env_reward=torch.ones(piece.mask.shape))

    first, *others = [paying(piece) for piece in wandering(copies=3, steps=6, pieces=3)]
    reward = build()
    scored(reward, first)
    assert reward.state_dict().keys() == {"episodic_count", "normalized"}
    resumed = restored(reward, build())
    for piece in others:
        assert torch.equal(scored(reward, piece), scored(resumed, piece))


def test_normalizing_a_normalized_reward_needs_two_names() -> None:
    with pytest.raises(ValueError, match="are called normalized; give one another name"):
        NormalizedReward(ENVIRONMENT) + NormalizedReward(CountBonus())
    with pytest.raises(ValueError, match="are called environment"):
        NormalizedReward(ENVIRONMENT, name="environment")
    assert len(list((NormalizedReward(ENVIRONMENT) + NormalizedReward(CountBonus(), name="bonus")).remembering())) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"moments": "window"}, "moments 'window', per 'None', decay 0.99; expected one of cumulative, ema"),
        ({"per": "group"}, "per 'group'"),
        ({"moments": "ema", "decay": 1.0}, "decay 1.0; expected"),
    ],
)
def test_unknown_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NormalizedReward(ENVIRONMENT, **options)


def test_a_reward_that_is_only_logged_is_refused() -> None:
    with pytest.raises(ValueError, match="'environment', which is only logged and has no total"):
        NormalizedReward(ENVIRONMENT.logged())


def test_it_passes_the_checks_and_is_left_as_it_was() -> None:
    piece = wandering(copies=4, steps=5, pieces=1)[0].with_step_columns(env_reward=torch.rand(4, 5))
    bonus = NormalizedReward(CountBonus("episodic", form="first") * CountBonus(), name="bonus")
    reward = ENVIRONMENT + 0.1 * bonus
    before = reward.state_dict()
    assert check(reward, piece).messages == []
    assert bonus.save_state() == {"moments": {}}
    assert reward.state_dict().keys() == before.keys()
    assert check(NormalizedReward(FirstApplicable(ENVIRONMENT), per="task", center=True), piece).messages == []
