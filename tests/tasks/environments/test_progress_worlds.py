"""The checklist and the workshop: what is paid, what is possible, and that the truth adds up."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from regimen.checkers import check
from regimen.estimators import LinearProgress, RecordedProgress
from regimen.knobs import Knob, Knobs
from regimen.policies.action import ActionPolicy
from regimen.tasks import AttributionTest, EnvTask
from regimen.tasks.attribution import correlation
from regimen.tasks.environments.base import VectorEnv
from regimen.tasks.environments.tensor import Checklist, Workshop, expert_episodes, points_and_actions


def begun(env: Checklist | Workshop, seed: int = 0) -> Tensor:
    seeds = torch.randint(2**31, (env.count,), generator=torch.Generator().manual_seed(seed))
    seen = env.reset(torch.ones(env.count, dtype=torch.bool), seeds, {})
    assert isinstance(seen, Tensor)
    return seen


def test_perfect_play_of_the_checklist_earns_1_on_average_and_only_at_the_end() -> None:
    env = Checklist(2000, seed=3)
    seen, paid, credit = begun(env), [], []
    assert isinstance(env, VectorEnv)
    for _ in range(20):
        change = env.step(env.answers[seen[:, :-1].argmax(1)].clamp(min=0))
        paid.append(change.reward)
        credit.append(change.info["credit"])
        seen = change.observations
    assert not bool(torch.stack(paid[:-1]).any())
    assert torch.allclose(paid[-1], torch.stack(credit).sum(0))
    assert float(paid[-1].mean()) == pytest.approx(1.0, abs=0.02)
    assert bool(change.terminated.all())


def test_the_other_half_of_the_points_earns_nothing() -> None:
    env = Checklist(500, seed=0)
    seen = begun(env)
    for action in range(8):
        change = env.step(torch.full((500,), action))
        point = seen[:, :-1].argmax(1)
        assert torch.equal(change.info["credit"] > 0, (env.answers[point] == action) & (point < 8))
        seen = change.observations


def test_the_points_are_of_the_seed_and_the_answers_of_the_world() -> None:
    assert torch.equal(begun(Checklist(9), 1), begun(Checklist(9, seed=5), 1))
    assert not torch.equal(Checklist(1, seed=0).answers, Checklist(1, seed=1).answers)
    with pytest.raises(ValueError, match="Checklist: points=1, actions=8; expected at least 2 of each"):
        Checklist(1, points=1)


def test_an_expert_places_every_object_and_all_it_does_is_possible() -> None:
    env = Workshop(500, seed=2)
    begun(env)
    over = torch.zeros(500, dtype=torch.bool)
    credit, paid = torch.zeros(500), torch.zeros(500)
    for _ in range(5):
        change = env.step(env.expert())
        assert bool(change.info["valid"][~over].all())
        credit += torch.where(over, 0, change.info["credit"])
        paid += torch.where(over, 0, change.reward)
        over |= change.terminated
    assert bool(over.all())
    assert torch.equal(paid, torch.ones(500))
    assert torch.allclose(credit, torch.ones(500))


def test_what_is_not_possible_does_nothing() -> None:
    env = Workshop(1, seed=0)
    seen = begun(env)
    room, other = int(env.state["room"]), int(env.places[(env.places != env.state["room"]).nonzero()[0]])
    impossible = [room, 4 + int((env.places == other).nonzero()), 7, 10]
    for action in impossible:
        change = env.step(torch.tensor([action]))
        assert float(change.info["valid"]) == 0
        assert torch.equal(change.observations[:, :-1], seen[:, :-1])
    assert float(env.step(torch.tensor([11])).info["valid_share"]) == pytest.approx(0.2)


def test_goals_are_credited_in_order_and_once() -> None:
    env = Workshop(1, seed=0)
    begun(env)
    container = int(env.state["container"])
    place, home = int(env.places[container]), int(env.state["home"])
    away = next(room for room in range(4) if room not in (place, int(env.state["room"])))
    route = [away, place, away, place, 4 + container, 7 + container, home, place, home, 10]
    start = 0.2 if int(env.state["room"]) == place else 0.0
    credit = [round(float(env.step(torch.tensor([action])).info["credit"]), 1) for action in route]
    assert sum(credit) + start == pytest.approx(1.0)
    assert credit[4:7] == [0.2, 0.2, 0.2]
    assert credit[7:] == [0.0, 0.0, 0.2]


def test_episodes_of_the_expert_are_rows_with_their_lengths() -> None:
    rows = expert_episodes(Workshop(50, seed=1), seed=4)
    assert rows["observations"].shape[:2] == rows["actions"].shape == rows["mask"].shape
    assert bool(rows["mask"][:, 0].all())
    assert set(rows["actions"][rows["mask"]].tolist()) <= set(range(11))
    assert torch.equal(rows["actions"], expert_episodes(Workshop(50, seed=1), seed=4)["actions"])


# The test of an estimator


def attribution(estimator: object) -> tuple[AttributionTest, dict[str, object]]:
    task = EnvTask("checklist", partial(Checklist, seed=0), copies=64, steps=20, episodes=True, discount=1.0)
    policy = ActionPolicy.for_spaces(*task.spaces)
    policy.knobs = (Knob("temperature", 1.0, 0.0, evaluation=1.0),)
    return AttributionTest("attribution", task), {"policy": policy, "estimator": estimator}


def measured(estimator: object) -> dict[str, float]:
    test, cast = attribution(estimator)
    policy = cast["policy"]
    return test.evaluate(cast, Knobs.of(policy, test), torch.Generator().manual_seed(0)).metrics


def test_the_test_passes_the_checker() -> None:
    test, cast = attribution(RecordedProgress("credit"))
    assert check(test, cast=cast).messages == []


def test_the_truth_fits_exactly_and_correlates_fully() -> None:
    found = measured(RecordedProgress("credit"))
    assert found["misfit"] < 1e-9
    assert found["correlation"] == pytest.approx(1.0)


def test_equal_contributions_tell_nothing_of_single_steps() -> None:
    equal = LinearProgress(lambda rollout: torch.ones(*rollout.mask.shape, 1))
    equal.weights, equal.misfit = torch.full((1,), 0.125 / 20, dtype=torch.float64), torch.tensor(1.0)
    found = measured(equal)
    assert found["correlation"] == 0
    assert found["misfit"] > 0.9


def test_an_estimator_that_was_never_measured_is_not_tested() -> None:
    assert measured(LinearProgress(points_and_actions)) == {}
    assert measured(None) == {}


def test_the_correlation_of_numbers_and_of_a_constant() -> None:
    x = torch.tensor([1.0, 2.0, 3.0])
    assert float(correlation(x, 5 - 2 * x)) == pytest.approx(-1.0)
    assert float(correlation(x, torch.ones(3))) == 0
