"""A critic of actions and states that asks the policy: worked numbers, exact values of a chain, what it leads to."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from control_worlds import Identity
from regimen import (
    Cast,
    Draws,
    Knob,
    Knobs,
    NewestRollout,
    ReferenceRefresh,
    Regimen,
    ReplayMemory,
    Stage,
    Update,
    train,
)
from regimen.checkers import check
from regimen.controllers import Linear, Piecewise, Schedule
from regimen.credit import CriticAdvantage, critic_advantage
from regimen.loop import Outcome
from regimen.models import MLPTorso, OneHotTorso
from regimen.models.double_critic import DoubleCritic
from regimen.objectives import (
    Batch,
    ClippedSurrogateObjective,
    DoubleCriticObjective,
    ReinforceObjective,
    Resampled,
    SFTObjective,
    double_critic_loss,
)
from regimen.policies import ActionPolicy, CategoricalHead
from regimen.rewards import EnvironmentReward
from regimen.rollout import Rollout
from regimen.tasks import DatasetTask, EnvTask
from regimen.tasks.environments import GymnasiumVector

KNOBS = {"temperature": 1.0}
ADAM: dict[str, Any] = {"optimizer": torch.optim.Adam, "max_grad_norm": None}


def column(*values: float) -> Tensor:
    return torch.tensor(values)[:, None]


# Worked numbers


def test_losses_of_one_step() -> None:
    q, v = column(-0.5, -0.7), column(-0.6, -0.4)
    after, now = column(-0.8, -0.2), column(-0.9, -1.1)
    loss_q, loss_v = double_critic_loss(q, v, torch.tensor([-1.0]), torch.tensor([0.95]), after, now)
    assert loss_q.item() == pytest.approx(1.26**2 + 0.49**2) == pytest.approx(1.8277)
    assert loss_v.item() == pytest.approx(0.58)
    assert critic_advantage(q, v).item() == pytest.approx(-0.1)


@pytest.mark.parametrize("after", [0.0, 1e9, torch.inf])
def test_nothing_comes_after_the_end(after: float) -> None:
    """With a discount of 0 the target is the reward, whatever the target network says."""
    loss, _ = double_critic_loss(
        column(2.0), column(0.0), torch.tensor([1.5]), torch.tensor([0.0]), column(after), column(0.0)
    )
    assert loss.item() == 0.25


def test_other_shapes_are_refused() -> None:
    ok, flat = torch.zeros(2, 3), torch.zeros(3)
    with pytest.raises(ValueError, match=r"expected \[K, R\] four times, and \[R\] twice"):
        double_critic_loss(ok, ok[:1], flat, flat, ok, ok)
    with pytest.raises(ValueError, match=r"q \[3\], v \[2, 3\]; expected \[K, R\] each"):
        critic_advantage(flat, ok)


# A chain of two turns, by the real loop


def chain() -> TensorDict:
    """In s0 action 0 (-1) leads to s1, and action 1 (-1) ends; in s1 both end, for 0 and -1."""
    seen, done = torch.tensor([0, 0, 1, 1])[:, None], torch.tensor([0, 1, 0, 1])[:, None]
    reward, discount = torch.tensor([-1.0, -1, 0, -1])[:, None], torch.tensor([0.95, 0, 0, 0])[:, None]
    columns = {"env_reward": reward, "next_observations": torch.ones_like(seen)}
    steps = {"observations": seen, "actions": done, "discount": discount, "mask": torch.ones_like(seen).bool()}
    return TensorDict({**steps, "step_columns": TensorDict(columns, [4, 1])}, [4])


def uniform() -> ActionPolicy:
    policy = ActionPolicy(OneHotTorso(2), CategoricalHead(2, 2))
    nn.init.zeros_(policy.head.logits.weight)
    return policy


def tables(width: int = 32) -> DoubleCritic:
    torch.manual_seed(0)
    return DoubleCritic(OneHotTorso(2), OneHotTorso(2), width)


def evaluated(steps: int, tau: float) -> Outcome:
    follow = ReferenceRefresh("critic_target", of="critic", mode="ema", decay=1 - tau)
    update = Update(
        DoubleCriticObjective(), ["critic"], Knob("rate", 1e-2), batches=Draws(4, 256), rules=[follow], **ADAM
    )
    stage = Stage(
        "evaluate", [DatasetTask("chain", chain())], steps, 4, EnvironmentReward(), updates=[update],
        controllers=[Schedule("rate", Linear(1e-2, 1e-5, steps))],
    )  # fmt: skip
    return train(Regimen(Cast(policy=uniform(), critic=tables()), [stage], evaluations=[]), listener=lambda event: None)


def test_the_critic_finds_the_values_of_the_chain() -> None:
    critic = evaluated(100, 0.1).cast["critic"]
    seen, done = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    with torch.no_grad():
        q, v = critic.both(seen, done)
    exact_q, exact_v = torch.tensor([-1.475, -1.0, 0.0, -1.0]), torch.tensor([-1.2375, -1.2375, -0.5, -0.5])
    assert torch.allclose(q, exact_q.expand(2, 4), atol=0.02)
    assert torch.allclose(v, exact_v.expand(2, 4), atol=0.02)
    assert torch.allclose(critic_advantage(q, v), torch.tensor([-0.2375, 0.2375, 0.5, -0.5]), atol=0.03)


def test_exact_critics_have_no_advantage_on_average() -> None:
    q, v = torch.tensor([[-1.475, -1.0, 0.0, -1.0]]), torch.tensor([[-1.2375, -1.2375, -0.5, -0.5]])
    advantage = critic_advantage(q, v).view(2, 2)
    assert torch.allclose(advantage.mean(1), torch.zeros(2), atol=1e-6)
    assert torch.allclose(advantage, torch.tensor([[-0.2375, 0.2375], [0.5, -0.5]]))


def test_the_target_follows_every_gradient_step() -> None:
    """A share of 1 makes the target equal to the critic."""
    cast = evaluated(2, 1.0).cast
    for name, value in cast["critic"].state_dict().items():
        assert torch.equal(value, cast["critic_target"].state_dict()[name])


def test_an_average_with_tau_of_a_tenth_after_ten_steps() -> None:
    online, rule = nn.Linear(1, 1, bias=False), ReferenceRefresh("bar", of="online", mode="ema", decay=0.9)
    cast = Cast(online=online)
    nn.init.zeros_(online.weight)
    rule.start(cast)
    nn.init.ones_(online.weight)
    for step in range(10):
        rule.after_step(cast, step + 1)
    assert cast["bar"].weight.item() == pytest.approx(0.651322, abs=1e-6)


# What is learned from it


def steps_of_chain() -> Rollout:
    rows = chain()
    made = Rollout.create(
        task="chain", group=torch.arange(4), mask=rows["mask"], observations=rows["observations"],
        actions=rows["actions"], discount=rows["discount"], knobs=KNOBS, step_columns=rows["step_columns"],
    )  # fmt: skip
    return made.replace(reward=made["env_reward"])


def batch(policy: ActionPolicy, seed: int = 0, of: Any = (), **slices: Any) -> Batch:
    critic, knobs = tables(), Knobs.of(policy, *of)
    cast = {"policy": policy, "critic": critic, "critic_target": copy.deepcopy(critic)}
    return Batch(steps_of_chain(), cast, knobs, torch.Generator().manual_seed(seed), **slices)


def test_actions_are_drawn_once_for_all_objectives_and_counted() -> None:
    given = batch(uniform())
    first = given.resampled("policy")
    assert given.resampled("policy") is first
    assert given.of_tasks("chain").resampled("policy") is first
    assert given.spent["drawn"] == 4
    assert torch.equal(first.observations, given.rollout.observations)
    assert torch.allclose(first.logprobs, torch.full((4, 1), 0.5).log())
    assert not torch.equal(batch(uniform(), 1).resampled().actions, first.actions)


def test_no_gradient_of_one_reaches_the_other() -> None:
    given = batch(uniform())
    DoubleCriticObjective()(given).total.backward()
    assert all(p.grad is not None for p in given.cast["critic"].parameters())
    assert all(p.grad is None for name in ("policy", "critic_target") for p in given.cast[name].parameters())
    other = batch(uniform())
    Resampled(ReinforceObjective("token"), CriticAdvantage())(other).total.backward()
    assert any(p.grad.abs().sum() > 0 for p in other.cast["policy"].parameters())
    assert all(p.grad is None for name in ("critic", "critic_target") for p in other.cast[name].parameters())


def test_the_gradient_of_new_actions_is_that_of_the_expected_advantage() -> None:
    """Over many draws, REINFORCE is the gradient of sum_u pi(u|s) A(s, u)."""
    policy = uniform()
    critic = tables()
    critic.action = OneHotTorso(2)
    for parameter in critic.parameters():
        parameter.data.mul_(3)
    seen = torch.arange(2).repeat(4000)
    rollout = Rollout.create(
        task="s", group=torch.arange(8000), mask=torch.ones(8000, 1).bool(), observations=seen[:, None],
        actions=torch.zeros_like(seen)[:, None], knobs=KNOBS,
    )  # fmt: skip
    given = Batch(rollout, {"policy": policy, "critic": critic}, KNOBS, torch.Generator().manual_seed(0))
    Resampled(ReinforceObjective("token"), CriticAdvantage())(given).total.backward()
    found = policy.head.logits.weight.grad.clone()
    policy.zero_grad()
    states = torch.arange(2)
    advantage = torch.stack([critic_advantage(*critic.both(states, torch.full((2,), a))) for a in range(2)], 1).detach()
    chances = policy.head(policy.torso(states)).logp.exp()
    (-(chances * advantage).sum(1).mean()).backward()
    exact = policy.head.logits.weight.grad
    assert exact.abs().max() > 0.05
    assert torch.allclose(found, exact, atol=0.15 * float(exact.abs().max()))


def test_slices_of_a_minibatch_add_up() -> None:
    """The recorded actions take the place of new ones, so that nothing is random."""

    class Same(ActionPolicy):
        def resample(self, rollout: Rollout, knobs: Any, rng: torch.Generator) -> Rollout:
            return rollout

    policy = Same(OneHotTorso(2), CategoricalHead(2, 2))
    objective = DoubleCriticObjective() + Resampled(ReinforceObjective("token"), CriticAdvantage())
    whole = batch(policy, of=[objective])
    parts = []
    for rows in (slice(0, 3), slice(3, 4)):
        part = batch(policy, of=[objective], whole=whole.rollout, rows=rows)
        part.rollout = whole.rollout[rows]
        parts.append(objective(part).total)
    assert torch.allclose(sum(parts), objective(whole).total, atol=1e-6)


def test_resampled_objectives_name_their_parts() -> None:
    both = Resampled(ClippedSurrogateObjective() + 0.1 * SFTObjective(), CriticAdvantage())
    assert [part.term_name for part in both.parts()] == ["surrogate+sft", "surrogate", "sft"]
    assert [knob.name for knob in both.knobs] == ["weight/surrogate", "weight/sft"]
    found = both(batch(uniform(), of=[both]))
    assert set(found.components) == {"surrogate", "sft"}
    assert float(found.metrics["ratio_deviation"]) < 1e-6


def test_a_member_that_cannot_act_anew_is_refused() -> None:
    given = Batch(steps_of_chain(), {"policy": nn.Linear(1, 1)}, KNOBS, torch.Generator())
    with pytest.raises(ValueError, match=r"member 'policy' \(Linear\) draws no actions for samples that are there"):
        given.resampled()
    with pytest.raises(ValueError, match=r"knob temperature = 0, no recurrent core; expected a policy without memory"):
        uniform().resample(steps_of_chain(), {"temperature": 0.0}, torch.Generator())
    with pytest.raises(ValueError, match=r"CriticAdvantage: the cast has no member 'critic' \(it has: policy\)"):
        CriticAdvantage()(steps_of_chain(), {}, {"policy": None})


# A controller, in an environment


def control(steps: int, memory: Any, warm_up: int = 2) -> Regimen:
    """What is seen is the right action, of three; it pays 1."""
    torch.manual_seed(0)
    policy = ActionPolicy(OneHotTorso(3), CategoricalHead(3, 3))
    critic = DoubleCritic(OneHotTorso(3), OneHotTorso(3), 32)
    follow = ReferenceRefresh("critic_target", of="critic", mode="ema", decay=0.9)
    evaluate = Update(DoubleCriticObjective(), ["critic"], 3e-3, batches=Draws(8, 64), rules=[follow], **ADAM)
    improve = Update(
        Resampled(ReinforceObjective("token"), CriticAdvantage()), ["policy"], 3e-2,
        batches=Draws(Knob("steps/policy", 4, 0, integer=True), 64), **ADAM,
    )  # fmt: skip
    task = EnvTask("identity", lambda count: GymnasiumVector([partial(Identity, 3)] * count), copies=8, steps=8,
        discount=0.5)  # fmt: skip
    stage = Stage(
        "archer", [task], steps, 8, EnvironmentReward(), updates=[evaluate, improve], memory=memory,
        controllers=[Schedule("steps/policy", Piecewise([(0, 0), (warm_up, 4)]))],
    )  # fmt: skip
    return Regimen(Cast(policy=policy, critic=critic), [stage])


@pytest.mark.parametrize("memory", [partial(ReplayMemory, 1000, "transition"), partial(NewestRollout, "step")])
def test_a_controller_of_discrete_actions_learns_by_it(memory: Any) -> None:
    outcome = train(control(15, memory), listener=lambda event: None)
    first, last = (record["metrics"]["identity/return"] for record in outcome.evaluations)
    assert last > 7.5 > first
    assert outcome.counters.gradient_steps == 15 * 8 + 13 * 4
    assert outcome.counters.drawn == outcome.counters.gradient_steps * 64
    assert outcome.counters.samples == 15 * 8


def test_the_policy_is_untouched_until_the_warm_up_ends() -> None:
    """Not a step of weight 0: no step at all."""
    for steps, moved in ((3, False), (4, True)):
        regimen = control(steps, partial(ReplayMemory, 1000, "transition"), warm_up=3)
        before = {name: copy.deepcopy(regimen.cast[name].state_dict()) for name in ("policy", "critic")}
        outcome = train(regimen, listener=lambda event: None)
        changed = {
            name: any(not torch.equal(value, outcome.cast[name].state_dict()[key]) for key, value in state.items())
            for name, state in before.items()
        }
        assert changed == {"policy": moved, "critic": True}
        assert outcome.cast["policy"].version == int(moved)


def test_passes_the_checkers() -> None:
    cast = {"policy": uniform(), "critic": tables(), "critic_target": tables()}
    assert check(DoubleCriticObjective(), steps_of_chain(), cast=cast).messages == []
    assert check(CriticAdvantage(), steps_of_chain(), cast=cast).messages == []
    assert check(Resampled(ReinforceObjective("token"), CriticAdvantage()), steps_of_chain(), cast=cast).messages == []


def test_torsos_of_any_kind() -> None:
    critic = DoubleCritic(MLPTorso(3, (8,)), MLPTorso(2, (8,)), 8, critics=3)
    q, v = critic.both(torch.randn(5, 3), torch.randn(5, 2))
    assert (q.shape, v.shape) == ((3, 5), (3, 5))
