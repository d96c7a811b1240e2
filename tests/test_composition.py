"""The parts of one kind's papers on another kind's policies: the same stage, with another policy and task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tensordict import NonTensorStack, TensorDict
from torch import Tensor

from regimen import Cast, Event, Knob, ReferenceRefresh, Regimen, Stage, Update, train
from regimen.controllers import Linear, Schedule, Steps
from regimen.credit import GroupRelativeAdvantage
from regimen.models.small_decoder import small_decoder, word_tokenizer
from regimen.objectives import ClippedSurrogateObjective, ReferenceKL
from regimen.policies import FlowPolicy
from regimen.policies.token import TokenPolicy
from regimen.rewards import FunctionReward
from regimen.rollout import Rollout
from regimen.tasks import PromptTask

WORDS = ["yes", "no", "perhaps"]


@dataclass(frozen=True)
class Kind:
    """A policy with two tasks, two rewards of its samples, and the knob of its sampling effort."""

    policy: Any
    contexts: TensorDict
    first: Callable[[Rollout], Tensor]
    second: Callable[[Rollout], Tensor]
    effort: str

    def task(self, name: str) -> PromptTask:
        return PromptTask(name, self.contexts, group_size=4)


def share_of(word: str) -> Callable[[Rollout], Tensor]:
    return lambda rollout: torch.tensor([text.split().count(word) / 8 for text in rollout["text"]])


@pytest.fixture(params=["flow", "token"])
def kind(request: pytest.FixtureRequest, tiny_policy: Callable[..., FlowPolicy]) -> Kind:
    if request.param == "flow":
        contexts = TensorDict({"condition": torch.arange(2)}, batch_size=[2])
        policy = tiny_policy(sampling_steps=8)
        return Kind(policy, contexts, brightness, lambda r: -r["image"].square().mean((1, 2, 3)), "sampling_steps")
    contexts = TensorDict({"prompt": NonTensorStack("yes no", "no perhaps yes")}, batch_size=[2])
    tokenizer = word_tokenizer(WORDS)
    model = small_decoder(len(tokenizer), dim=16, layers=1, heads=2, positions=64)
    return Kind(
        TokenPolicy(model, tokenizer, max_new_tokens=8), contexts, share_of("yes"), share_of("no"), "max_new_tokens"
    )


def brightness(rollout: Rollout) -> Tensor:
    return rollout["image"].mean((1, 2, 3))


def stage(kind: Kind, *tasks: str, **changes: Any) -> Stage:
    """One stage for both kinds: nothing in it names a kind."""
    settings: dict[str, Any] = {
        "steps": 6,
        "batch_size": 16,
        "reward": FunctionReward(kind.first, "first") + 0.5 * FunctionReward(kind.second, "second"),
        "credit": GroupRelativeAdvantage(ddof=0),
        "updates": [
            Update(ClippedSurrogateObjective(clip=0.2) + Knob("kl_weight", 0.1) * ReferenceKL("k3"), learning_rate=1e-3)
        ],
        "rules": [ReferenceRefresh(mode="copy")],
        **changes,
    }
    return Stage("both", [kind.task(name) for name in tasks], **settings)


def run(kind: Kind, *stages: Stage, **knobs: float) -> list[Mapping[str, float]]:
    """The metrics of every step."""
    seen: list[Mapping[str, float]] = []

    def listen(event: Event) -> None:
        if event.kind == "step":
            seen.append(event.metrics)

    train(Regimen(Cast(policy=kind.policy), stages, knobs=knobs), seed=0, listener=listen)
    return seen


def test_the_same_stage_starts_at_ratio_one_and_moves_the_weights(kind: Kind) -> None:
    before = [p.detach().clone() for p in kind.policy.parameters()]
    metrics = run(kind, stage(kind, "only"))
    assert all(m["policy/ratio_deviation"] < 1e-5 for m in metrics)
    assert metrics[0]["policy/loss/kl"] == pytest.approx(0, abs=1e-7)
    assert metrics[-1]["policy/loss/kl"] > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, kind.policy.parameters(), strict=True))


def test_a_budget_schedule_moves_tokens_and_denoising_steps_alike(kind: Kind) -> None:
    budget = Schedule(kind.effort, Steps(8, 2, n_drops=2, total=6))
    metrics = run(kind, stage(kind, "only", controllers=[budget]))
    assert [m[f"knob/{kind.effort}"] for m in metrics] == [8, 8, 4, 4, 2, 2]


def test_the_budget_in_force_is_the_length_that_is_sampled(kind: Kind) -> None:
    lengths: list[int] = []

    def seen(rollout: Rollout) -> Tensor:
        own = int((rollout.mask & rollout.loss_mask).sum(1).max())
        lengths.append(own if kind.effort == "max_new_tokens" else rollout.steps)
        return torch.arange(len(rollout)).float()

    budget = Schedule(kind.effort, Steps(8, 2, n_drops=2, total=6))
    run(kind, stage(kind, "only", reward=FunctionReward(seen, "seen"), controllers=[budget]))
    assert lengths == [8, 8, 4, 4, 2, 2]


def test_a_controller_moves_the_weights_of_a_composed_reward(kind: Kind) -> None:
    fading = Schedule("weight/second", Linear(1.0, 0.0, total=5))
    metrics = run(kind, stage(kind, "only", controllers=[fading]))
    weights = [m["knob/weight/second"] for m in metrics]
    assert weights == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    totals = [m["reward/only/first"] + w * m["reward/only/second"] for m, w in zip(metrics, weights, strict=True)]
    assert [m["reward/total"] for m in metrics] == pytest.approx(totals, abs=1e-6)


def test_counts_per_task_are_right_when_a_task_is_absent_from_a_batch(kind: Kind) -> None:
    reward = FunctionReward(kind.first, "first").on("a") + FunctionReward(kind.second, "second").on("b")
    turning = Schedule("mixture/b", Steps(1, 0, n_drops=1, total=6, kind="linear"))
    metrics = run(kind, stage(kind, "a", "b", reward=reward, controllers=[turning]))
    assert [m.get("count/a/first/scored", 0) for m in metrics] == [8, 8, 8, 16, 16, 16]
    assert [m.get("count/b/second/scored", 0) for m in metrics] == [8, 8, 8, 0, 0, 0]
    assert [m.get("count/a/second/not_applicable", 0) for m in metrics] == [8, 8, 8, 16, 16, 16]


def test_each_kind_learns_what_the_reward_asks_of_it(kind: Kind) -> None:
    learning = Update(ClippedSurrogateObjective(clip=0.2), learning_rate=1e-2)
    metrics = run(kind, stage(kind, "only", steps=40, batch_size=64, updates=[learning], rules=[],
                              reward=FunctionReward(kind.first, "first")))  # fmt: skip
    assert metrics[-1]["reward/total"] > metrics[0]["reward/total"] + 0.3
