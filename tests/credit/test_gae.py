"""GAE as a part: where values come from, what is normalised, what is left out."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from regimen.credit.gae import GAE
from regimen.functions.returns import gae
from regimen.knobs import Knob
from regimen.rollout import Rollout


def rollout_of(reward: Tensor, mask: Tensor | None = None, task: str = "walk", **fields: Any) -> Rollout:
    """A rollout with a reward, `[B]` (then with `mask`) or `[B, T]`."""
    if mask is None:
        mask = torch.ones_like(reward, dtype=torch.bool)
    return Rollout.create(task=task, group=torch.arange(len(reward)), mask=mask, reward=reward, **fields)


def constant(value: float) -> Callable[[Rollout], Tensor]:
    return lambda rollout: torch.full(rollout.mask.shape, value)


def test_asks_the_critic() -> None:
    rollout = rollout_of(torch.tensor([[1.0, 2.0, 3.0]]))
    credited = GAE(0.9, normalize=None)(rollout, {}, {"critic": constant(2.0)})
    values = torch.full((1, 3), 2.0)
    advantages, target = gae(rollout.reward, values, rollout.discount, 0.9)
    assert torch.equal(credited.advantages, advantages)
    assert torch.equal(credited["value_target"], target)
    assert torch.equal(credited["values"], values)


def test_prefers_recorded_values() -> None:
    rollout = rollout_of(torch.ones(1, 3)).with_columns(values=torch.tensor([[3.0, 2.0, 1.0]]))
    credited = GAE(1.0, normalize=None)(rollout, {}, {})
    assert torch.allclose(credited.advantages, torch.zeros(1, 3), atol=1e-6)


def test_reads_hidden_states() -> None:
    """A critic that shares the policy's network is given its hidden states."""
    hidden = torch.arange(6.0).view(1, 3, 2)
    policy = SimpleNamespace(distribution=lambda rollout, where: SimpleNamespace(hidden=hidden))
    rollout = rollout_of(torch.ones(1, 3))
    credited = GAE(reads="policy")(rollout, {}, {"policy": policy, "critic": lambda h: h.sum(-1)})
    assert torch.equal(credited["values"], hidden.sum(-1))


def test_a_knob_multiplies_the_discount_that_was_recorded() -> None:
    """As for texts, which record none: the value in force now counts, and what has terminated stays so."""
    reward, ended = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, 0.0, 1.0]])
    credit = GAE(1.0, normalize=None, discount=Knob("discount", 0.9))
    assert [knob.name for knob in credit.knobs] == ["discount"]
    assert GAE().knobs == ()
    credited = credit(rollout_of(reward, discount=ended), {"discount": 0.5}, {"critic": constant(0.0)})
    assert credited.advantages.tolist() == [[2.0, 2.0, 4.0]]
    assert torch.equal(credited.discount, ended)


def test_keeps_no_gradient() -> None:
    weight = torch.ones(1, requires_grad=True)
    rollout = rollout_of(torch.ones(1, 3))
    credited = GAE()(rollout, {}, {"critic": lambda r: weight.expand(r.mask.shape)})
    assert not credited.advantages.requires_grad
    assert not credited["value_target"].requires_grad


def test_reward_of_a_sample_counts_at_its_last_step() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    rollout = rollout_of(torch.tensor([1.0, 2.0]), mask)
    credited = GAE(0.0, normalize=None)(rollout, {}, {"critic": constant(0.0)})
    assert torch.equal(credited.advantages, torch.tensor([[0, 1.0, 0], [0, 0, 2.0]]))


def test_foreign_steps_are_passed_through() -> None:
    """Another speaker's turn has no advantage, and the reward behind it reaches the turn before."""
    mask = torch.ones(1, 4, dtype=torch.bool)
    own = torch.tensor([[True, False, False, True]])
    rollout = rollout_of(torch.tensor([1.0]), mask, loss_mask=own)
    credited = GAE(1.0, normalize=None)(rollout, {}, {"critic": constant(0.25)})
    assert torch.equal(credited.advantages, torch.tensor([[0.75, 0, 0, 0.75]]))
    assert torch.equal(credited["value_target"], torch.tensor([[1.0, 0, 0, 1.0]]))


def test_bootstraps_where_it_was_cut() -> None:
    """One environment row: an episode stopped by the time limit, then one that goes on after the fragment."""
    rollout = rollout_of(torch.ones(1, 4), discount=torch.full((1, 4), 0.5)).with_columns(
        cut=torch.tensor([[False, True, False, False]]), bootstrap=torch.tensor([[0.0, 8.0, 0.0, 4.0]])
    )
    credited = GAE(1.0, normalize=None)(rollout, {}, {"critic": constant(0.0)})
    assert torch.equal(credited["value_target"], torch.tensor([[3.5, 5.0, 2.5, 3.0]]))


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3])
def test_normalises_over_the_steps_that_are_learned_from(scale: float) -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    reward = scale * torch.tensor([[1.0, 2.0, 900.0], [3.0, 5.0, 8.0]])
    rollout = rollout_of(reward, mask)
    credited = GAE()(rollout, {}, {"critic": constant(0.0)})
    found = credited.advantages[mask]
    raw = GAE(normalize=None)(rollout, {}, {"critic": constant(0.0)})
    expected = raw.advantages[mask]
    expected = (expected - expected.mean()) / expected.std()
    assert torch.allclose(found, expected, atol=1e-4)
    assert torch.equal(credited.advantages[~mask], torch.zeros(1))
    assert torch.equal(credited["value_target"], raw["value_target"])


def test_normalises_per_task() -> None:
    """A task with large returns does not drown the other."""
    small = rollout_of(torch.rand(4, 3), task="small")
    large = rollout_of(100 + 50 * torch.rand(4, 3), task="large")
    both = Rollout.cat([small, large])
    credited = GAE(normalize="task")(both, {}, {"critic": constant(0.0)})
    for task in ("small", "large"):
        found = credited.of_task(task).advantages
        assert abs(float(found.mean())) < 1e-5
        assert float(found.std()) == pytest.approx(1, abs=1e-4)


def test_equal_advantages_normalise_to_zero() -> None:
    """Not to a rounding error over a rounding error."""
    rollout = rollout_of(torch.full((3, 1), 0.1))
    credited = GAE()(rollout, {}, {"critic": constant(0.0)})
    assert torch.equal(credited.advantages, torch.zeros(3, 1))


def test_unjudged_samples_count_nowhere() -> None:
    rollout = rollout_of(torch.tensor([[1.0, 2.0], [3.0, 5.0], [1e6, 1e6]]))
    rollout = rollout.replace(loss_mask=torch.tensor([[True] * 2, [True] * 2, [False] * 2]))
    cast = {"critic": constant(0.5)}
    credited = GAE()(rollout, {}, cast)
    assert torch.equal(credited.advantages[:2], GAE()(rollout[:2], {}, cast).advantages)
    assert torch.equal(credited.advantages[2], torch.zeros(2))


def test_errors() -> None:
    with pytest.raises(ValueError, match="lam is 2"):
        GAE(2)
    with pytest.raises(ValueError, match="normalize 'group' is not one of batch, task, None"):
        GAE(normalize="group")  # type: ignore[arg-type]
    rollout = rollout_of(torch.ones(1, 2))
    with pytest.raises(ValueError, match="no column 'values' and the cast no member 'critic'"):
        GAE()(rollout, {}, {"policy": object()})
    with pytest.raises(ValueError, match="no reward"):
        GAE()(Rollout.create(task="t", group=torch.zeros(1, dtype=torch.int64), mask=rollout.mask), {}, {})
    with pytest.raises(ValueError, match=r"values has shape \[1\], expected \[1, 2\]"):
        GAE()(rollout, {}, {"critic": lambda r: torch.zeros(1)})
