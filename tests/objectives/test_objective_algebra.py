"""Objectives compose by arithmetic; a batch computes each member's distribution once."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regimen.knobs import Knob, Knobs
from regimen.objectives import ClippedSurrogateObjective, ReferenceKL
from regimen.objectives.base import Batch, Objective
from regimen.policies import FlowPolicy
from regimen.rollout import Rollout


class Fixed(Objective):
    """A given loss."""

    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value, self.calls = name, value, 0

    def loss(self, batch: Batch) -> Any:
        self.calls += 1
        return self.value


def fixed(name: str, value: float) -> Fixed:
    return Fixed(name, (torch.tensor(value), {f"{name}_metric": torch.tensor(10 * value)}))


def batch(knobs: Any = None) -> Batch:
    rollout = Rollout.create(task="t", group=torch.arange(2), mask=torch.ones(2, 3, dtype=torch.bool))
    return Batch(rollout, {}, knobs if knobs is not None else {}, torch.Generator())


def value(objective: Objective, **knobs: float) -> float:
    return float(objective(batch(Knobs.of(objective, **knobs))).total)


def test_sum_difference_and_multiples() -> None:
    a, b = fixed("a", 2.0), fixed("b", 3.0)
    for objective, expected in (
        (a + b, 5.0), (a - b, -1.0), (-a, -2.0), (0.5 * a, 1.0), (a * 0.5, 1.0), (-0.5 * a + b, 2.0),
        (2 * (a + 0.5 * b), 7.0), (-(a - b), 1.0), (-2 * -a, 4.0),
    ):  # fmt: skip
        assert value(objective) == pytest.approx(expected)


def test_weights_are_knobs_whose_sign_is_constant() -> None:
    objective = fixed("a", 2.0) - 0.25 * fixed("b", 3.0)
    assert dict(Knobs.of(objective)) == {"weight/a": 1.0, "weight/b": 0.25}
    assert value(objective, **{"weight/b": 1.0}) == pytest.approx(-1.0)


def test_knob_that_is_given_is_the_weight() -> None:
    inner = fixed("a", 2.0) + fixed("b", 3.0)
    objective = fixed("c", 1.0) + Knob("mix", 0.1) * inner
    assert dict(Knobs.of(objective)) == {"weight/c": 1.0, "mix": 0.1, "weight/a": 1.0, "weight/b": 1.0}
    assert value(objective) == pytest.approx(1.5)
    assert value(objective, mix=2.0) == pytest.approx(11.0)
    assert value(-objective, mix=2.0) == pytest.approx(-11.0)
    assert [leaf.name for leaf in objective.leaves()] == ["c", "a", "b"]
    assert (Knob("mix", 0.1) * inner).term_name == "a+b"


def test_knobs_of_the_terms_are_declared() -> None:
    class Reads(Fixed):
        @property
        def knobs(self) -> tuple[Knob, ...]:
            return (Knob("temperature", 0.7),)

    assert "temperature" in Knobs.of(fixed("a", 1.0) + 0.5 * Reads("b", torch.tensor(1.0)))


def test_components_are_unweighted_and_metrics_merge() -> None:
    objective = fixed("a", 2.0) + Knob("mix", 0.1) * (fixed("b", 3.0) - fixed("c", 4.0))
    loss = objective(batch(Knobs.of(objective)))
    assert {name: float(part) for name, part in loss.components.items()} == {"a": 2.0, "b": 3.0, "c": 4.0}
    assert {name: float(part) for name, part in loss.metrics.items()} == {
        "a_metric": 20.0, "b_metric": 30.0, "c_metric": 40.0,
    }  # fmt: skip


def test_gradients_are_weighted() -> None:
    x = torch.tensor(3.0, requires_grad=True)
    objective = Fixed("a", x.square()) - 0.5 * Fixed("b", x)
    objective(batch(Knobs.of(objective))).total.backward()
    assert float(x.grad) == pytest.approx(6 - 0.5)


def test_term_of_weight_zero_is_not_computed() -> None:
    a, b = fixed("a", 2.0), fixed("b", torch.nan)
    objective = a + Knob("mix", 0.0) * b
    assert value(objective) == 2.0
    assert (a.calls, b.calls) == (1, 0)
    assert "b" not in objective(batch(Knobs.of(objective))).components


def test_all_weights_zero_is_refused() -> None:
    objective = 0 * fixed("a", 2.0) + Knob("mix", 0.0) * fixed("b", 1.0)
    with pytest.raises(ValueError, match=r"every term of the objective has weight 0 \(a\+b\)"):
        value(objective)


def test_two_terms_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two terms of one objective are called a; give one another name"):
        fixed("a", 1.0) + (fixed("b", 1.0) + fixed("a", 2.0))
    with pytest.raises(ValueError, match="called kl"):
        ReferenceKL("k3") + Knob("second", 1.0) * ReferenceKL("exact")
    assert (ReferenceKL("k3") + ReferenceKL("exact", name="kl_exact")).term_name == "kl+kl_exact"


@pytest.mark.parametrize("combine", [lambda a: a + 1, lambda a: a - 1, lambda a: a * "x", lambda a: a * a])
def test_other_operands_are_type_errors(combine: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="unsupported operand|can't multiply"):
        combine(fixed("a", 1.0))


@pytest.mark.parametrize(("returned", "shown"), [
    (torch.zeros(3), r"shape \[3\]"), (torch.zeros(1), r"shape \[1\]"), (2.0, "a float"), (None, "a NoneType"),
])  # fmt: skip
def test_loss_that_is_not_one_number_is_refused(returned: Any, shown: str) -> None:
    with pytest.raises(ValueError, match=f"objective 'a' returned {shown}, expected one number"):
        Fixed("a", returned)(batch())


def test_one_pass_of_a_member_serves_all_terms(sampled: Callable[..., tuple[FlowPolicy, Rollout]]) -> None:
    policy, rollout = sampled()
    reference, passes = policy.reference(), {"policy": 0, "reference": 0}
    for name, member in (("policy", policy), ("reference", reference)):

        def count(_module: nn.Module, _args: Any, name: str = name) -> None:
            passes[name] += 1

        member.denoiser.register_forward_pre_hook(count)
    objective = ClippedSurrogateObjective() + 0.1 * ReferenceKL("exact") + 0.1 * ReferenceKL("k3", name="k3")
    rollout = rollout.replace(advantages=torch.ones(8, 4))
    objective(Batch(rollout, {"policy": policy, "reference": reference}, Knobs.of(objective), torch.Generator()))
    assert passes == {"policy": 1, "reference": 1}


def test_frozen_member_is_run_without_gradients(sampled: Callable[..., tuple[FlowPolicy, Rollout]]) -> None:
    policy, rollout = sampled()
    given = Batch(rollout, {"policy": policy, "reference": policy.reference()}, {}, torch.Generator())
    assert given.distribution("policy").logprob.requires_grad
    assert not given.distribution("reference").logprob.requires_grad
    with torch.no_grad():
        assert not Batch(rollout, {"policy": policy}, {}, torch.Generator()).distribution().logprob.requires_grad


def test_distribution_is_asked_at_the_steps_that_are_learned_from() -> None:
    asked: list[Tensor] = []
    policy = SimpleNamespace(distribution=lambda rollout, where: asked.append(where))
    given = batch()
    loss_mask = torch.tensor([[True, False, True], [False, False, False]])
    Batch(given.rollout.replace(loss_mask=loss_mask), {"policy": policy}, {}, given.rng).distribution()
    assert torch.equal(asked[0], loss_mask)


def test_share_is_a_slices_part_of_the_minibatch() -> None:
    whole = batch()
    assert whole.share == 1
    part = Batch(whole.rollout[:1], {}, {}, whole.rng, whole=whole.rollout, rows=slice(0, 1))
    assert part.share == 0.5
    torch.testing.assert_close(part.weights("token"), torch.full((1, 3), 1 / 6))


@pytest.mark.parametrize("learned", [[True] * 6, [True, False, True, True, True, True]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_mean_over_steps_is_the_sum_under_their_weights(learned: list[bool], dtype: torch.dtype) -> None:
    mask = torch.tensor(learned).view(2, 3)
    given = Batch(Rollout.create(task="t", group=torch.arange(2), mask=mask), {}, Knobs(), torch.Generator())
    per_step = torch.randn(int(mask.sum()), generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    found, expected = given.aggregated(per_step, "token"), (per_step * given.weights("token")[mask]).sum()
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad(loss, per_step)[0] for loss in (found, expected)]
    torch.testing.assert_close(*slopes)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(KeyError, match="the cast has no member 'critic'; it has: "):
        batch().member("critic")
    with pytest.raises(ValueError, match="GAE needs 'advantages', which the rollout of task t lacks; give a credit"):
        batch().require("advantages", "GAE", "give a credit")
