"""Action policies: acting and scoring agree, memory is replayed, gradients are right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import gymnasium.spaces as spaces
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from control_worlds import Clock
from regimen import Knobs, Rollout
from regimen.checkers import assert_ok
from regimen.memory import NewestRollout
from regimen.models import MLPTorso
from regimen.policies import ActionPolicy, CategoricalHead, GaussianHead
from regimen.tasks import EnvTask, GymnasiumVector
from regimen.update import Epochs

VECTOR = spaces.Box(-3, 3, (3,), np.float32)
IMAGE = spaces.Box(0, 255, (2, 8, 8), np.uint8)
TABLE = spaces.Dict({"image": IMAGE, "inside": spaces.Dict({"vector": VECTOR, "cell": spaces.Discrete(4)})})
NUMBERS = spaces.Box(-0.5, np.array([0.5, 2], np.float32), (2,))


class Noise(gymnasium.Env[Any, Any]):
    """Shows noise; an episode ends with probability 0.2 at every step."""

    def __init__(self, seen: Any, actions: Any) -> None:
        self.observation_space, self.action_space = seen, actions

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        return self.observation_space.sample(), 1.0, bool(self.np_random.random() < 0.2), False, {}


KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "discrete": (VECTOR, spaces.Discrete(4), {}),
    "gaussian": (VECTOR, NUMBERS, {}),
    "gaussian whose deviation is learned": (VECTOR, NUMBERS, {"learned_std": True}),
    "squashed": (VECTOR, NUMBERS, {"squash": True}),
    "recurrent": (VECTOR, spaces.Discrete(4), {"recurrent": 6}),
    "recurrent, cut": (VECTOR, NUMBERS, {"recurrent": 6, "backpropagate": 2}),
    "states": (spaces.Discrete(5), spaces.Discrete(4), {}),
    "images": (IMAGE, spaces.Discrete(4), {}),
    "table": (TABLE, NUMBERS, {"recurrent": 6, "squash": True}),
}


def made(kind: str, steps: int = 9, **changes: Any) -> tuple[ActionPolicy, EnvTask]:
    """A policy that prefers some actions to others, and a task of its kind."""
    torch.manual_seed(0)
    seen, actions, settings = KINDS[kind]
    task = EnvTask("noise", lambda n: GymnasiumVector([partial(Noise, seen, actions)] * n), copies=3, steps=steps)
    policy = ActionPolicy.for_spaces(*task.spaces, widths=(8,), **(settings | changes))
    for name, weight in policy.head.named_parameters():
        if name.endswith("weight"):
            nn.init.normal_(weight, std=0.5)
    return policy, task


def collected(policy: ActionPolicy, task: EnvTask, seed: int = 0, **knobs: float) -> Rollout:
    rng = torch.Generator().manual_seed(seed)
    return task.collect({"policy": policy}, Knobs.of(policy, task, **knobs), rng, 6)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_before_an_update_the_ratio_of_a_policy_to_itself_is_1(kind: str, temperature: float) -> None:
    policy, task = made(kind)
    rollout = collected(policy, task, temperature=temperature)
    assert rollout["start"][:, 1:].any()
    ratio = (policy.logprob(rollout) - rollout.logprobs).exp()
    assert float((ratio - 1).abs().max().detach()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_the_temperature_is_that_of_each_sample(kind: str) -> None:
    policy, task = made(kind)
    both = Rollout.cat([collected(policy, task, temperature=value) for value in (0.5, 1.0, 2.0)])
    ratio = (policy.logprob(both) - both.logprobs).exp()
    assert float((ratio - 1).abs().max().detach()) < 1e-5


@pytest.mark.parametrize("kind", ["discrete", "gaussian", "squashed", "images", "states"])
def test_a_policy_without_memory_scores_single_steps_as_it_scores_samples(kind: str) -> None:
    policy, task = made(kind)
    rollout = collected(policy, task)
    memory = NewestRollout()
    memory.add(rollout)
    batches = list(Epochs(1, 2, "step")(memory, torch.Generator().manual_seed(0)))
    assert [list(batch.mask.shape) for batch in batches] == [[27, 1], [27, 1]]
    for batch in batches:
        assert torch.allclose(policy.logprob(batch), batch.logprobs, atol=1e-5)


def test_single_steps_of_a_policy_with_memory_are_refused() -> None:
    memory = NewestRollout()
    memory.add(collected(*made("recurrent")))
    with pytest.raises(ValueError, match="a policy with memory is replayed from a sample's start; use unit='sample'"):
        next(Epochs(unit="step")(memory, torch.Generator()))


class Watched(ActionPolicy):
    """Keeps what it remembered after every step."""

    def act(self, *arguments: Any) -> Any:
        acted = super().act(*arguments)
        self.kept.append(acted.memory)
        return acted


@pytest.mark.parametrize("kind", ["recurrent", "table"])
def test_replaying_a_recurrent_policy_equals_acting(kind: str) -> None:
    """Over episodes that begin inside a sample, and samples that begin inside an episode."""
    policy, task = made(kind)
    policy.__class__, policy.kept = Watched, []
    for _ in range(2):
        rollout = collected(policy, task)
        assert rollout["start"].any()
        acted = torch.cat([torch.stack(policy.kept[part], 1) for part in (slice(0, 9), slice(9, 18))])
        # Convolutions round otherwise in another batch.
        assert torch.allclose(policy.distribution(rollout).hidden, acted, atol=1e-5 if kind == "table" else 1e-6)
        policy.kept = []


def reach(policy: ActionPolicy, rollout: Rollout, step: int) -> list[list[int]]:
    """The steps whose observations have a gradient from the log-probability of a step, row by row."""
    seen = rollout.observations.clone().requires_grad_()
    policy.logprob(rollout.replace(observations=seen))[:, step].sum().backward()
    return [row.nonzero().flatten().tolist() for row in (seen.grad.abs().sum(-1) > 0)]


@pytest.mark.parametrize(("backpropagate", "begins"), [(None, 0), (1, 7), (2, 6), (3, 6), (4, 4), (20, 0)])
def test_gradients_go_back_as_far_as_they_are_told_and_to_the_episodes_start(
    backpropagate: int | None, begins: int
) -> None:
    policy, task = made("recurrent", backpropagate=backpropagate)
    rollout = collected(policy, task)
    starts = [max([s for s in row.nonzero().flatten().tolist() if s <= 7], default=0) for row in rollout["start"]]
    assert len(set(starts)) > 1
    assert reach(policy, rollout, 7) == [list(range(max(begins, start), 8)) for start in starts]


def test_truncation_changes_no_value() -> None:
    whole, task = made("recurrent")
    cut, _ = made("recurrent", backpropagate=2)
    cut.load_state_dict(whole.state_dict())
    rollout = collected(whole, task)
    assert torch.equal(whole.logprob(rollout), cut.logprob(rollout))


@pytest.fixture
def in_double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind: str, in_double_precision: None) -> None:
    policy, task = made(kind, **({"backpropagate": None} if "cut" in kind else {}))
    rollout = collected(policy, task, temperature=0.7)
    other = policy.reference()
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.1)
    parameters = list(policy.parameters())
    direction = [torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).double() for p in parameters]
    weights = torch.linspace(-1, 1, rollout.mask.numel(), dtype=torch.float64).view(rollout.mask.shape)

    def loss() -> Tensor:
        steps = policy.distribution(rollout)
        total = steps.logprob + steps.kl(other.distribution(rollout))
        if not kind.startswith(("squashed", "table")):
            total = total + steps.entropy()
        return (weights * total).sum()

    def moved(by: float) -> float:
        with torch.no_grad():
            for weight, way in zip(parameters, direction, strict=True):
                weight.add_(by * way)
        value = float(loss().detach())
        with torch.no_grad():
            for weight, way in zip(parameters, direction, strict=True):
                weight.sub_(by * way)
        return value

    gradient = torch.autograd.grad(loss(), parameters)
    slope = sum(float((g * way).sum()) for g, way in zip(gradient, direction, strict=True))
    assert (moved(1e-7) - moved(-1e-7)) / 2e-7 == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_temperature_0_takes_the_likeliest_action_and_has_no_log_probability(kind: str) -> None:
    policy, task = made(kind)
    rollout = collected(policy, task, temperature=0.0)
    assert rollout.logprobs is None
    warm = rollout.replace(knobs={**dict(rollout.knobs.items()), "temperature": torch.ones(6)})
    steps = policy.distribution(warm)
    assert torch.allclose(steps.described.mode().detach(), rollout.actions.flatten(0, 1), atol=1e-5)
    with pytest.raises(ValueError, match="temperature = 0 .* has no log-probability; set temperature > 0 for training"):
        policy.distribution(rollout)
    assert Knobs.of(policy).for_evaluation() == {"temperature": 0.0}


def test_a_low_temperature_prefers_the_likeliest() -> None:
    policy, task = made("discrete", steps=200)
    shares = []
    for temperature in (1.0, 0.3):
        rollout = collected(policy, task, temperature=temperature)
        warm = rollout.replace(knobs={**dict(rollout.knobs.items()), "temperature": torch.ones(6)})
        likeliest = policy.distribution(warm).described.mode()
        shares.append(float((likeliest == rollout.actions.flatten()).float().mean()))
    assert shares[1] > shares[0] + 0.2


def test_actions_out_of_bounds_are_recorded_as_the_policy_drew_them() -> None:
    """The environment, which insists on its bounds, was given them clipped."""
    policy, task = made("gaussian")
    rollout = collected(policy, task)
    assert (rollout.actions.abs() > 2).any()
    policy, task = made("squashed")
    actions = collected(policy, task).actions
    assert ((actions > torch.from_numpy(NUMBERS.low)) & (actions < torch.from_numpy(NUMBERS.high))).all()


@pytest.mark.parametrize("kind", ["discrete", "gaussian", "recurrent"])
def test_only_the_steps_asked_for_are_described(kind: str) -> None:
    policy, task = made(kind)
    rollout = collected(policy, task)
    where = torch.rand(6, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    some, all_ = policy.distribution(rollout, where), policy.distribution(rollout)
    reference = policy.reference()
    for weight in reference.head.parameters():
        nn.init.zeros_(weight)
    pairs = [
        (some.logprob, all_.logprob),
        (some.entropy(), all_.entropy()),
        (some.kl(reference.distribution(rollout, where)), all_.kl(reference.distribution(rollout))),
    ]
    for one, other in pairs:
        assert torch.allclose(one, torch.where(where, other, 0), atol=1e-6)
        assert one[where].abs().sum() > 0
    assert torch.allclose(some.hidden, torch.where(where[..., None], all_.hidden, 0), atol=1e-6)


def test_an_estimated_divergence_is_not_the_policys_business() -> None:
    policy, task = made("discrete")
    steps = policy.distribution(collected(policy, task))
    with pytest.raises(ValueError, match="KL estimator 'k7' is not known to an action policy"):
        steps.kl(steps, "k7")


def test_it_answers_contexts_with_single_actions() -> None:
    """A contextual bandit, by the protocol of all policies."""
    for kind in ("gaussian", "table"):
        policy, _ = made(kind)
        seen = made(kind)[1]
        shown = collected(policy, seen).observations[:, 0]
        contexts = TensorDict({"observation": shown}, batch_size=[6])
        knobs = Knobs.of(policy, temperature=0.5)
        rollout = policy.sample(contexts, knobs, torch.Generator().manual_seed(0))
        assert list(rollout.mask.shape) == [6, 1]
        assert torch.allclose(policy.logprob(rollout), rollout.logprobs, atol=1e-5)
    with pytest.raises(ValueError, match="contexts have the columns prompt, expected 'observation'; to act step by st"):
        policy.sample(TensorDict({"prompt": torch.zeros(2)}, [2]), knobs, torch.Generator())


@pytest.mark.parametrize("kind", ["discrete", "gaussian", "recurrent"])
def test_it_passes_the_check_of_policies(kind: str) -> None:
    policy, _ = made(kind)
    contexts = TensorDict({"observation": torch.randn(8, 3, generator=torch.Generator().manual_seed(0))}, [8])
    rollout = policy.sample(contexts, Knobs.of(policy), torch.Generator().manual_seed(0))
    assert_ok(policy, rollout)


def test_it_reads_the_entries_it_is_told_to() -> None:
    space = spaces.Dict({"seen": VECTOR, "hidden": VECTOR})
    policy = ActionPolicy.for_spaces(space, spaces.Discrete(2), reads=["seen"])
    seen = TensorDict({"seen": torch.randn(4, 3), "hidden": torch.randn(4, 3)}, [4])
    other = seen.clone()
    other["hidden"] = torch.zeros(4, 3)
    assert torch.equal(policy.torso(seen), policy.torso(other))
    with pytest.raises(ValueError, match="reads=\\['x'\\] names entries that the observations .* do not have"):
        ActionPolicy.for_spaces(space, spaces.Discrete(2), reads=["x"])


def test_a_reference_is_frozen_and_stays_behind() -> None:
    policy, task = made("recurrent")
    rollout = collected(policy, task)
    reference = policy.reference()
    before = policy.logprob(rollout).detach()
    with torch.no_grad():
        next(policy.head.parameters()).zero_()
    assert not any(p.requires_grad for p in reference.parameters())
    assert torch.equal(reference.logprob(rollout), before)
    assert not torch.equal(policy.logprob(rollout), before)


def test_weights_survive_a_file(tmp_path: Path) -> None:
    policy, task = made("squashed")
    policy.save(tmp_path / "policy.safetensors")
    other, _ = made("squashed")
    with torch.no_grad():
        next(other.head.parameters()).zero_()
    other.load(tmp_path / "policy.safetensors")
    rollout = collected(policy, task)
    assert torch.equal(other.logprob(rollout), policy.logprob(rollout))


def test_bad_parts_are_refused() -> None:
    for settings in ({"backpropagate": 2}, {"backpropagate": 0, "core": nn.GRUCell(4, 4)}):
        with pytest.raises(ValueError, match="expected at least 1, and a recurrent core"):
            ActionPolicy(MLPTorso(3, (4,)), CategoricalHead(4, 2), **settings)
    for actions in (spaces.Discrete(3, start=1), spaces.MultiBinary(2), spaces.Box(0, 5, (2,), np.int64)):
        with pytest.raises(ValueError, match="no head for the actions .*; expected Discrete.n. from 0, or a Box"):
            ActionPolicy.for_spaces(VECTOR, actions)
    with pytest.raises(ValueError, match=r"box from \[-inf\] to \[inf\]; expected finite bounds, low below high"):
        ActionPolicy.for_spaces(VECTOR, spaces.Box(-np.inf, np.inf, (1,)), squash=True)
    with pytest.raises(ValueError, match="finite bounds"):
        GaussianHead(4, 1, box=(1.0, 1.0))
    policy, task = made("discrete")
    bare = collected(policy, task)
    bare = Rollout(bare.data.exclude("observations"), bare.task_names)
    with pytest.raises(ValueError, match="the rollout holds no observations; collect with an EnvTask"):
        policy.distribution(bare)


def test_what_was_acted_on_is_what_is_recorded() -> None:
    """The last entry of what the clock shows is the action before."""
    task = EnvTask("clock", lambda n: GymnasiumVector([partial(Clock, 5)] * n), copies=2, steps=12)
    policy = ActionPolicy.for_spaces(*task.spaces)
    rollout = task.collect({"policy": policy}, Knobs.of(policy, task), torch.Generator().manual_seed(0), 2)
    assert torch.equal(rollout["next_observations"][..., 2], rollout.actions.float())
    assert replace(rollout).knobs["temperature"].tolist() == [1.0, 1.0]
