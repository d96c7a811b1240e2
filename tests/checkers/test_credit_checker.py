"""The checker of credit: good ones pass, and every class of failure is explained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from regimen.checkers import check
from regimen.credit import GroupRelativeAdvantage
from regimen.knobs import Knob
from regimen.rollout import Rollout

Rule = Callable[[Rollout], Rollout]


class Credit:
    """A credit made of one function."""

    knobs: tuple[Knob, ...] = ()

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def __call__(self, rollout: Rollout, knobs: Any, cast: Any) -> Rollout:
        return self.rule(rollout)


def total(rollout: Rollout) -> torch.Tensor:
    return rollout.reward if rollout.reward.ndim == 1 else (rollout.reward * rollout.mask).sum(1)


def copied_to_steps(rollout: Rollout) -> Rollout:
    return rollout.replace(advantages=total(rollout)[:, None] * rollout.loss_mask)


def best_half(rollout: Rollout) -> Rollout:
    best: Rollout = rollout[total(rollout) >= total(rollout).median()]
    return best


def test_good_credits_pass() -> None:
    for credit in (GroupRelativeAdvantage(), Credit(copied_to_steps), Credit(best_half)):
        assert check(credit).messages == []


def spoils_reward(rollout: Rollout) -> Rollout:
    rollout.reward.sub_(1)
    return copied_to_steps(rollout)


def rewrites_reward(rollout: Rollout) -> Rollout:
    return copied_to_steps(rollout).replace(reward=rollout.reward + 1)


def whitened(rollout: Rollout) -> Rollout:
    value = total(rollout)
    return rollout.replace(advantages=((value - value.mean()) / value.std())[:, None] * rollout.loss_mask)


def mean_over_learned_steps(rollout: Rollout) -> Rollout:
    return rollout.replace(advantages=rollout.loss_mask / rollout.loss_mask.sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda r: r.reward, "it returned a Tensor, expected a Rollout"),
        (lambda r: r, "it returned the rollout unchanged; expected rollout.replace(advantages=...), a selection or"),
        (lambda r: r.replace(advantages=total(r)), "rollout field 'advantages' has shape [6], expected [6, 4"),
        (lambda r: r.replace(advantages=total(r)[:, None] * r.mask), "samples [0] are not 0 at steps that are not"),
        (lambda r: copied_to_steps(r).replace(advantages=r.loss_mask / 0.0), "are not finite; guard divisions"),
        (spoils_reward, "it changed the rollout it was given (reward); return rollout.replace(...) instead"),
        (rewrites_reward, "it changed what was judged (reward), so that the log would disagree with what is learned"),
        (lambda r: r.replace(advantages=torch.rand(len(r), 4) * r.loss_mask), "is credited differently the second"),
        (lambda r: r.replace(advantages=torch.arange(len(r))[:, None] * r.loss_mask), "in another order they get"),
        (whitened, "identical rewards give advantages that are not finite; add a small number to the deviation"),
        (mean_over_learned_steps, "advantages of samples [0] are not 0 at steps that are not learned from"),
        (lambda r: r.replace(advantages=r.reward[:, None] * r.loss_mask), "'advantages' has shape [6, 6, 4], expected"),
        (lambda r: r.replace(advantages=r["values"]), "credit(rollout, knobs, cast) raised KeyError: the rollout of"),
    ],
)  # fmt: skip
def test_every_failure_is_explained(rule: Rule, message: str) -> None:
    result = check(Credit(rule))
    assert not result.ok
    assert message in str(result)


def test_a_knob_must_be_declared() -> None:
    class Scaled(Credit):
        def __call__(self, rollout: Rollout, knobs: Any, cast: Any) -> Rollout:
            return copied_to_steps(rollout.replace(reward=rollout.reward * knobs["scale"]))

    scaled = Scaled(copied_to_steps)
    assert "knob 'scale' is read but not declared" in str(check(scaled))
    scaled.knobs = (Knob("scale", 1.0),)
    assert check(scaled).ok
    assert "it changed what was judged (reward)" in str(check(scaled, knobs={"scale": 2.0}))
