"""Transport onto demonstrations as a reward: worked numbers, its scale, and samples of three kinds of policy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from regimen.cast import Cast
from regimen.checkers import check
from regimen.knobs import Knobs
from regimen.models import FrameCosts, small_decoder, word_tokenizer
from regimen.policies import FlowPolicy, TokenPolicy
from regimen.rewards import OptimalTransportReward, Scene, judge
from regimen.rollout import Rollout
from regimen.tasks.environments.tensor import ProgressChain
from regimen.tasks.text import TextPromptTask

AGENT = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
DEMONSTRATION = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])


def walks(*frames: Tensor, mask: Tensor | None = None) -> Rollout:
    """A sample for each sequence of frames."""
    seen = torch.stack(frames)
    mask = torch.ones(seen.shape[:2], dtype=torch.bool) if mask is None else mask
    return Rollout.create(task="walk", group=torch.arange(len(seen)), mask=mask, observations=seen)


def reward(*demonstrations: Tensor, **settings: Any) -> OptimalTransportReward:
    settings = {"epsilon": 0.1, "iterations": 1000, **settings}
    return OptimalTransportReward(FrameCosts(demonstrations or [DEMONSTRATION]), **settings)


def scored(part: OptimalTransportReward, rollout: Rollout) -> Tensor:
    return part.score(rollout, Scene())


# Values


def test_a_worked_example_with_and_without_its_scale() -> None:
    raw = scored(reward(scale=1.0), walks(AGENT))[0]
    assert raw.tolist() == pytest.approx([-0.049604, -0.049604, -0.000654], abs=1e-5)
    scaled = scored(reward(), walks(AGENT))[0]
    assert scaled.tolist() == pytest.approx([-4.967279, -4.967279, -0.065442], abs=1e-3)
    assert float(scaled.sum()) == pytest.approx(-10)


def test_the_first_sample_that_costs_anything_sets_the_scale_for_good() -> None:
    part, other = reward(DEMONSTRATION, epsilon=0.01), AGENT.flip(0)
    assert float(scored(part, walks(DEMONSTRATION)).sum()) == pytest.approx(0, abs=1e-3)
    first = scored(part, walks(other))
    assert float(first.sum()) != 0
    assert torch.equal(scored(part, walks(other)), first)


def test_the_scale_is_remembered_by_a_checkpoint() -> None:
    part = reward()
    scored(part, walks(AGENT))
    resumed = reward()
    resumed.load_state(part.save_state())
    other = walks(AGENT.flip(0))
    assert torch.equal(scored(resumed, other), scored(part, other))
    assert not torch.equal(scored(reward(), other), scored(part, other))


def test_the_demonstration_that_costs_least_pays() -> None:
    far, near = 1 - AGENT, AGENT
    both = scored(reward(far, near, scale=1.0), walks(AGENT, far))
    assert torch.equal(both[0], scored(reward(near, scale=1.0), walks(AGENT))[0])
    assert torch.equal(both[1], scored(reward(far, scale=1.0), walks(far))[0])


def test_steps_that_are_not_learned_from_are_no_frames() -> None:
    """As a prompt's tokens before the answer, and padding after it."""
    padded = torch.cat([torch.full((2, 2), 9.0), AGENT, torch.full((1, 2), torch.nan)])
    own = torch.tensor([[False, False, True, True, True, False]])
    rollout = walks(padded, mask=torch.tensor([[True] * 5 + [False]])).replace(loss_mask=own)
    found = scored(reward(scale=1.0), rollout)
    assert torch.equal(found[:, 2:5], scored(reward(scale=1.0), walks(AGENT)))
    assert found[0, [0, 1, 5]].tolist() == [0, 0, 0]


def test_frames_may_be_what_a_frozen_image_encoder_makes_of_pictures() -> None:
    """The last feature map of a residual network, flattened, as for pictures in the paper; here a tiny one."""
    from transformers import ResNetConfig, ResNetModel

    torch.manual_seed(0)
    encoder = ResNetModel(ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")).eval()

    def features(rollout: Rollout) -> Tensor:
        maps = encoder(rollout.observations.flatten(0, 1)).last_hidden_state
        return maps.flatten(1).unflatten(0, rollout.mask.shape)

    film = walks(*torch.rand(2, 5, 3, 32, 32))
    with torch.no_grad():
        shown = features(film)[0]
    part = OptimalTransportReward(FrameCosts([shown], frames=features), scale=1.0, epsilon=1e-3)
    found = scored(part, film)
    assert found[0].abs().max() < 1e-3
    assert float(found[1].sum()) < float(found[0].sum())
    assert not found.requires_grad


# Input


def test_another_length_is_told() -> None:
    with pytest.raises(ValueError, match="a sample of task walk has 2 steps and the demonstrations have 3"):
        scored(reward(), walks(AGENT[:2]))


def test_demonstrations_must_be_there_and_alike() -> None:
    with pytest.raises(ValueError, match="was given 0 demonstrations"):
        FrameCosts([])
    with pytest.raises(ValueError, match=r"2 demonstrations of the shapes \[\(2, 2\), \(3, 2\)\]"):
        FrameCosts([AGENT, AGENT[:2]])
    with pytest.raises(ValueError, match="distance 'manhattan' is not one of cosine, euclidean"):
        FrameCosts([AGENT], "manhattan")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scale=0"):
        reward(scale=0)


def test_frames_that_are_nan_fail_with_a_reason() -> None:
    judged, report = judge(reward(), walks(torch.full((3, 2), torch.nan)), Scene())
    assert report.failed == 1
    assert "NaN or infinite" in report.errors[0]
    assert not bool(judged.loss_mask.any())


def test_it_passes_the_checker() -> None:
    rollout = walks(AGENT, AGENT.flip(0), DEMONSTRATION)
    assert check(reward(epsilon=0.05, iterations=50), rollout=rollout, cast={}).messages == []
    assert check(reward(scale=2.0), rollout=rollout, cast={}).messages == []


# Its own paper's world


def chain(seed: int = 0, **settings: Any) -> ProgressChain:
    return ProgressChain(3, length=6, seed=seed, **settings)


def played(env: ProgressChain, actions: Tensor) -> tuple[Rollout, dict[str, Tensor]]:
    """Copies that take the actions `[N, T]`, and what they were told last."""
    env.reset(torch.ones(env.count, dtype=torch.bool), torch.arange(env.count), {})
    frames, told = [], {}
    for step in actions.T:
        change = env.step(step)
        frames.append(change.observations["frame"])
        told = dict(change.info)
    assert bool(change.terminated.all())
    return walks(*torch.stack(frames, 1)), told


def test_on_the_chain_a_step_pays_what_its_nearest_frame_costs() -> None:
    env = chain(shortcut=0.8)
    right = env.right.expand(3, 6).clone()
    right[1, 2:] = env.last  # A shortcut from the third step on.
    right[2, 4] = (right[2, 4] + 1) % env.last  # Dropped at the fifth.
    rollout, told = played(env, right)
    part = OptimalTransportReward(FrameCosts([env.expert_frames], "euclidean"), scale=6.0)
    found = scored(part, rollout)
    assert found[0].tolist() == pytest.approx([0] * 6, abs=1e-5)
    assert found[1].tolist() == pytest.approx([0, 0, -0.8, -0.8, -0.8, -0.8], abs=1e-4)
    assert found[2].tolist() == pytest.approx([0, 0, 0, 0, -1, -1], abs=0.06)
    assert told["correct"].tolist() == [6, 2, 4]
    assert told["success"].tolist() == [1, 0, 0]
    assert told["on_shortcut"].tolist() == [0, 1, 0]


def test_the_chains_frames_are_as_far_apart_as_they_should_be() -> None:
    env = ProgressChain(1, length=20, shortcut=0.7)
    cost = FrameCosts([env.expert_frames], "euclidean")
    expert = cost.of_demonstrations()[0, 0]
    assert torch.allclose(expert, 1 - torch.eye(20), atol=1e-6)
    shortcut = torch.cdist(env._frames[21 + 4][None], env.expert_frames)[0]
    assert shortcut[4:].tolist() == pytest.approx([0.7] * 16, abs=1e-5)
    assert shortcut[:4].tolist() == pytest.approx([(0.49 + 1 / 16) ** 0.5] * 4, abs=1e-5)
    with pytest.raises(ValueError, match=r"shortcut=0.6; expected .* from 0.6892 to below 1"):
        ProgressChain(1, shortcut=0.6)


def test_the_chain_passes_the_checker_of_environments() -> None:
    from regimen.tasks import EnvTask

    task = EnvTask("chain", partial(ProgressChain, length=4), copies=2, steps=4, episodes=True)
    rollout = task.collect({"policy": _Random()}, {"discount": 0.9}, torch.Generator().manual_seed(0), 2)
    assert rollout.discount.tolist() == [[pytest.approx(0.9)] * 3 + [0]] * 2
    assert rollout.observations["place"].max() <= 8


class _Random(nn.Module):
    def act(self, observations: Any, memory: Any, begins: Tensor, knobs: Any, rng: torch.Generator) -> Any:
        from regimen.policies import Acted

        return Acted(torch.randint(5, (len(begins),), generator=rng))


# Other kinds of policy


def test_a_texts_tokens_are_transported_onto_those_of_a_demonstration() -> None:
    """A language model's answers, compared with a demonstrated sequence by a table of token features."""
    tokenizer = word_tokenizer(["go", "left", "right", "stop"])
    torch.manual_seed(0)
    policy = TokenPolicy(small_decoder(len(tokenizer), dim=8, layers=1, heads=2), tokenizer, max_new_tokens=4)
    features = torch.eye(len(tokenizer))
    shown = features[torch.tensor(tokenizer.encode("left left right stop", add_special_tokens=False))]
    part = OptimalTransportReward(FrameCosts([shown], "euclidean", lambda r: features[r.actions.clamp(min=0)]))
    task = TextPromptTask("drive", [{"question": "go"}], group_size=12)
    rollout = task.collect(Cast(policy=policy), Knobs.of(policy, task), torch.Generator().manual_seed(0), 12)
    rollout = rollout[rollout.loss_mask.sum(1) == 4]
    assert len(rollout) > 1
    judged, report = judge(part, rollout, Scene())
    assert report.failed == 0
    assert judged.reward.shape == rollout.mask.shape
    assert float(judged.reward[0].sum()) == pytest.approx(-10)
    assert not bool(judged.reward[~rollout.loss_mask].any())


def test_a_flow_policys_denoising_is_transported_onto_another_path(tiny_policy: Callable[..., FlowPolicy]) -> None:
    policy = tiny_policy()
    contexts = TensorDict({"condition": torch.zeros(4, dtype=torch.int64)}, [4])
    rollout = policy.sample(contexts, Knobs.of(policy), torch.Generator().manual_seed(0))
    path = rollout.observations.flatten(2)[0][rollout.loss_mask[0]]
    found = scored(OptimalTransportReward(FrameCosts([path], "euclidean"), scale=1.0), rollout)
    assert found.shape == rollout.mask.shape
    assert found[0].abs().max() < 1e-3
    assert float(found[1:].sum(1).max()) < -0.1
