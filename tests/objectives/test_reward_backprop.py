"""The gradient of a reward through the judge: through one step, into flows and controllers, in parts as in one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from objectives.off_policy import numerical_gradient
from regimen.cast import Cast, ReferenceRefresh
from regimen.checkers import check
from regimen.functions.verdicts import learned_once
from regimen.loop import train
from regimen.models import MLPTorso
from regimen.models.comparators import Criteria, Questions
from regimen.objectives import RewardBackpropObjective
from regimen.objectives.base import Batch
from regimen.policies import ActionPolicy, GaussianHead
from regimen.policies.flow import FlowPolicy
from regimen.regimen import Regimen, Stage
from regimen.rewards import PairwiseReward, Reward, Scene, reward_from
from regimen.rollout import Rollout
from regimen.tasks import PromptTask
from regimen.tasks.side_by_side import SideBySide
from regimen.update import Update

KNOBS = {"sampling_steps": 4, "noise_level": 0.0, "guidance": 1.0}
CRITERIA = Criteria({"draw": ("large", "even")})


class OneWeight(nn.Module):
    """A velocity of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.7], dtype=torch.float64))

    def forward(self, x: Tensor, sigma: Tensor, context: Any) -> Tensor:
        return (self.weight * x.double() + self.weight**2 * sigma.view(-1, 1)).to(x.dtype)


class Compares:
    """Prefers the larger numbers, or the more even."""

    criteria = CRITERIA

    def compare(self, questions: Questions, a: Tensor, b: Tensor) -> Tensor:
        large = torch.tensor([name == "large" for name in questions.criterion])
        return torch.where(large, (a - b).mean(1), (b - a).square().mean(1))


class Mean(Reward):
    """The mean of the numbers."""

    name, differentiable = "mean", True

    def score(self, rollout: Rollout, scene: Scene) -> Tensor:
        found: Tensor = rollout["image"].mean(1)
        return found


def flow() -> FlowPolicy:
    policy = FlowPolicy(OneWeight(), (3,), sampling_steps=4, evaluation_steps=4, noise_level=0.0)
    policy.velocity = lambda x, sigma, conditioning, guidance=1.0: policy.denoiser(x, sigma, conditioning)  # type: ignore[method-assign,assignment]
    return policy


def sampled(policy: FlowPolicy, count: int = 6) -> Rollout:
    rng = torch.Generator().manual_seed(0)
    rollout = policy.sample(TensorDict({"x": torch.zeros(count)}, batch_size=[count]), KNOBS, rng)
    rollout = Rollout(rollout.data, ("draw",))
    exact = rollout.replace(observations=rollout.observations.double(), loss_mask=learned_once(rollout.mask, 1.0, rng))
    return exact.with_columns(
        sigmas=rollout["sigmas"].double(), image=rollout["image"].double(),
        reference_image=torch.randn(count, 3, generator=rng, dtype=torch.float64),
    )  # fmt: skip


def loss_of(objective: RewardBackpropObjective, rollout: Rollout, policy: Any, **parts: Any) -> Tensor:
    members = {"policy": policy, "reward_model": Compares()}
    found: Tensor = objective(Batch(rollout, members, {}, torch.Generator().manual_seed(0), **parts)).total
    return found


def test_the_gradient_flows_through_one_step_alone() -> None:
    policy = flow()
    rollout, objective = sampled(policy), RewardBackpropObjective(PairwiseReward(CRITERIA, transform="log"))
    weights = list(policy.parameters())
    (found,) = torch.autograd.grad(loss_of(objective, rollout, policy), weights)
    # The recorded states stay, whatever the weight: that is the graph of the one step.
    (expected,) = numerical_gradient(lambda: loss_of(objective, rollout, policy), weights, 1e-2)
    assert torch.allclose(found, expected, rtol=1e-3)

    def resampled() -> Tensor:
        return loss_of(objective, sampled(policy), policy)

    assert not torch.allclose(numerical_gradient(resampled, weights, 1e-2)[0], expected, rtol=1e-2)


def test_probabilities_of_one_criterion_against_a_fixed_reference_are_refl() -> None:
    policy, one = flow(), Criteria({"draw": ("large",)})
    rollout = sampled(policy)
    loss = loss_of(RewardBackpropObjective(PairwiseReward(one)), rollout, policy)
    row, step = rollout.loss_mask.nonzero(as_tuple=True)
    x, sigma = rollout.observations[row, step], rollout["sigmas"][row, step]
    image = x - sigma[:, None] * policy.denoiser(x, sigma, None)
    expected = -torch.sigmoid((image - rollout["reference_image"]).mean(1)).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    (a,), (b,) = (torch.autograd.grad(value, list(policy.parameters())) for value in (loss, expected))
    assert torch.allclose(a, b, rtol=1e-5)


def test_parts_of_a_minibatch_add_up_to_it() -> None:
    policy = flow()
    rollout, objective = sampled(policy), RewardBackpropObjective(PairwiseReward(CRITERIA, transform="log"))
    whole = loss_of(objective, rollout, policy)
    rows = [slice(0, 4), slice(4, 6)]
    parts = sum(loss_of(objective, rollout[part], policy, whole=rollout, rows=part) for part in rows)
    assert float(parts) == pytest.approx(float(whole), rel=1e-6)


def test_samples_made_anew_are_those_of_the_policy_and_are_made_once() -> None:
    policy = flow()
    rollout = sampled(policy)
    last = torch.zeros_like(rollout.mask)
    last[:, -1] = True
    batch = Batch(rollout.replace(loss_mask=last), {"policy": policy}, {}, torch.Generator())
    made = batch.reparameterised()
    assert torch.allclose(made["image"], rollout["image"], atol=1e-5)  # The last step's prediction is the sample.
    assert batch.reparameterised() is made
    assert made["image"].requires_grad
    assert not rollout["image"].requires_grad


def test_a_controller_is_trained_through_a_reward_of_its_actions() -> None:
    torch.manual_seed(0)
    torso = MLPTorso(2, (16,))
    policy = ActionPolicy(torso, GaussianHead(16, 1))

    class Follows(Reward):
        """Minus the squared distance of the action from the sum of what was observed, at every step."""

        name, differentiable = "follows", True

        def score(self, rollout: Rollout, scene: Scene) -> Tensor:
            return -(rollout.actions.squeeze(-1) - rollout.observations.sum(-1)).square()

    rng = torch.Generator().manual_seed(0)
    observations = torch.rand(64, 3, 2, generator=rng)
    rollout = Rollout.create(
        task="t", group=torch.arange(64), mask=torch.ones(64, 3, dtype=torch.bool), observations=observations,
        actions=torch.zeros(64, 3, 1),
    )  # fmt: skip
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.02)
    losses = []
    for _ in range(150):
        loss = RewardBackpropObjective(Follows())(Batch(rollout, {"policy": policy}, {}, rng)).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 3
    assert losses[-1] < 0.3


def test_a_flow_learns_to_beat_its_reference_in_the_loop() -> None:
    from regimen.models import MLPDenoiser

    torch.manual_seed(0)
    policy = FlowPolicy(MLPDenoiser((1, 2, 2), 2, 16), (1, 2, 2), sampling_steps=4, noise_level=0.0)
    rows = TensorDict({"condition": torch.zeros(8, dtype=torch.int64)}, batch_size=[8])
    task = SideBySide(PromptTask("draw", rows))
    large = Criteria({"draw": ("large",)})

    class Flat(nn.Module):
        criteria = large

        def compare(self, questions: Questions, a: Tensor, b: Tensor) -> Tensor:
            return (a - b).flatten(1).mean(1)

    objective = RewardBackpropObjective(PairwiseReward(large, transform="log"))
    stage = Stage("s", [task], 40, 32, updates=[Update(objective, learning_rate=1e-2, micro_batch=20)],
                  rules=[ReferenceRefresh(mode="fixed")])  # fmt: skip
    cast = Cast(policy=policy, reward_model=Flat())
    train(Regimen(cast, [stage]), listener=lambda event: None)
    contexts = TensorDict({"condition": torch.zeros(64, dtype=torch.int64)}, batch_size=[64])
    ours, theirs = (
        cast[m].sample(contexts, KNOBS, torch.Generator().manual_seed(5))["image"] for m in ("policy", "reference")
    )
    assert float(ours.mean() - theirs.mean()) > 0.5


def test_it_passes_the_checker() -> None:
    policy = flow()
    cast = {"policy": policy, "reward_model": Compares()}
    for reward in (Mean(), PairwiseReward(CRITERIA, transform="log")):
        assert check(RewardBackpropObjective(reward), sampled(policy), cast=cast).messages == []


# What it refuses


@reward_from
def counted(rollout: Rollout) -> Tensor:
    found: Tensor = (rollout["image"] > 0).float().mean(1)
    return found


def test_rewards_without_a_gradient_are_refused() -> None:
    with pytest.raises(TypeError, match="no gradient flows through counted"):
        RewardBackpropObjective(Mean() + counted)
    RewardBackpropObjective(Mean() + counted.logged())
    with pytest.raises(ValueError, match="'mean' is only logged"):
        RewardBackpropObjective(Mean().logged())


def test_what_the_weights_do_not_reach_and_what_nobody_scores_is_named() -> None:
    policy = flow()
    rollout = sampled(policy)

    class Old(Reward):
        """Of what was recorded."""

        name, differentiable = "old", True

        def score(self, rollout: Rollout, scene: Scene) -> Tensor:
            found: Tensor = rollout["reference_image"].mean(1)
            return found

    with pytest.raises(ValueError, match="'old' does not depend on the weights of 'policy'"):
        loss_of(RewardBackpropObjective(Old()), rollout, policy)
    with pytest.raises(ValueError, match="no sample was scored"):
        loss_of(RewardBackpropObjective(Mean().on("other")), rollout, policy)
    several = rollout.replace(loss_mask=rollout.mask)
    with pytest.raises(ValueError, match="learned from at 4 steps, expected 1"):
        loss_of(RewardBackpropObjective(Mean()), several, policy)
    with pytest.raises(ValueError, match=r"member 'policy' \(Linear\) has no samples with a gradient"):
        loss_of(RewardBackpropObjective(Mean()), rollout, nn.Linear(1, 1))
