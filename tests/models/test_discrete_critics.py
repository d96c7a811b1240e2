"""Critics of discrete actions: a table each, and a choice that IQL learns from data."""

from __future__ import annotations

import pytest
import torch

from regimen.cast import Cast, ReferenceRefresh
from regimen.loop import train
from regimen.models import DiscreteCritics, OneHotTorso, ValueNetwork
from regimen.objectives import TotalVariation, iql
from regimen.policies.action import ActionPolicy
from regimen.policies.heads import CategoricalHead
from regimen.regimen import Regimen, Stage
from regimen.rewards import EnvironmentReward
from regimen.tasks import DatasetTask, transition_rows
from regimen.update import Update


def test_each_critic_is_a_table_of_its_own() -> None:
    critics = DiscreteCritics(OneHotTorso(3), 2, critics=2)
    cells, actions = torch.tensor([0, 1, 2, 2]), torch.tensor([1, 0, 1, 0])
    values = critics(cells, actions)
    assert list(values.shape) == [2, 4]
    for number, head in enumerate(critics.heads):
        table = head.advantages.weight.T + head.advantages.bias
        torch.testing.assert_close(values[number], table[cells, actions])


def test_offline_control_of_discrete_actions_learns_the_better_one() -> None:
    """Two steps to go; only action 0 and then action 1 pays, and the data hold each with probability a half."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    cells, actions = torch.randint(2, (400,), generator=rng), torch.randint(2, (400,), generator=rng)
    over = (cells == 1) | (actions == 1)
    reward = ((cells == 1) & (actions == 1)).float() + 0.2 * ((cells == 0) & (actions == 1))
    rows = transition_rows(cells, actions, (~over).float(), torch.ones_like(cells), reward)
    cast = Cast(
        policy=ActionPolicy(OneHotTorso(2), CategoricalHead(2, 2)),
        critic=DiscreteCritics(OneHotTorso(2), 2),
        value=ValueNetwork(OneHotTorso(2)),
    )
    update = Update(iql(f=TotalVariation(0.8), discount=0.9), ["value", "policy", "critic"], learning_rate=0.1)
    rule = ReferenceRefresh("critic_target", of="critic", mode="ema", decay=0.9)
    task = DatasetTask("data", rows, order="random")
    train(Regimen(cast, [Stage("offline", [task], 120, 64, EnvironmentReward(), updates=[update], rules=[rule])]))
    chosen = cast["policy"].head(torch.eye(2)).mode()
    assert chosen.tolist() == [0, 1]
    values = cast["critic"](torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1])).detach()
    assert values[0].tolist() == pytest.approx([0.9, 0.2, 1.0], abs=0.1)


def test_no_critics_are_refused() -> None:
    with pytest.raises(ValueError, match="critics=0; expected at least 1"):
        DiscreteCritics(OneHotTorso(2), 2, critics=0)
