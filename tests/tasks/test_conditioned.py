"""Offline data with a user's latent: what is shown, to whom, and drawn anew each time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from regimen.checkers import check
from regimen.models import DictTorso, LatentReward, MLPTorso, PairEncoder
from regimen.policies.action import ActionPolicy
from regimen.policies.heads import GaussianHead
from regimen.policies.personal import PersonalPolicy
from regimen.tasks import Conditioned, DatasetTask, EnvTask, StoredUsers
from regimen.tasks.environments.tensor import UserSquare
from regimen.tasks.preferences import pairs_of, personal_accuracy, random_context
from regimen.tasks.worlds.user_goals import REACH, SIDE, UserGoals, distance


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def walks(**goals: Any) -> DatasetTask:
    return DatasetTask("walks", UserGoals(**goals).walks(20, 5, rng()), order="random")


def numbers(cast: Mapping[str, Any], count: int, rng: torch.Generator) -> Tensor:
    return torch.randn(count, 3, generator=rng)


def model() -> LatentReward:
    torch.manual_seed(0)
    return LatentReward(2, PairEncoder(2, 3, (8,)), (8,))


# Conditions


def test_policy_and_judge_are_told_the_same_condition() -> None:
    rollout = Conditioned(walks(), numbers).collect({}, {}, rng(), 6)
    condition = rollout["condition"]
    assert condition.shape == (6, 3)
    for told in (rollout.observations, rollout["next_observations"]):
        assert torch.equal(told["condition"][:, 0], condition)
    plain = walks().collect({}, {}, rng(), 6)
    assert torch.equal(rollout.observations["state"], plain.observations)
    assert torch.equal(rollout["next_observations"]["state"], plain["next_observations"])


def test_the_same_rows_get_other_conditions_the_next_time() -> None:
    task, stream = Conditioned(walks(), numbers), rng()
    first, second = (task.collect({}, {}, stream, 6)["condition"] for _ in range(2))
    assert not torch.equal(first, second)


def test_stored_users_give_draws_of_their_posteriors() -> None:
    member, rows = model(), UserGoals().sets(1, 4, rng())
    drawn = StoredUsers(rows)({"reward_model": member}, 20_000, rng())
    known = member.infer(pairs_of(rows))
    assert torch.allclose(drawn.mean(0), known.mean[0], atol=0.05)
    assert torch.allclose(drawn.var(0), known.log_var[0].exp(), rtol=0.05)


def test_a_task_that_generates_is_refused() -> None:
    env = EnvTask("square", lambda n: UserSquare(n, UserGoals()))
    with pytest.raises(ValueError, match="task 'square' generates its samples"):
        Conditioned(env, numbers)


def test_samples_without_observations_are_refused() -> None:
    pairs = DatasetTask("pairs", UserGoals().sets(4, 3, rng()))
    with pytest.raises(ValueError, match="'pairs' hold no observations"):
        Conditioned(pairs, numbers).collect({}, {}, rng(), 2)


def test_the_checker_finds_nothing() -> None:
    assert check(Conditioned(walks(), numbers)).messages == []


# What is shown of a user


def test_a_random_context_shows_the_first_pairs_of_each_user() -> None:
    rows = random_context(UserGoals().sets(3000, 5, rng()), rng())
    shown = rows["step_columns"]["shown"]
    count = shown.sum(1)
    assert torch.equal(shown, torch.arange(5) < count[:, None])
    assert torch.bincount(count, minlength=6)[1:].float().div(600).sub(1).abs().max() < 0.2
    assert int(count.min()) == 1


def test_accuracy_is_measured_on_pairs_that_were_not_shown() -> None:
    rows = UserGoals().sets(200, 12, rng())
    garbled = rows.clone()
    garbled["step_columns"]["label"][:, 8:] = 1 - garbled["step_columns"]["label"][:, 8:]
    member = {"reward_model": model()}
    found, turned = (personal_accuracy(member, table, 8) for table in (rows, garbled))
    assert found["accuracy"] == pytest.approx(1 - turned["accuracy"])
    assert {name: found[name] for name in found if name != "accuracy"} == {
        name: turned[name] for name in turned if name != "accuracy"
    }


# The square and its users


def test_labels_say_which_place_is_nearer_to_the_users_goal() -> None:
    rows = UserGoals().sets(50, 8, rng())
    pairs, user = pairs_of(rows), rows["user"]
    nearer = distance(pairs.first[:, :, 0], user) < distance(pairs.second[:, :, 0], user)
    assert torch.equal(pairs.label, nearer.float())
    assert torch.equal(UserGoals().answers(rows, pairs.first, pairs.second), pairs.label)


def test_a_segment_is_worth_the_sum_of_its_states_to_a_user() -> None:
    """Of two states each; every state of the first is nearer, one of them is, or none."""
    user = torch.zeros(3, dtype=torch.int64)  # Whose goal is at (1, 1).
    near, far, middle = [1.0, 1.0], [1.0, -1.0], [1.0, 0.5]
    first = torch.tensor([[[near, near]], [[near, far]], [[far, far]]])
    second = torch.tensor([[[far, middle]], [[middle, middle]], [[near, far]]])
    rows = TensorDict({"user": user}, batch_size=[3])
    answers = UserGoals().answers(rows, first, second)
    assert answers.tolist() == [[1.0], [0.0], [0.0]]
    assert torch.equal(answers, UserGoals().label(first, second, user, torch.zeros(3, 2)))


def test_users_who_are_less_sure_err_more() -> None:
    rates = []
    for scale in (1.0, 10.0):
        rows = UserGoals(scales=(scale,)).sets(2000, 8, rng())
        pairs = pairs_of(rows)
        rates.append(float((pairs.label != UserGoals().answers(rows, pairs.first, pairs.second)).float().mean()))
    assert 0.2 < rates[0] < 0.4
    assert 0.0 < rates[1] < 0.1


def test_what_is_told_is_the_kind_and_nothing_else_is_changed() -> None:
    plain, told = (UserGoals(tells).sets(30, 4, rng()) for tells in (False, True))
    assert torch.equal(told["step_columns"]["first"][..., :2], plain["step_columns"]["first"])
    kind = told["step_columns"]["second"][..., 2:].argmax(-1)
    assert torch.equal(kind, plain["user"][:, None, None].expand(-1, 4, 1))


def test_walks_go_where_their_actions_lead() -> None:
    rows = UserGoals().walks(30, 6, rng())
    led = (rows["observations"] + rows["actions"]).clamp(-SIDE, SIDE)
    assert torch.allclose(led, rows["step_columns"]["next_observations"])
    assert float(rows["actions"].abs().max()) <= REACH


def test_an_episode_is_a_function_of_its_seed() -> None:
    goals = UserGoals(scales=(1.0, 10.0))
    alone, among = UserSquare(1, goals), UserSquare(3, goals)
    every = torch.ones(3, dtype=torch.bool)
    first = alone.reset(every[:1], torch.tensor([7]), {})
    second = among.reset(every, torch.tensor([3, 7, 9]), {})
    assert bool((first[0] == second[1]).all())
    assert (
        len(
            {
                int(user)
                for user in UserSquare(200, goals)
                .reset(torch.ones(200, dtype=torch.bool), torch.arange(200), {})["pairs"]["label"]
                .sum(1)
            }
        )
        > 3
    )


def test_success_is_to_be_near_the_own_goal() -> None:
    env = UserSquare(40, UserGoals())
    env.reset(torch.ones(40, dtype=torch.bool), torch.arange(40), {})
    goal = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [0.0, -1.0]])[env.state["user"]]
    for _ in range(20):
        change = env.step(goal - env.state["place"])
    assert bool((change.info["success"] == 1).all())
    assert float(change.reward.abs().max()) < 1e-6


# The policy that finds out


def test_a_user_is_inferred_once_and_remembered_to_the_end() -> None:
    seen: list[TensorDict] = []

    class Watching(ActionPolicy):
        def act(self, observations: Any, *rest: Any) -> Any:
            seen.append(observations)
            return super().act(observations, *rest)

    member = model()
    torso = DictTorso({"state": MLPTorso(2, ()), "condition": MLPTorso(3, ())}, (8,))
    guide = PersonalPolicy(Watching(torso, GaussianHead(8, 2)), member)
    task = EnvTask("square", lambda n: UserSquare(n, UserGoals(), limit=4), evaluation_episodes=5, evaluated="guide")
    found = task.evaluate({"guide": guide}, {"temperature": 0.0}, rng()).metrics
    assert found["length"] == 4
    assert len(seen) == 4
    for shown in seen:
        assert torch.equal(shown["condition"], seen[0]["condition"])
    assert not torch.equal(seen[0]["state"], seen[3]["state"])
