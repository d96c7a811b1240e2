"""The grid with a paying corner: moves, slips, worth and walks."""

from __future__ import annotations

import pytest
import torch

from regimen.models import OneHotTorso
from regimen.policies.action import ActionPolicy
from regimen.policies.heads import CategoricalHead
from regimen.tasks.worlds.corner_grid import CornerGrid


def test_moves_lead_to_neighbours_and_the_border_holds() -> None:
    world = CornerGrid(3, slip=0.0)
    led = world.transitions.argmax(2)
    assert sorted(led[4].tolist()) == [1, 3, 5, 7]
    assert sorted(led[0].tolist()) == [0, 0, 1, 3]
    assert float(world.transitions.max()) == 1.0


def test_a_slip_is_a_uniform_move() -> None:
    world = CornerGrid(3, slip=0.4)
    assert sorted(world.transitions[4].flatten().unique().tolist()) == pytest.approx([0.0, 0.1, 0.7])


def test_the_expert_goes_to_the_corner_and_stays() -> None:
    world = CornerGrid(8)
    assert world.worth(world.expert) == pytest.approx(0.648, abs=5e-4)
    assert world.worth(torch.full((64, 4), 0.25)) == pytest.approx(1 / 64, abs=1e-6)
    walk = world.walks(world.expert, torch.zeros(1, dtype=torch.int64), 40, torch.Generator().manual_seed(0))
    assert len(walk) == 40
    assert int(walk["step_columns", "next_observations"][-1]) in (63, 62, 55)


def test_walks_are_single_steps_that_follow_each_other() -> None:
    world, rng = CornerGrid(4), torch.Generator().manual_seed(0)
    rows = world.walks(torch.full((16, 4), 0.25), torch.tensor([3, 5]), 6, rng)
    seen, after = rows["observations"].view(6, 2), rows["step_columns", "next_observations"].view(6, 2)
    assert torch.equal(seen[1:], after[:-1])
    assert seen[0].tolist() == [3, 5]
    assert "env_reward" not in rows["step_columns"].keys()  # noqa: SIM118
    visits = world.visits(rows)
    assert float(visits.sum()) == pytest.approx(1.0)
    assert float(visits[3].sum()) >= 1 / 12


def test_what_a_policy_is_worth_is_measured_from_its_likelihoods() -> None:
    world = CornerGrid(3)
    policy = ActionPolicy(OneHotTorso(9), CategoricalHead(9, 4))
    with torch.no_grad():
        policy.head.logits.weight.copy_(50 * world.expert.T)
    found = world.measure({"policy": policy}, None)  # type: ignore[arg-type]
    assert found["expert_share"] == pytest.approx(1.0)
    assert found["worth"] == pytest.approx(world.worth(world.expert))


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="size=1, slip=0.1"):
        CornerGrid(1)
