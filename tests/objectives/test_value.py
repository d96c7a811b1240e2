"""The critic's loss, and PPO as a sum of its parts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from regimen.credit.gae import GAE
from regimen.knobs import Knobs
from regimen.models.value_head import ValueHead
from regimen.objectives.base import Batch
from regimen.objectives.clipped_surrogate import ClippedSurrogateObjective
from regimen.objectives.entropy import EntropyBonus
from regimen.objectives.value import ValueObjective, value_loss
from regimen.rollout import Rollout


class Critic(nn.Module):
    """A value per observation, by a line."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.5))

    def forward(self, rollout: Rollout) -> Tensor:
        return self.slope * rollout.observations


def targets(target: Tensor, mask: Tensor | None = None, **columns: Tensor) -> Rollout:
    mask = torch.ones_like(target, dtype=torch.bool) if mask is None else mask
    observations = torch.ones_like(target).cumsum(1)
    return Rollout.create(
        task="t", group=torch.arange(len(target)), mask=mask, observations=observations,
        columns={"value_target": target, **columns},
    )  # fmt: skip


def batch_of(rollout: Rollout, **cast: object) -> Batch:
    return Batch(rollout, cast, {}, torch.Generator())


def test_value_loss_by_hand() -> None:
    values, target, old = torch.tensor([1.0, 3.0, 3.0]), torch.tensor([2.0, 2.0, 5.0]), torch.tensor([0.0, 2.9, 0.0])
    assert value_loss(values, target).tolist() == [1, 1, 4]
    # clipped to 0.5 (error 1.5), not clipped, clipped to 0.5 (error 4.5)
    assert value_loss(values, target, old, 0.5).tolist() == [2.25, 1, 20.25]


def test_wide_clip_is_no_clip() -> None:
    values, target, old = torch.randn(3, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(value_loss(values, target, old, 1e3), value_loss(values, target))


@pytest.mark.parametrize("clip", [None, 0.3])
def test_gradient(clip: float | None) -> None:
    rng = torch.Generator().manual_seed(0)
    values, target, old = torch.randn(3, 4, 4, generator=rng, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: value_loss(v, target, old, clip).sum(), values.requires_grad_())


def test_clipped_value_beyond_reach_has_no_gradient() -> None:
    """Moving on changes nothing once the value has left the range in the direction of its target."""
    values = torch.tensor([2.0], requires_grad=True)
    value_loss(values, torch.tensor([5.0]), torch.tensor([0.0]), 0.5).backward()
    assert values.grad is not None
    assert float(values.grad) == 0


def test_a_value_that_has_not_left_the_clip_has_the_whole_gradient() -> None:
    """Also where the two errors differ by no more than rounding."""
    rng = torch.Generator().manual_seed(0)
    old, moved, target = torch.randn(3, 1000, generator=rng)
    values = (old + 0.29 * moved.clamp(-1, 1)).requires_grad_()
    value_loss(values, target, old, 0.3).sum().backward()
    torch.testing.assert_close(values.grad, 2 * (values.detach() - target))


def test_mean_over_steps_that_are_learned_from() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    rollout = targets(torch.tensor([[0.0, 3.0, torch.nan], [1.5, torch.nan, torch.nan]]), mask)
    loss = ValueObjective()(batch_of(rollout, critic=Critic()))
    assert float(loss.total.detach()) == pytest.approx((0.25 + 4 + 1) / 3)
    loss.total.backward()
    assert float(loss.metrics["value_mean"]) == pytest.approx((0.5 + 1 + 0.5) / 3)


def test_explained_variance() -> None:
    rollout = targets(torch.tensor([[0.5, 1.0, 1.5]]))
    perfect = ValueObjective()(batch_of(rollout, critic=Critic()))
    constant = ValueObjective()(batch_of(rollout, critic=lambda r: torch.ones(1, 3)))
    assert float(perfect.metrics["explained_variance"]) == pytest.approx(1)
    assert float(constant.metrics["explained_variance"]) == pytest.approx(0)


def test_micro_batches_add_up() -> None:
    rng = torch.Generator().manual_seed(0)
    mask = torch.arange(4) < torch.tensor([[1], [4], [2], [3], [4]])
    rollout = targets(torch.randn(5, 4, generator=rng), mask, values=torch.randn(5, 4, generator=rng))
    objective, critic = ValueObjective(clip=0.2), Critic()
    whole = objective(batch_of(rollout, critic=critic)).total
    parts = [slice(0, 2), slice(2, 5)]
    cut = [objective(Batch(rollout[s], {"critic": critic}, {}, torch.Generator(), rollout, s)).total for s in parts]
    assert torch.allclose(sum(cut), whole)  # type: ignore[arg-type]


def test_value_head_reads_the_policys_hidden_states() -> None:
    """One forward pass serves surrogate and value, and their gradients meet in the network."""
    trunk = nn.Linear(1, 3)

    class Policy(nn.Module):
        calls = 0

        def __init__(self) -> None:
            super().__init__()
            self.trunk = trunk

        def distribution(self, rollout: Rollout, where: Tensor) -> SimpleNamespace:
            self.calls += 1
            hidden = self.trunk(rollout.observations[..., None])
            return SimpleNamespace(hidden=hidden, logprob=hidden.mean(-1), entropy=lambda: hidden.var(-1))

    policy, critic = Policy(), ValueHead(3)
    nn.init.normal_(critic.layer.weight)
    rollout = targets(torch.ones(2, 4)).replace(logprobs=torch.zeros(2, 4), reward=torch.arange(2.0))
    cast = {"policy": policy, "critic": critic}
    credited = GAE(reads="policy")(rollout, {}, cast)
    objective = ClippedSurrogateObjective() + 0.5 * ValueObjective(reads="policy") - 0.01 * EntropyBonus()
    policy.calls = 0
    loss = objective(Batch(credited, cast, Knobs.of(objective), torch.Generator()))
    assert policy.calls == 1
    loss.total.backward()
    assert trunk.weight.grad is not None
    assert critic.layer.weight.grad is not None


def test_ppo_is_a_sum_of_parts() -> None:
    objective = ClippedSurrogateObjective(aggregate="token") + 0.5 * ValueObjective() - 0.01 * EntropyBonus()
    assert {knob.name: knob.default for knob in objective.knobs} == {
        "weight/surrogate": 1.0, "weight/value": 0.5, "weight/entropy": 0.01,
    }  # fmt: skip
    steps = SimpleNamespace(logprob=torch.zeros(1, 2), entropy=lambda: torch.tensor([[2.0, 4.0]]))
    policy = SimpleNamespace(distribution=lambda rollout, where: steps)
    rollout = targets(torch.tensor([[1.5, 3.0]])).replace(
        advantages=torch.tensor([[1.0, 2.0]]), logprobs=torch.zeros(1, 2)
    )
    batch = Batch(rollout, {"policy": policy, "critic": Critic()}, Knobs.of(objective), torch.Generator())
    loss = objective(batch)
    assert {name: float(value) for name, value in loss.components.items()} == pytest.approx(
        {"surrogate": -1.5, "value": (1 + 4) / 2, "entropy": 3.0}
    )
    assert float(loss.total.detach()) == pytest.approx(-1.5 + 0.5 * 2.5 - 0.01 * 3)


def test_errors() -> None:
    with pytest.raises(ValueError, match="clip is 0, expected above 0"):
        ValueObjective(clip=0)
    with pytest.raises(ValueError, match=r"values \[2\], target \[3\] differ"):
        value_loss(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="clip=0.2; expected above 0, and with old_values"):
        value_loss(torch.ones(2), torch.ones(2), clip=0.2)
    rollout = targets(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"critic 'critic' gave shape \[2\], expected \[2, 3\]"):
        ValueObjective()(batch_of(rollout, critic=lambda r: torch.zeros(2)))
    with pytest.raises(KeyError, match="no member 'critic'"):
        ValueObjective()(batch_of(rollout))
    with pytest.raises(KeyError, match="no column 'returns'"):
        ValueObjective(target="returns")(batch_of(rollout, critic=Critic()))
