"""The clipped surrogate: worked terms, aggregates, clip-higher, and what a first update does to a flow policy."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from regimen.checkers import assert_ok
from regimen.credit import GroupRelativeAdvantage
from regimen.objectives import ClippedSurrogateObjective
from regimen.objectives.base import Batch, Loss
from regimen.objectives.clipped_surrogate import clipped_surrogate
from regimen.policies import FlowPolicy
from regimen.rollout import Rollout

Sampled = Callable[..., tuple[FlowPolicy, Rollout]]
OBJECTIVE = ClippedSurrogateObjective(clip=1e-4)


def loss_of(objective: ClippedSurrogateObjective, rollout: Rollout, policy: Any) -> Loss:
    return objective(Batch(rollout, {"policy": policy}, {}, torch.Generator()))


def scored(logprob: Tensor, old: Tensor, advantages: Tensor, mask: Tensor | None = None) -> tuple[Rollout, Any]:
    """A rollout of given log-probabilities, and a policy that gives it others."""
    mask = torch.ones_like(old, dtype=torch.bool) if mask is None else mask
    rollout = Rollout.create(
        task="t", group=torch.arange(len(old)), mask=mask, logprobs=old, advantages=advantages
    )  # fmt: skip
    return rollout, SimpleNamespace(distribution=lambda rollout, where: SimpleNamespace(logprob=logprob))


def test_worked_terms() -> None:
    ratio, advantage = torch.tensor([1.0003, 1.0003, 0.9997]).double(), torch.tensor([1.0, -1, 2]).double()
    terms, found = clipped_surrogate(ratio.log(), torch.zeros(3).double(), advantage, 1e-4)
    torch.testing.assert_close(found, ratio)
    torch.testing.assert_close(terms, torch.tensor([-1.0001, 1.0003, -1.9994]).double())
    assert float(terms.mean()) == pytest.approx(-0.6664, abs=1e-7)


def test_worked_terms_through_the_objective() -> None:
    ratio, advantage = torch.tensor([[1.0003], [1.0003], [0.9997]]), torch.tensor([[1.0], [-1], [2]])
    rollout, policy = scored(ratio.log(), torch.zeros(3, 1), advantage)
    loss = loss_of(OBJECTIVE, rollout, policy)
    assert float(loss.total) == pytest.approx(-0.6664, abs=1e-5)
    assert float(loss.metrics["clip_share"]) == 1
    assert float(loss.metrics["ratio_deviation"]) == pytest.approx(3e-4, abs=1e-6)


def test_clip_higher_lets_good_actions_grow_further() -> None:
    """DAPO: [1 - .2, 1 + .28]; the range below is unchanged."""
    ratio, advantage = torch.tensor([1.25, 1.5, 0.7, 1.5]), torch.tensor([1.0, 1.0, -1.0, -1.0])
    terms, _ = clipped_surrogate(ratio.log(), torch.zeros(4), advantage, 0.2, 0.28)
    torch.testing.assert_close(terms, torch.tensor([-1.25, -1.28, 0.8, 1.5]))
    symmetric, _ = clipped_surrogate(ratio.log(), torch.zeros(4), advantage, 0.2)
    torch.testing.assert_close(symmetric, torch.tensor([-1.2, -1.2, 0.8, 1.5]))
    rollout, policy = scored(ratio[:, None].log(), torch.zeros(4, 1), advantage[:, None])
    shares = [
        float(loss_of(ClippedSurrogateObjective(0.2, high), rollout, policy).metrics["clip_share"])
        for high in (None, 0.28)
    ]
    assert shares == [1.0, 0.75]


def test_clipped_actions_have_no_gradient() -> None:
    """Where the ratio has gone far enough the way that the advantage wants; never where it went the other way."""
    logprob = torch.tensor([1.3, 0.7, 1.3, 0.7]).log().requires_grad_()
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0])
    clipped_surrogate(logprob, torch.zeros(4), advantage, 0.2)[0].sum().backward()
    torch.testing.assert_close(logprob.grad, torch.tensor([0.0, -0.7, 1.3, 0.0]))


@pytest.mark.parametrize("high", [None, 0.28])
def test_a_ratio_that_is_no_number_is_not_hidden_by_the_clip(high: float | None) -> None:
    terms, _ = clipped_surrogate(torch.full((2,), torch.nan), torch.zeros(2), torch.tensor([1.0, -1.0]), 0.2, high)
    assert terms.isnan().all()


def test_gradient_against_finite_differences() -> None:
    rng = torch.Generator().manual_seed(0)
    logprob, old, advantage = (torch.randn(20, generator=rng, dtype=torch.float64) for _ in range(3))
    assert torch.autograd.gradcheck(
        lambda x: clipped_surrogate(x, old, advantage, 0.2, 0.28)[0], logprob.requires_grad_()
    )


@pytest.mark.parametrize(("aggregate", "horizon", "expected"), [
    ("token", None, -3 / 5), ("sequence", None, 0.0), ("constant", None, -3 / 8), ("constant", 10, -3 / 20),
])  # fmt: skip
def test_ppo_and_grpo_weigh_a_long_and_a_short_sample_differently(
    aggregate: Any, horizon: int | None, expected: float
) -> None:
    """Four steps of advantage 1 and one step of advantage -1, at ratio 1."""
    mask = torch.tensor([[True] * 4, [True, False, False, False]])
    rollout, policy = scored(torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([[1.0], [-1.0]]).expand(2, 4), mask)
    loss = loss_of(ClippedSurrogateObjective(aggregate=aggregate, horizon=horizon), rollout, policy)
    assert float(loss.total) == pytest.approx(expected)


def test_of_equal_lengths_ppo_and_grpo_agree(sampled: Sampled) -> None:
    policy, rollout = sampled()
    rollout = rollout.replace(advantages=torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))
    losses = [loss_of(ClippedSurrogateObjective(aggregate=a), rollout, policy).total for a in ("token", "sequence")]
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("junk", [1e30, torch.nan, torch.inf])
def test_steps_that_are_not_learned_from_count_nowhere(junk: float) -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    logprob = torch.where(mask, torch.tensor(0.1), 0).requires_grad_()
    old, advantages = torch.where(mask, 0.0, junk), torch.where(mask, 1.0, junk)
    rollout, policy = scored(logprob, old, advantages, mask)
    loss = loss_of(ClippedSurrogateObjective(0.2, aggregate="token"), rollout, policy)
    assert float(loss.total.detach()) == pytest.approx(-float(torch.tensor(0.1).exp()))
    loss.total.backward()
    assert (logprob.grad[~mask] == 0).all()
    assert (logprob.grad[mask] < 0).all()
    assert all(bool(metric.isfinite()) for metric in loss.metrics.values())
    assert float(loss.metrics["clip_share"]) == 0


def test_approximate_divergence_is_k3() -> None:
    ratio = torch.tensor([[1.2, 0.9]])
    rollout, policy = scored(ratio.log(), torch.zeros(1, 2), torch.ones(1, 2))
    expected = (ratio - 1 - ratio.log()).mean()
    torch.testing.assert_close(loss_of(OBJECTIVE, rollout, policy).metrics["approx_kl"], expected)


def gradients(policy: FlowPolicy, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(policy.parameters())))


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("level", [0.3, 0.7])
@pytest.mark.parametrize("steps", [2, 4])
def test_first_update_of_a_flow_policy(sampled: Sampled, guidance: float, level: float, steps: int) -> None:
    """No ratio is off, nothing is clipped, and the gradient is that of `-A log p` (REINFORCE)."""
    policy, rollout = sampled(knobs={"guidance": guidance, "noise_level": level, "sampling_steps": steps})
    advantages = torch.randn(8, 1, generator=torch.Generator().manual_seed(0)).expand(8, steps)
    loss = loss_of(OBJECTIVE, rollout.replace(advantages=advantages), policy)
    assert float(loss.metrics["ratio_deviation"]) < 5e-6
    assert float(loss.metrics["clip_share"]) == 0
    learned = rollout.loss_mask / rollout.loss_mask.sum()
    expected = gradients(policy, -(advantages * policy.logprob(rollout) * learned).sum())
    for found, wanted in zip(gradients(policy, loss.total), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_gradient_of_the_first_update_against_finite_differences(sampled: Sampled) -> None:
    """Along random directions: the loss moves as `-A (log p - log p_old)` does."""
    policy, rollout = sampled(logprob_reduce="sum")
    advantages = torch.tensor([1.0, -1, 2, 0.5, -0.5, -2, 1, -1])[:, None].expand(8, 4)
    rollout = rollout.replace(advantages=advantages)
    objective = ClippedSurrogateObjective(clip=0.2)
    parameters = list(policy.parameters())
    gradient = gradients(policy, loss_of(objective, rollout, policy).total)
    for seed in range(3):
        rng = torch.Generator().manual_seed(seed)
        directions = [torch.randn(p.shape, generator=rng) for p in parameters]

        def value(size: float, directions: list[Tensor] = directions) -> float:
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.data.add_(direction, alpha=size)
            logprob = policy.logprob(rollout).detach().double()
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.data.sub_(direction, alpha=size)
            return float(-(advantages * logprob)[rollout.loss_mask].mean())

        expected = (value(1e-3) - value(-1e-3)) / 2e-3
        found = sum(float((g * d).sum()) for g, d in zip(gradient, directions, strict=True))
        assert found == pytest.approx(expected, rel=2e-2, abs=1e-3)


def test_identical_rewards_give_zero_gradient(sampled: Sampled) -> None:
    policy, rollout = sampled()
    rollout = rollout.replace(reward=torch.full((8,), 0.1), group=torch.arange(8) // 4)
    loss = loss_of(OBJECTIVE, GroupRelativeAdvantage()(rollout, {}, {}), policy)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients(policy, loss.total))


def test_last_step_of_a_flow_policy_is_not_learned_from(sampled: Sampled) -> None:
    policy, rollout = sampled()
    advantages = torch.ones(8, 4)
    tampered = rollout.actions.clone()
    tampered[:, -1] += 1.0
    losses = [
        loss_of(OBJECTIVE, r.replace(advantages=advantages), policy).total
        for r in (rollout, rollout.replace(actions=tampered))
    ]
    assert torch.equal(losses[0], losses[1])


def test_passes_the_checker_for_objectives() -> None:
    assert_ok(ClippedSurrogateObjective())


def test_bad_inputs_are_named(sampled: Sampled) -> None:
    policy, rollout = sampled()
    with pytest.raises(ValueError, match="'advantages', which the rollout of task policy lacks; give the stage a cre"):
        loss_of(OBJECTIVE, rollout, policy)
    policy, plain = sampled(knobs={"noise_level": 0.0})
    with pytest.raises(ValueError, match=r"'logprobs', .* lacks; sample with a stochastic policy.*noise_level > 0"):
        loss_of(OBJECTIVE, plain.replace(advantages=torch.ones(8, 4)), policy)
    for settings in ({"clip": 0.0}, {"clip_high": -0.1}):
        with pytest.raises(ValueError, match="expected > 0"):
            ClippedSurrogateObjective(**settings)
    with pytest.raises(ValueError, match="clip=-1"):
        clipped_surrogate(torch.zeros(1), torch.zeros(1), torch.zeros(1), -1)
    with pytest.raises(ValueError, match=r"shapes \[2\], \[1\] and \[1\] differ"):
        clipped_surrogate(torch.zeros(2), torch.zeros(1), torch.zeros(1), 0.2)


def test_standardized_advantages_are_those_of_the_whole_minibatch() -> None:
    """Steps that are left out count nowhere, and micro-batches add up to the whole."""
    rng = torch.Generator().manual_seed(0)
    mask = torch.rand(6, 3, generator=rng) < 0.7
    old, advantages = torch.randn(2, 6, 3, generator=rng)
    rollout, policy = scored(old, old, 5 * advantages + 2, mask)
    objective = ClippedSurrogateObjective(0.2, aggregate="token", standardize=True)
    told = rollout.advantages[mask]
    standard = (rollout.advantages - told.mean()) / told.std(correction=0)
    by_hand = loss_of(ClippedSurrogateObjective(0.2, aggregate="token"), rollout.replace(advantages=standard), policy)
    assert float(loss_of(objective, rollout, policy).total) == pytest.approx(float(by_hand.total), abs=1e-6)
    assert float(by_hand.total) == pytest.approx(0, abs=1e-6)
    parts = []
    for rows in (slice(0, 2), slice(2, 6)):
        part, scorer = scored(old[rows], old[rows], rollout.advantages[rows], mask[rows])
        batch = Batch(part, {"policy": scorer}, {}, rng, whole=rollout, rows=rows)
        parts.append(float(objective(batch).total))
    by_hand_first = -(standard[:2] * mask[:2]).sum() / mask.sum()
    assert parts[0] == pytest.approx(float(by_hand_first), abs=1e-6)
    assert sum(parts) == pytest.approx(0, abs=1e-6)
