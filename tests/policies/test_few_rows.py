"""Acting by numpy on a few rows is acting by torch, and only where the network is known to be that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium.spaces as spaces
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from regimen.models import MLPTorso
from regimen.policies import Acted, ActionPolicy, CategoricalHead, GaussianHead, UniformPolicy
from regimen.policies.acting import joined, logprobs_of
from regimen.policies.action import acting
from regimen.policies.distributions import Categorical, Gaussian

SEEN = spaces.Box(-1, 1, (2, 3), np.float32)
BOX = spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, 3.0], np.float32))
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "discrete": (spaces.Discrete(5), {}),
    "gaussian": (BOX, {}),
    "learned deviation": (BOX, {"learned_std": True}),
    "squashed": (BOX, {"squash": True, "learned_std": True}),
}


def policy_of(kind: str) -> ActionPolicy:
    torch.manual_seed(3)
    actions, options = KINDS[kind]
    policy = ActionPolicy.for_spaces(SEEN, actions, widths=(16, 8), **options)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.3 * torch.randn(weight.shape))
    return policy


def stretch(policy: ActionPolicy, knobs: Mapping[str, float], steps: int = 5) -> list[Acted]:
    rng, seen = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    act, begins = acting(policy, 4, knobs, rng), torch.zeros(4, dtype=torch.bool)
    return [act(torch.randn(4, 2, 3, generator=seen), None, begins) for _ in range(steps)]


def logprobs(steps: list[Acted]) -> Tensor | None:
    """`[T N]`."""
    return logprobs_of(joined(steps), torch.device("cpu"))


def by_torch(policy: ActionPolicy, knobs: Mapping[str, float]) -> list[Acted]:
    """The same with a network that something watches, which keeps numpy away."""
    handle = policy.torso.register_forward_hook(lambda *_: None)
    assert policy._quick(4) is None
    found = stretch(policy, knobs)
    handle.remove()
    return found


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_actions_and_their_logprobs_are_those_of_torch(kind: str, temperature: float) -> None:
    policy, knobs = policy_of(kind), {"temperature": temperature}
    assert policy._quick(4) is not None
    quick, plain = stretch(policy, knobs), by_torch(policy, knobs)
    for mine, theirs in zip(quick, plain, strict=True):
        torch.testing.assert_close(mine.actions, theirs.actions, rtol=0, atol=1e-5)
    scored, expected = logprobs(quick), logprobs(plain)
    if temperature == 0:
        assert scored is None
    else:
        torch.testing.assert_close(scored, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["discrete", "squashed"])
def test_a_step_by_itself_is_that_of_a_stretch(kind: str) -> None:
    policy, begins = policy_of(kind), torch.zeros(4, dtype=torch.bool)
    rng, seen = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    steps = stretch(policy, {"temperature": 1.0})
    together = logprobs(steps)
    assert together is not None
    assert together.shape == (20,)
    for place, step in enumerate(steps):
        alone = policy.act(torch.randn(4, 2, 3, generator=seen), None, begins, {"temperature": 1.0}, rng)
        assert torch.equal(alone.actions, step.actions)
        torch.testing.assert_close(alone.logprobs, together[4 * place : 4 * place + 4])


def test_weights_are_shared_so_that_a_gradient_step_is_seen() -> None:
    policy = policy_of("gaussian")
    before = stretch(policy, {"temperature": 0.0}, 1)[0].actions
    quick = policy._quick(4)
    with torch.no_grad():
        policy.head.mean.bias.add_(1.0)
    assert quick is not None
    seen = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(quick(seen, 1.0).mode(), before + 1)


def test_observations_are_left_as_they_are() -> None:
    head = GaussianHead(6, 2)
    policy, seen = ActionPolicy(MLPTorso(6, ()), head), torch.randn(4, 6)
    kept = seen.clone()
    assert policy._quick(4) is not None
    policy.act(seen, None, torch.zeros(4, dtype=torch.bool), {"temperature": 1.0}, torch.Generator())
    assert torch.equal(seen, kept)


class OwnTorso(MLPTorso):
    """A torso of somebody else's."""

    def forward(self, observations: Tensor) -> Tensor:
        return 2 * super().forward(observations)


class OwnHead(CategoricalHead):
    """A head of somebody else's."""

    def forward(self, features: Tensor, temperature: Tensor | float = 1.0) -> Categorical:
        return Categorical(-super().forward(features, temperature).logits)


def without_bias() -> ActionPolicy:
    head = CategoricalHead(8, 3)
    head.logits = nn.Linear(8, 3, bias=False)
    return ActionPolicy(MLPTorso(6, (8,)), head)


NOT_PLAIN: dict[str, ActionPolicy] = {
    "another torso": ActionPolicy(OwnTorso(6, (8,)), CategoricalHead(8, 3)),
    "another head": ActionPolicy(MLPTorso(6, (8,)), OwnHead(8, 3)),
    "another activation": ActionPolicy(MLPTorso(6, (8,), nn.GELU), CategoricalHead(8, 3)),
    "memory": ActionPolicy(MLPTorso(6, (8,)), CategoricalHead(8, 3), core=nn.GRUCell(8, 8)),
    "double precision": ActionPolicy(MLPTorso(6, (8,)), CategoricalHead(8, 3)).double(),
    "no bias": without_bias(),
    "large layers": ActionPolicy(MLPTorso(6, (600, 600)), CategoricalHead(600, 3)),
}


@pytest.mark.parametrize("policy", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_other_networks_are_left_to_torch(policy: ActionPolicy) -> None:
    assert policy._quick(4) is None


def test_a_policy_that_acts_in_its_own_way_is_asked_at_every_step() -> None:
    class Careful(ActionPolicy):
        asked = 0

        def act(self, *arguments: Any) -> Acted:
            self.asked += 1
            return super().act(*arguments)

    policy = Careful(MLPTorso(6, (8,)), CategoricalHead(8, 3))
    stretch(policy, {"temperature": 1.0})
    assert policy.asked == 5


def test_logprobs_that_are_known_are_taken_as_they_are() -> None:
    act = acting(UniformPolicy(spaces.Discrete(4)), 3, {}, torch.Generator())
    steps = [act(torch.zeros(3), None, torch.zeros(3, dtype=torch.bool)) for _ in range(2)]
    found = logprobs(steps)
    assert found is not None
    torch.testing.assert_close(found, torch.full((6,), 0.25).log())


def test_distributions_of_several_steps_are_joined_in_order() -> None:
    logits = torch.randn(3, 2, 5)
    assert torch.equal(Categorical.cat([Categorical(part) for part in logits]).logits, logits.flatten(0, 1))
    gaussian = Gaussian.cat([Gaussian(part, part.exp()) for part in logits])
    assert torch.equal(gaussian.mean, logits.flatten(0, 1))
    assert torch.equal(gaussian.std, logits.exp().flatten(0, 1))
