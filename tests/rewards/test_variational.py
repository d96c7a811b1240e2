"""A user's reward as a judge: of control and of a flow policy's samples, and as a probability of winning."""

from __future__ import annotations

from collections.abc import Callable
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
from regimen.models import LatentReward, MLPDenoiser, PairEncoder
from regimen.objectives import ClippedSurrogateObjective, VariationalPreferenceObjective
from regimen.policies.flow import FlowPolicy
from regimen.regimen import Regimen, Stage
from regimen.rewards import Scene, VariationalReward, WinProbabilityReward, judge, win_probability
from regimen.rollout import Rollout
from regimen.tasks import DatasetTask, PromptTask
from regimen.tasks.preferences import pairs_of
from regimen.tasks.worlds.user_goals import GOALS, UserGoals, distance, uniform
from regimen.update import Epochs, Update

USERS = 3


@pytest.fixture(scope="module")
def reward_model() -> LatentReward:
    """What has learned from users with three goals, of whom none said which."""
    torch.manual_seed(0)
    model = LatentReward(2, PairEncoder(2, 4, (32, 32)), (32, 32))
    task = DatasetTask("pairs", UserGoals().sets(800, 8, torch.Generator().manual_seed(0)))
    update = Update(VariationalPreferenceObjective(), ["reward_model"], learning_rate=3e-3)
    train(Regimen(Cast(reward_model=model), [Stage("reward", [task], 200, 64, updates=[update])]), listener=quiet)
    return model.requires_grad_(False)


def quiet(event: Any) -> None:
    """Nobody is told."""


@pytest.fixture(scope="module")
def known(reward_model: LatentReward) -> Tensor:
    """Latents `[3, Z]` of new users, one of each kind."""
    rows = UserGoals().sets(60, 8, torch.Generator().manual_seed(1))
    one_each = torch.stack([(rows["user"] == kind).nonzero()[0, 0] for kind in range(USERS)])
    return reward_model.infer(pairs_of(rows[one_each])).mean


def walked(known: Tensor) -> Rollout:
    """Six stretches of four steps, two for each user."""
    rng = torch.Generator().manual_seed(2)
    mask = torch.ones(6, 4, dtype=torch.bool)
    mask[1, 2:] = False
    after = TensorDict({"state": uniform((6, 4), rng)}, batch_size=[6, 4])
    columns = {"condition": known.repeat_interleave(2, 0)}
    return Rollout.create(
        task="walk", group=torch.arange(6) // 2, mask=mask, columns=columns, step_columns={"next_observations": after}
    )


# In control


def test_each_step_is_scored_by_where_it_led_for_the_samples_own_user(
    reward_model: LatentReward, known: Tensor
) -> None:
    rollout = walked(known)
    judged, _ = judge(VariationalReward(), rollout, Scene({"reward_model": reward_model}))
    states = rollout["next_observations"]["state"]
    expected = reward_model.score(states[4:5], known[2:3])[0]
    assert torch.allclose(judged.reward[4], expected)
    assert torch.equal(judged.reward[1, 2:], torch.zeros(2))


def test_a_probability_to_win_orders_as_the_reward_does(reward_model: LatentReward, known: Tensor) -> None:
    rollout, scene = walked(known), Scene({"reward_model": reward_model})
    others = uniform((50,), torch.Generator().manual_seed(3))
    plain = VariationalReward().score(rollout, scene)
    wins = WinProbabilityReward(VariationalReward(), others).score(rollout, scene)
    assert bool(((wins > 0) & (wins < 1)).all())
    for row in range(6):
        assert torch.equal(plain[row].argsort(), wins[row].argsort())
    by_hand = torch.sigmoid(plain[3, 1] - reward_model.score(others[None], known[1:2])[0]).mean()
    assert float(wins[3, 1]) == pytest.approx(float(by_hand), abs=1e-6)


def test_probabilities_to_win_have_the_worked_values() -> None:
    rewards, comparison = torch.tensor([[1.0, -0.5]]), torch.tensor([[0.0, 1.0, -1.0]])
    expected = [0.703952, 0.394142]
    for chunk in (1, 2, 128):
        assert win_probability(rewards, comparison, chunk)[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert torch.allclose(win_probability(rewards + 5, comparison + 5), win_probability(rewards, comparison))
    others = torch.linspace(-1, 1, 7)[None]
    larger = win_probability(10 * others, 10 * comparison)
    assert torch.equal(larger.argsort(), win_probability(others, comparison).argsort())
    assert bool((larger.diff() > 0).all())
    sample = torch.tensor([1.0])
    assert float(win_probability(sample, comparison)) == pytest.approx(expected[0], abs=1e-6)


# Of images, or any array


def flow(shape: tuple[int, int, int] = (1, 1, 2)) -> FlowPolicy:
    torch.manual_seed(0)
    denoiser = MLPDenoiser(shape, conditions=USERS, width=32, blocks=1, embedding=8)
    return FlowPolicy(denoiser, shape, sampling_steps=6, evaluation_steps=6, logprob_reduce="sum")


def users(known: Tensor, size: int) -> TensorDict:
    kind = torch.arange(size) % USERS
    return TensorDict({"condition": kind, "latent": known[kind]}, batch_size=[size])


def of_points() -> VariationalReward:
    return VariationalReward(lambda r: r["image"].flatten(1), lambda r: r.context["latent"])


def test_a_flow_policys_samples_are_judged_for_a_given_user(reward_model: LatentReward, known: Tensor) -> None:
    policy, contexts = flow(), users(known, 300)
    rollout = policy.sample(contexts, Knobs.of(policy), torch.Generator().manual_seed(0))
    judged, _ = judge(of_points(), rollout, Scene({"reward_model": reward_model}))
    points = rollout["image"].flatten(1)
    inside = (points.abs() < 1.5).all(1)
    for kind in range(USERS):
        mine = inside & (contexts["condition"] == kind)
        near = [-distance(points[mine], torch.full((int(mine.sum()),), goal)) for goal in range(USERS)]
        ranks = [values.argsort().argsort().double() for values in (judged.reward[mine], *near)]
        alike = torch.corrcoef(torch.stack(ranks))[0, 1:]
        assert int(alike.argmax()) == kind
        assert float(alike[kind]) > 0.7
    elsewhere = TensorDict({"condition": contexts["condition"], "latent": known[:1].expand(300, -1)}, batch_size=[300])
    other, _ = judge(of_points(), rollout.replace(context=elsewhere), Scene({"reward_model": reward_model}))
    assert not torch.allclose(other.reward, judged.reward, atol=0.5)


def test_a_flow_policy_learns_what_each_user_likes(reward_model: LatentReward, known: Tensor) -> None:
    policy = flow()
    task = PromptTask("points", users(known, 30), group_size=16)
    update = Update(ClippedSurrogateObjective(0.2), learning_rate=5e-3, batches=Epochs(2))
    stage = Stage("grpo", [task], 25, 192, reward=of_points(), credit=GroupRelativeAdvantage(), updates=[update])

    def away() -> Tensor:
        contexts = users(known, 90)
        knobs = Knobs.of(policy).for_evaluation()
        drawn = policy.sample(contexts, knobs, torch.Generator().manual_seed(5))["image"].flatten(1)
        return torch.stack([distance(drawn[k::USERS], torch.full((30,), k)).mean() for k in range(USERS)])

    before = away()
    weights = [weight.clone() for weight in reward_model.parameters()]
    train(Regimen(Cast(policy=policy, reward_model=reward_model), [stage]), listener=quiet)
    assert bool((away() < before - 0.3).all())
    assert all(torch.equal(a, b) for a, b in zip(weights, reward_model.parameters(), strict=True))


# As a part


@pytest.mark.parametrize("wins", [False, True])
def test_the_checker_finds_nothing(reward_model: LatentReward, known: Tensor, wins: bool) -> None:
    part: Any = VariationalReward()
    if wins:
        part = WinProbabilityReward(part, uniform((5,), torch.Generator()))
    assert check(part, walked(known), cast={"reward_model": reward_model}).messages == []


def test_without_the_member_it_fails_and_says_so(known: Tensor) -> None:
    _, report = judge(VariationalReward(), walked(known), Scene({"policy": None}))
    assert report.failed == 6
    assert "needs the member 'reward_model', which the cast lacks (it has: policy)" in report.errors[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: win_probability(torch.zeros(2), torch.zeros(2, 0)), r"comparison \[2, 0\]"),
        (lambda: win_probability(torch.zeros(2), torch.zeros(3, 4)), r"rewards \[2\], comparison \[3, 4\]"),
        (lambda: WinProbabilityReward(VariationalReward(), torch.zeros(0, 2)), "with M at least 1"),
    ],
)
def test_nobody_to_compare_with_is_an_error(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_goals_are_where_the_world_says() -> None:
    assert distance(torch.tensor(GOALS), torch.arange(USERS)).tolist() == [0.0, 0.0, 0.0]
