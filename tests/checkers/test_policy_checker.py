"""The checker of policies: a good one passes, and every class of failure is explained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from regimen.checkers import StandInPolicy, check
from regimen.checkers.stand_ins import StandInSteps
from regimen.knobs import Knob
from regimen.rollout import Rollout


def test_good_policies_pass(tiny_policy: Any) -> None:
    contexts = TensorDict({"condition": torch.arange(4) % 2}, batch_size=[4])
    asked = Rollout.create(task="a", group=torch.arange(4), mask=torch.ones(4, 1, dtype=torch.bool), context=contexts)
    assert check(StandInPolicy()).messages == []
    assert check(tiny_policy(), asked).messages == []


class Declares(StandInPolicy):
    """Reads a knob, and samples without recording it."""

    knobs = (Knob("temperature", 1.0),)

    def sample(self, contexts: TensorDict, knobs: Any, rng: torch.Generator) -> Rollout:
        return super().sample(contexts, {}, rng)


class Undeclared(StandInPolicy):
    def sample(self, contexts: TensorDict, knobs: Any, rng: torch.Generator) -> Rollout:
        assert knobs["temperature"]
        return super().sample(contexts, knobs, rng)


class NoRollout(StandInPolicy):
    def sample(self, *args: Any) -> Any:
        return super().sample(*args).actions


class Short(StandInPolicy):
    def sample(self, *args: Any) -> Rollout:
        sampled: Rollout = super().sample(*args)[:2]
        return sampled


class GlobalDice(StandInPolicy):
    def sample(self, contexts: TensorDict, knobs: Any, rng: torch.Generator) -> Rollout:
        return super().sample(contexts, knobs, torch.Generator().manual_seed(int(torch.randint(9999, ()))))


class Repeats(StandInPolicy):
    """Another sample each time, from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._own = torch.Generator().manual_seed(0)

    def sample(self, contexts: TensorDict, knobs: Any, rng: torch.Generator) -> Rollout:
        return super().sample(contexts, knobs, self._own)


class Empty(StandInPolicy):
    def sample(self, *args: Any) -> Rollout:
        rollout = super().sample(*args)
        return rollout.replace(mask=torch.zeros_like(rollout.mask), loss_mask=torch.zeros_like(rollout.mask))


class Padding(StandInPolicy):
    def sample(self, *args: Any) -> Rollout:
        rollout = super().sample(*args)
        return rollout.replace(loss_mask=torch.ones_like(rollout.mask))


class KeepsGraph(StandInPolicy):
    def sample(self, *args: Any) -> Rollout:
        rollout = super().sample(*args)
        with torch.enable_grad():
            return rollout.replace(logprobs=self.distribution(rollout).logprob)


class Impossible(StandInPolicy):
    def sample(self, *args: Any) -> Rollout:
        rollout = super().sample(*args)
        return rollout.replace(logprobs=torch.where(rollout.mask, -torch.inf, 0.0))


class Halved(StandInPolicy):
    """Records log-probabilities of another distribution than it scores."""

    def sample(self, *args: Any) -> Rollout:
        rollout = super().sample(*args)
        return rollout.replace(logprobs=rollout.logprobs / 2)


class Moves(StandInPolicy):
    def sample(self, *args: Any) -> Rollout:
        with torch.no_grad():
            self.log_std.add_(0.1)
        return super().sample(*args)


class Steps(StandInSteps):
    """A distribution to be spoilt."""


class Scores(StandInPolicy):
    """Gives a distribution of another kind than it sampled from."""

    kind: type = Steps

    def sample(self, *args: Any) -> Rollout:
        return StandInPolicy().sample(*args)

    def distribution(self, rollout: Rollout, where: Tensor | None = None) -> Any:
        steps = super().distribution(rollout, where)
        return self.kind(steps.actions, steps.normal, steps.where)


class Summed(Steps):
    logprob = property(lambda self: StandInSteps.logprob.fget(self).sum(1))  # type: ignore[attr-defined]


class Detached(Steps):
    logprob = property(lambda self: StandInSteps.logprob.fget(self).detach())  # type: ignore[attr-defined]


class EverywherePadded(Steps):
    logprob = property(lambda self: self.normal.log_prob(self.actions).sum(-1))


class DividesByPadding(Steps):
    """NaN in the gradient from a branch that is masked away."""

    @property
    def logprob(self) -> Tensor:
        value = self.normal.log_prob(self.actions).sum(-1)
        zero = (self.normal.loc.sum(-1) * 0).sqrt()
        return torch.where(self.where, value, 0) + torch.where(self.where, zero, 0)


class WideEntropy(Steps):
    def entropy(self) -> Tensor:
        return self.normal.entropy()


class SelfDistant(Steps):
    def kl(self, other: Any, estimator: str = "exact") -> Tensor:
        return super().kl(replace(other, normal=torch.distributions.Normal(0.0, 1.0))) + 1


def scores(kind: type) -> StandInPolicy:
    policy = Scores()
    policy.kind = kind
    return policy


class IgnoresWhere(StandInPolicy):
    def distribution(self, rollout: Rollout, where: Tensor | None = None) -> StandInSteps:
        return super().distribution(rollout)


class Silent(StandInPolicy):
    def distribution(self, rollout: Rollout, where: Tensor | None = None) -> StandInSteps:
        raise NotImplementedError

    def sample(self, *args: Any) -> Rollout:
        return StandInPolicy().sample(*args)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Declares(), "sample does not record the knobs temperature; pass knobs=knobs to Rollout.create"),
        (Undeclared(), "knob 'temperature' is read but not declared"),
        (NoRollout(), "sample returned a Tensor, expected a Rollout"),
        (Short(), "sample returned 2 samples for 6 contexts"),
        (GlobalDice(), "sample draws from torch's global generator; draw from the rng that it is given"),
        (Repeats(), "the same generator gives another sample"),
        (Empty(), "some samples have no step at all"),
        (Padding(), "loss_mask is True at steps that do not exist"),
        (KeepsGraph(), "the rollout carries gradients, which would keep every iteration's graph"),
        (Impossible(), "logprobs are not finite at steps that exist"),
        (Halved(), "before any update the ratio to its own samples is off by"),
        (Moves(), "sampling or scoring changed weights or buffers (policy.log_std)"),
        (scores(Summed), "logprob has shape [6], expected [6, 4]"),
        (scores(Detached), "logprob has no gradient; compute it without no_grad, detach or recorded values"),
        (scores(EverywherePadded), "logprob is not 0 at steps that do not exist"),
        (scores(DividesByPadding), "the gradient of logprob is not finite"),
        (scores(WideEntropy), "entropy has shape [6, 4, 2], expected [6, 4]"),
        (scores(SelfDistant), "its KL from itself is up to"),
        (IgnoresWhere(), "distribution(rollout, where) gives other log-probabilities than distribution(rollout)"),
        (Silent(), "distribution raises NotImplementedError without a sentence that says why"),
    ],
)  # fmt: skip
def test_every_failure_is_explained(policy: Any, message: str) -> None:
    result = check(policy)
    assert not result.ok
    assert message in str(result)


def test_a_policy_that_cannot_score_says_why_and_passes() -> None:
    class Planner(Silent):
        def distribution(self, rollout: Rollout, where: Tensor | None = None) -> StandInSteps:
            raise NotImplementedError("a planner has no log-probabilities")

    assert check(Planner()).messages == []


def test_a_policy_that_lacks_a_part_is_told_which() -> None:
    class Half:
        def distribution(self, rollout: Rollout) -> None:
            return None

    assert "it looks like a Policy (it has distribution) but lacks knobs, sample" in str(check(Half()))
