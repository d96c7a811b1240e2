"""The checker of objectives: good ones pass, and every class of failure is explained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from regimen.checkers import StandInPolicy, check
from regimen.knobs import Knob
from regimen.objectives import ClippedSurrogateObjective, Objective, ReferenceKL
from regimen.objectives.base import Batch

Rule = Callable[[Batch], Any]


class Mine(Objective):
    """An objective made of one function."""

    name = "mine"

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def loss(self, batch: Batch) -> Any:
        return self.rule(batch)


def likelihood(batch: Batch) -> Tensor:
    return -(batch.distribution().logprob * batch.weights("token")).sum()


def noisy(batch: Batch) -> Tensor:
    noise = torch.randn(len(batch.rollout), generator=batch.rng)
    return likelihood(batch) * 0.1 + (batch.cast["policy"].log_std.sum() * noise).mean() * batch.share


def test_good_objectives_pass() -> None:
    sum_of_two = ClippedSurrogateObjective() + Knob("kl_weight", 0.1) * ReferenceKL()
    for objective in (Mine(likelihood), Mine(noisy), sum_of_two):
        assert check(objective).messages == []


def spoils(batch: Batch) -> Tensor:
    batch.rollout.advantages.mul_(2)
    return likelihood(batch)


def steps(batch: Batch) -> Tensor:
    with torch.no_grad():
        batch.cast["policy"].log_std.add_(0.01)
    return likelihood(batch)


def root_of_zero(batch: Batch) -> Tensor:
    return batch.cast["policy"].log_std.clamp(min=0).sum().sqrt()


def elsewhere(batch: Batch) -> Tensor:
    return torch.ones(3, requires_grad=True).sum() * batch.share


def global_dice(batch: Batch) -> Tensor:
    return likelihood(batch) * torch.rand(())


def surrogate(batch: Batch) -> Tensor:
    ratio = (batch.distribution().logprob - batch.rollout.logprobs).exp()
    return -(ratio * batch.rollout.advantages * batch.weights("token")).sum()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda b: b.rollout["pixels"].mean(), "objective 'mine' raised KeyError: the rollout of task alpha/beta"),
        (lambda b: b.distribution("critic").logprob.sum(), "the cast has no member 'critic'; it has: policy, ref"),
        (lambda b: b.knobs["beta"] * likelihood(b), "knob 'beta' is read but not declared"),
        (lambda b: b.distribution().logprob, "returned shape [6, 4], expected one number"),
        (lambda b: 3.0, "returned a float, expected one number"),
        (lambda b: likelihood(b) * torch.nan, "the loss is nan, expected a finite number; guard log and division"),
        (lambda b: likelihood(b).detach(), "the loss has no gradient: it depends on no trainable weight of the cast"),
        (elsewhere, "the loss reaches no weight of the cast's members policy, reference"),
        (root_of_zero, "the gradient is not finite although the loss is; a masked branch may hold a NaN"),
        (spoils, "it changed the rollout in place (advantages); other objectives read the same one"),
        (steps, "it changed weights (policy.log_std); an objective gives a loss, the update steps"),
        (global_dice, "the same batch and generator give"),
        (lambda b: -b.distribution().logprob.sum(1).mean(), "cut into micro-batches the loss is"),
        (surrogate, "it reads logprobs or advantages at steps that are not learned from (NaN there makes it nan)"),
    ],
)  # fmt: skip
def test_every_failure_is_explained(rule: Rule, message: str) -> None:
    result = check(Mine(rule))
    assert not result.ok
    assert message in str(result)


def test_what_only_looks_like_an_objective_is_told_what_to_inherit_from() -> None:
    class Duck:
        def loss(self, batch: Batch) -> Tensor:
            return likelihood(batch)

    assert "is none; subclass regimen.objectives.Objective" in str(check(Duck()))


def test_a_term_of_a_sum_that_fails_is_named() -> None:
    broken = Mine(lambda batch: batch.distribution("critic").logprob.sum())
    assert "objective 'surrogate+mine' raised KeyError" in str(check(ClippedSurrogateObjective() + broken))


def test_a_cast_of_ones_own_is_used_and_its_weights_stay() -> None:
    mine = StandInPolicy(3)
    before = mine.weight.clone()
    assert check(Mine(lambda b: -(b.distribution("mine").logprob * b.weights("token")).sum()), cast={"mine": mine}).ok
    assert torch.equal(before, mine.weight)
    assert mine.weight.grad is None
