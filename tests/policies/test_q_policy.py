"""Policies of action values: greedy, at random, and between; and the policy that is always at random."""

from __future__ import annotations

from typing import Any

import gymnasium.spaces as spaces
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from regimen.checkers import check
from regimen.knobs import Knobs
from regimen.policies import QPolicy, UniformPolicy
from regimen.rollout import Rollout


class Table(nn.Module):
    """Features that are the values themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]]))

    def forward(self, cells: Tensor) -> Tensor:
        return self.values[cells.long()]


def policy() -> QPolicy:
    return QPolicy(Table(), nn.Identity())


def act(actor: Any, count: int = 4000, seed: int = 0, **knobs: float) -> Tensor:
    cells = torch.arange(count) % 2
    begins = torch.zeros(count, dtype=torch.bool)
    rng = torch.Generator().manual_seed(seed)
    acted = actor.act(cells, None, begins, Knobs.of(actor, **knobs), rng)
    assert acted.memory is None
    actions: Tensor = acted.actions
    return actions


def test_without_epsilon_the_best_action_is_taken() -> None:
    assert act(policy(), epsilon=0.0).tolist() == [1, 0] * 2000


def test_with_epsilon_1_all_actions_are_taken_alike() -> None:
    counts = torch.bincount(act(policy(), epsilon=1.0))
    assert counts.tolist() == pytest.approx([4000 / 3] * 3, abs=100)


def test_with_epsilon_between_that_share_is_at_random() -> None:
    actions = act(policy(), epsilon=0.3)[::2]
    assert torch.bincount(actions).tolist() == pytest.approx([200, 1600, 200], abs=60)


def test_actions_depend_on_the_generator_only() -> None:
    assert torch.equal(act(policy(), seed=1, epsilon=0.5), act(policy(), seed=1, epsilon=0.5))
    assert not torch.equal(act(policy(), seed=1, epsilon=0.5), act(policy(), seed=2, epsilon=0.5))


def test_epsilon_is_a_knob_that_evaluations_force_to_0() -> None:
    assert Knobs.of(QPolicy(Table(), nn.Identity(), epsilon=0.4))["epsilon"] == 0.4
    assert Knobs.of(policy()).for_evaluation()["epsilon"] == 0


def test_policy_passes_the_checker_and_refuses_likelihoods() -> None:
    contexts = TensorDict({"observation": torch.tensor([0, 1, 1, 0])}, [4])
    rollout = Rollout.create(task="t", group=torch.arange(4), mask=torch.ones(4, 1, dtype=torch.bool), context=contexts)
    assert check(policy(), rollout).messages == []
    with pytest.raises(NotImplementedError, match="QPolicy takes actions by their values, .* DQNObjective"):
        policy().distribution(rollout)


def test_policy_fits_the_spaces_of_an_environment() -> None:
    torch.manual_seed(0)
    made = QPolicy.for_spaces(spaces.Box(-1, 1, (3,)), spaces.Discrete(5), widths=(8,), dueling=True, epsilon=0.2)
    assert made.values(torch.zeros(2, 3)).shape == (2, 5)
    assert Knobs.of(made)["epsilon"] == 0.2
    assert "epsilon=0.2" in repr(made)
    with pytest.raises(ValueError, match=r"QPolicy: no values for the actions Box.*numbers have a QNetwork"):
        QPolicy.for_spaces(spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,)))
    with pytest.raises(ValueError, match="no values for the actions"):
        QPolicy.for_spaces(spaces.Box(-1, 1, (3,)), spaces.Discrete(2, start=1))


def test_uniform_policy_takes_all_discrete_actions_alike() -> None:
    counts = torch.bincount(act(UniformPolicy(spaces.Discrete(4))))
    assert counts.tolist() == pytest.approx([1000] * 4, abs=100)


def test_uniform_policy_fills_its_box_and_knows_its_density() -> None:
    box = spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, 4.0], np.float32))
    begins = torch.zeros(4000, dtype=torch.bool)
    acted = UniformPolicy(box).act(torch.zeros(4000), None, begins, {}, torch.Generator().manual_seed(0))
    assert acted.actions.amin(0).tolist() == pytest.approx([-1, 0], abs=0.01)
    assert acted.actions.amax(0).tolist() == pytest.approx([1, 4], abs=0.01)
    assert acted.actions.mean(0).tolist() == pytest.approx([0, 2], abs=0.1)
    assert acted.logprobs is not None
    assert acted.logprobs.exp().unique().tolist() == pytest.approx([1 / 8])


@pytest.mark.parametrize(
    "space", [spaces.Box(-np.inf, np.inf, (2,)), spaces.Discrete(3, start=1), spaces.MultiBinary(2)]
)
def test_uniform_policy_refuses_what_has_no_uniform_distribution(space: Any) -> None:
    with pytest.raises(
        ValueError, match=r"UniformPolicy: the actions are .*; expected Discrete\(n\) from 0, or a bounded"
    ):
        UniformPolicy(space)
