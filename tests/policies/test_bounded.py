"""A head whose mean stays in a box: densities at the border, temperature, bad boxes."""

from __future__ import annotations

import math

import pytest
import torch

from regimen.models import MLPTorso
from regimen.policies.action import ActionPolicy
from regimen.policies.bounded import BoundedMeanHead
from regimen.rollout import Rollout


def test_the_mean_stays_in_the_box_and_the_deviation_is_relative_to_it() -> None:
    head = BoundedMeanHead(3, 2, box=([-2.0, 0.0], [2.0, 1.0]), std=0.2, gain=100.0)
    described = head(torch.randn(50, 3))
    assert bool((described.mean[:, 0].abs() <= 2).all())
    assert bool(((described.mean[:, 1] >= 0) & (described.mean[:, 1] <= 1)).all())
    assert described.std[0].tolist() == pytest.approx([0.4, 0.1])
    assert head(torch.randn(1, 3), 2.0).std[0].tolist() == pytest.approx([0.8, 0.2])


def test_a_clipped_action_has_a_finite_density() -> None:
    head = BoundedMeanHead(1, 1, box=(-2.0, 2.0), std=0.5)
    with torch.no_grad():
        head.mean.weight.zero_()
    found = head(torch.zeros(1, 1)).logprob(torch.tensor([[2.0]]))
    assert float(found.detach()) == pytest.approx(-2.0 - 0.5 * math.log(2 * math.pi))


def test_a_policy_with_it_is_scored_as_it_acts(rng: torch.Generator) -> None:
    policy = ActionPolicy(MLPTorso(2, (4,)), BoundedMeanHead(4, 1))
    seen = torch.randn(5, 2)
    acted = policy.act(seen, None, torch.ones(5, dtype=torch.bool), {"temperature": 0.5}, rng)
    rollout = Rollout.create(
        task="t",
        group=torch.arange(5),
        mask=torch.ones(5, 1, dtype=torch.bool),
        observations=seen[:, None],
        actions=acted.actions[:, None],
        knobs={"temperature": 0.5},
    )
    torch.testing.assert_close(policy.logprob(rollout)[:, 0].detach(), acted.logprobs)


@pytest.mark.parametrize("settings", [{"box": (1.0, -1.0)}, {"box": (-1.0, math.inf)}, {"std": 0.0}])
def test_boxes_and_deviations_that_do_not_do_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="BoundedMeanHead: box from .* expected finite bounds"):
        BoundedMeanHead(2, 1, **settings)  # type: ignore[arg-type]
