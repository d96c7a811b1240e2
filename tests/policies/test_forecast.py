"""Forecasters: what they say of recorded tracks, and a policy like any other where they sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from regimen.cast import Cast
from regimen.checkers import check
from regimen.credit import GroupRelativeAdvantage
from regimen.knobs import Knobs
from regimen.loop import train
from regimen.models import DestinationNetwork, NextPositionNetwork, TrackTransformer, TrajectoryNetwork
from regimen.objectives import ClippedSurrogateObjective, ReferenceKL
from regimen.policies import DestinationForecaster, NextPositionForecaster, TrajectoryForecaster
from regimen.regimen import Regimen, Stage
from regimen.rewards import reward_from
from regimen.rollout import Rollout
from regimen.tasks import PromptTask
from regimen.tasks.worlds.tracks import centred
from regimen.update import Update


def forecaster(seed: int = 0, count: int = 4, std: float = 0.1) -> TrajectoryForecaster:
    torch.manual_seed(seed)
    first, second = (TrackTransformer(16, 2, 1) for _ in range(2))
    destinations = DestinationNetwork(first, count, hidden=(16,))
    return TrajectoryForecaster(destinations, TrajectoryNetwork(second, hidden=(16,)), std)


def pasts(count: int = 6) -> TensorDict:
    past = torch.randn(count, 8, 2, generator=torch.Generator().manual_seed(1)).cumsum(1)
    return TensorDict({"past": past - past[:, -1:]}, [count])


def recorded(actions: Tensor) -> Rollout:
    return Rollout.create(
        task="t",
        group=torch.arange(len(actions)),
        mask=torch.ones(actions.shape[:2], dtype=torch.bool),
        context=pasts(len(actions)),
        actions=actions,
        knobs={"temperature": 1.0},
    )


def sample(policy: TrajectoryForecaster, count: int = 6, seed: int = 0, **knobs: float) -> Rollout:
    return policy.sample(pasts(count), Knobs.of(policy, **knobs), torch.Generator().manual_seed(seed))


def test_it_is_a_policy_by_the_checks() -> None:
    assert check(forecaster(), sample(forecaster())).messages == []


def test_the_ratio_to_itself_is_exactly_one() -> None:
    policy = forecaster()
    for temperature in (1.0, 0.5, 3.0):
        rollout = sample(policy, temperature=temperature)
        assert torch.equal(policy.distribution(rollout).logprob, rollout.logprobs)


def test_a_sample_at_temperature_zero_is_the_way_to_its_destination() -> None:
    policy = forecaster()
    rollout = sample(policy, 40, temperature=0.0)
    assert rollout.logprobs is None
    assert set(rollout["mode"].tolist()) == {0, 1, 2, 3}
    ways = policy.forecast(rollout.context["past"])
    assert ways.shape == (40, 4, 12, 2)
    assert torch.allclose(rollout.actions, ways[torch.arange(40), rollout["mode"]], atol=1e-6)


def test_noise_has_the_deviation_that_is_asked_for() -> None:
    policy = forecaster(std=0.5)
    plain, noisy = (sample(policy, 200, temperature=t) for t in (0.0, 2.0))
    assert torch.equal(plain["mode"], noisy["mode"])
    assert float((noisy.actions - plain.actions).std()) == pytest.approx(1.0, rel=0.05)


def test_a_recorded_track_is_described_on_the_way_to_the_nearest_destination() -> None:
    policy = forecaster()
    ways = policy.forecast(pasts()["past"])
    with torch.no_grad():
        destinations, _ = policy.destinations(pasts()["past"])
    actions = torch.zeros(6, 12, 2)
    actions[:, -1] = destinations[:, 2]
    found = policy.distribution(recorded(actions))
    assert torch.allclose(found.described.mean.view(6, 12, 2), ways[:, 2], atol=1e-6)
    assert torch.allclose(found.destinations, destinations)
    assert found.hidden.shape == (6, 12, 16)


def test_a_recorded_mode_is_kept_whatever_was_done() -> None:
    policy = forecaster()
    rollout = sample(policy, temperature=3.0)
    ways = policy.forecast(pasts()["past"])
    mean = policy.distribution(rollout).described.mean.view(6, 12, 2)
    assert torch.allclose(mean, ways[torch.arange(6), rollout["mode"]], atol=1e-6)


def test_states_of_both_networks_stand_at_the_step_that_they_predict() -> None:
    torch.manual_seed(0)
    network = NextPositionNetwork(TrackTransformer(16, 2, 1))
    actions = torch.randn(6, 12, 2, generator=torch.Generator().manual_seed(3))
    rollout = recorded(actions)
    following, states = network(torch.cat([rollout.context["past"], actions], 1))
    found = NextPositionForecaster(network).distribution(rollout)
    # Place 8, the last that is seen, predicts the first step; place 19 the last.
    assert torch.allclose(found.hidden, states[:, 7:19], atol=1e-6)
    assert torch.allclose(found.described.mean.view(6, 12, 2), following[:, 7:19], atol=1e-6)


def test_steps_may_be_asked_for_one_by_one() -> None:
    policy, rollout = forecaster(), recorded(torch.randn(6, 12, 2))
    where = torch.zeros(6, 12, dtype=torch.bool)
    where[2, 3:] = True
    some, every = policy.distribution(rollout, where), policy.distribution(rollout)
    assert torch.allclose(some.logprob, torch.where(where, every.logprob, 0), atol=1e-5)
    assert torch.allclose(some.hidden[where], every.hidden[where], atol=1e-6)
    names = DestinationForecaster(policy.destinations).distribution(rollout, where)
    assert not names.hidden[~where].any()
    assert torch.equal(names.hidden[2, 3], names.state[2])


def test_another_place_of_the_whole_track_changes_nothing_and_another_heading_does() -> None:
    policy = forecaster()
    track = torch.randn(3, 20, 2, generator=torch.Generator().manual_seed(0)).cumsum(1)
    ways = [policy.forecast(centred(t, 8)[:, :8]) for t in (track, track + 64.0, track.flip(2))]
    assert torch.allclose(ways[0], ways[1], atol=1e-4)
    assert not torch.allclose(ways[0], ways[2].flip(3), atol=1e-2)


@reward_from
def eastward(rollout: Rollout) -> Tensor:
    return rollout.actions[:, -1, 0]


def test_forecasts_are_reinforced_like_anything_else() -> None:
    # Parts of other papers on this policy: a reward, group credit, a clipped surrogate, a KL from the start.
    policy = forecaster(std=0.3)
    before = float(policy.forecast(pasts()["past"])[..., -1, 0].mean())
    stage = Stage(
        "reinforce",
        [PromptTask("forecasts", pasts(), group_size=16)],
        30,
        96,
        reward=eastward,
        credit=GroupRelativeAdvantage(),
        updates=[Update(ClippedSurrogateObjective(0.2) + 0.001 * ReferenceKL("exact"), learning_rate=3e-3)],
    )
    cast = Cast(policy=policy, reference=policy.reference())
    records: list[Any] = []
    train(Regimen(cast, [stage]), listener=lambda event: records.append(event.metrics))
    first = next(metrics for metrics in records if metrics and "policy/ratio_deviation" in metrics)
    assert first["policy/ratio_deviation"] == 0
    assert float(policy.forecast(pasts()["past"])[..., -1, 0].mean()) > before + 0.2


def test_bad_input_is_refused() -> None:
    policy = forecaster()
    with pytest.raises(ValueError, match="destinations in 12 steps, trajectories of 6, std=0.1; expected as many"):
        TrajectoryForecaster(policy.destinations, TrajectoryNetwork(TrackTransformer(16, 2, 1), 6, (8,)))
    with pytest.raises(ValueError, match="was sampled without noise .knob temperature 0"):
        policy.distribution(sample(policy, temperature=0.0))
    rollout = recorded(torch.randn(6, 12, 2))
    bare = rollout.replace(context=TensorDict({"seen": torch.zeros(6)}, [6]))
    with pytest.raises(ValueError, match=r"DestinationForecaster: .* its actions and the context seen; expected act"):
        DestinationForecaster(policy.destinations).distribution(bare)
