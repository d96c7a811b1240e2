"""Several heads on one trunk: which one is used and trained, what mixing means, and whole towers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from regimen.models import MLPTorso, MultiHead, Tower, ValueHead, ValueNetwork, WithTasks
from regimen.policies.action import ActionPolicy
from regimen.policies.heads import CategoricalHead, GaussianHead
from regimen.rollout import Rollout

TASKS, SEEN = 3, 5


def observed(task: int | Tensor, rows: int = 4) -> Tensor:
    """Random observations that tell the task."""
    which = torch.as_tensor(task).expand(rows)
    seen = torch.randn(rows, SEEN, generator=torch.Generator().manual_seed(0))
    return torch.cat([seen, nn.functional.one_hot(which, TASKS).float()], 1)


def trunk() -> WithTasks:
    return WithTasks(MLPTorso(SEEN + TASKS, (8,)), TASKS)


@pytest.mark.parametrize("kind", ["gaussian", "squashed", "categorical"])
def test_identical_heads_are_the_one_head_on_the_same_trunk(kind: str) -> None:
    makes = {
        "gaussian": lambda: GaussianHead(8, 2, learned_std=True, gain=1.0),
        "squashed": lambda: GaussianHead(8, 4, box=(-2.0, 3.0), gain=1.0),
        "categorical": lambda: CategoricalHead(8, 6, gain=1.0),
    }
    head, torso = makes[kind](), trunk()
    several = MultiHead([copy.deepcopy(head) for _ in range(TASKS)])
    for task in (0, 2):
        seen = observed(task)
        one, many = head(torso.torso(seen), 1.5), several(torso(seen), 1.5)
        assert type(one) is type(many)
        actions = one.mode()
        assert torch.allclose(one.logprob(actions), many.logprob(actions))


def test_a_sample_is_given_its_own_head() -> None:
    several = MultiHead([nn.Linear(2, 3) for _ in range(TASKS)])
    rows = torch.randn(6, 2)
    which = torch.tensor([0, 2, 1, 1, 0, 2])
    found = several(torch.cat([rows, nn.functional.one_hot(which, TASKS).float()], 1))
    expected = torch.stack([several.heads[int(k)](row) for k, row in zip(which, rows, strict=True)])
    assert torch.allclose(found, expected)


def test_weights_mix_what_heads_say() -> None:
    several = MultiHead([ValueHead(2), ValueHead(2)])
    for value, head in zip((2.0, 6.0), several.heads, strict=True):
        nn.init.constant_(head.layer.bias, value)
    features = torch.tensor([[[1.0, 1.0, 0.25, 0.75]]])
    assert torch.allclose(several(features), torch.tensor([[5.0]]))


def test_a_step_on_one_task_leaves_the_other_heads_and_their_answers_unchanged() -> None:
    policy = ActionPolicy(trunk(), MultiHead([GaussianHead(8, 2) for _ in range(TASKS)]))
    for parameter in policy.torso.parameters():
        parameter.requires_grad_(False)
    before = copy.deepcopy(policy)
    described = policy.head(policy.torso(observed(1)))
    optimizer = torch.optim.Adam(policy.head.parameters(), lr=0.1)
    (-described.logprob(torch.ones(4, 2)).sum()).backward()
    optimizer.step()
    for task in range(TASKS):
        same = torch.equal(
            policy.head(policy.torso(observed(task))).mean, before.head(before.torso(observed(task))).mean
        )
        assert same == (task != 1)


def test_towers_share_no_gradient() -> None:
    towers = MultiHead([Tower(MLPTorso(SEEN + TASKS, (8,)), nn.Linear(8, 1)) for _ in range(TASKS)])
    torso = WithTasks(MLPTorso(SEEN + TASKS, ()), TASKS)
    towers(torso(observed(2))).sum().backward()
    sizes = [sum(float(p.grad.abs().sum()) for p in tower.parameters()) for tower in towers.heads]
    assert sizes[:2] == [0.0, 0.0]
    assert sizes[2] > 0


def test_a_critic_with_a_head_for_each_task_values_each_by_its_own() -> None:
    heads = [nn.Linear(8, 1) for _ in range(TASKS)]
    for value, head in enumerate(heads):
        nn.init.zeros_(head.weight)
        nn.init.constant_(head.bias, float(value))
    critic = ValueNetwork(trunk(), MultiHead(heads))
    seen = torch.stack([observed(task) for task in range(TASKS)])
    rollout = Rollout.create(
        task="any", group=torch.arange(TASKS), mask=torch.ones(TASKS, 4, dtype=torch.bool), observations=seen
    )
    assert torch.equal(critic(rollout), torch.arange(3.0)[:, None].expand(3, 4))


def test_a_policy_of_discrete_actions_with_heads_acts_and_scores_alike() -> None:
    policy = ActionPolicy(trunk(), MultiHead([CategoricalHead(8, 4, gain=2.0) for _ in range(TASKS)]))
    rng, seen = torch.Generator().manual_seed(0), observed(torch.tensor([0, 1, 2, 1]))
    acted = policy.act(seen, None, torch.ones(4, dtype=torch.bool), {"temperature": 1.0}, rng)
    rollout = Rollout.create(
        task="any",
        group=torch.arange(4),
        mask=torch.ones(4, 1, dtype=torch.bool),
        observations=seen[:, None],
        actions=acted.actions[:, None],
        knobs={"temperature": 1.0},
    )
    assert acted.actions.dtype == torch.int64
    assert torch.allclose(policy.logprob(rollout)[:, 0], policy.head(policy.torso(seen)).logprob(acted.actions))


def test_no_heads_and_heads_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="given no heads; expected one for each task"):
        MultiHead([])
    with pytest.raises(TypeError, match="a head gave a str; expected a tensor, or a data class"):
        MultiHead([_Words()])(torch.ones(1, 2))


class _Words(nn.Module):
    def forward(self, features: Tensor) -> str:
        return "words"
