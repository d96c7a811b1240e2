"""The parts of one kind's papers on another kind's policies: the same stage, with another policy and task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from tensordict import NonTensorStack, TensorDict
from torch import Tensor

from control_worlds import Clock
from regimen import Cast, Event, Knob, ReferenceRefresh, Regimen, ReplayMemory, Stage, Update, train
from regimen.controllers import Linear, Schedule, Steps, TaskMixture
from regimen.credit import GAE, GroupRelativeAdvantage
from regimen.estimators import FitEstimator, Reading, RobustMultiTaskGradientBoostingRegressor
from regimen.models import ValueNetwork, torso_for
from regimen.models.small_decoder import small_decoder, word_tokenizer
from regimen.objectives import ClippedSurrogateObjective, ReferenceKL, ValueObjective
from regimen.objectives.base import Batch
from regimen.policies import ActionPolicy, FlowPolicy
from regimen.policies.token import TokenPolicy
from regimen.rewards import EnvironmentReward, FunctionReward, ModelReward
from regimen.rollout import Rollout
from regimen.tasks import EnvTask, GymnasiumVector, PromptTask
from regimen.tasks.base import Task

WORDS = ["yes", "no", "perhaps"]


@dataclass(frozen=True)
class Kind:
    """A policy with tasks by name, two rewards of its samples, and the knob of its sampling effort."""

    policy: Any
    task: Callable[[str], Task]
    first: Callable[[Rollout], Tensor]
    second: Callable[[Rollout], Tensor]
    effort: str


def brightness(rollout: Rollout) -> Tensor:
    return rollout["image"].mean((1, 2, 3))


def share_of_word(word: str, rollout: Rollout) -> Tensor:
    return torch.tensor([text.split().count(word) / 8 for text in rollout["text"]])


def share_of_action(action: int, rollout: Rollout) -> Tensor:
    return ((rollout.actions == action) & rollout.mask).sum(1) / 8


def flow(tiny_policy: Callable[..., FlowPolicy]) -> Kind:
    contexts = TensorDict({"condition": torch.arange(2)}, batch_size=[2])
    return Kind(
        tiny_policy(sampling_steps=8), partial(PromptTask, rows=contexts, group_size=4), brightness,
        lambda r: -r["image"].square().mean((1, 2, 3)), "sampling_steps",
    )  # fmt: skip


def token() -> Kind:
    contexts = TensorDict({"prompt": NonTensorStack("yes no", "no perhaps yes")}, batch_size=[2])
    tokenizer = word_tokenizer(WORDS)
    model = small_decoder(len(tokenizer), dim=16, layers=1, heads=2, positions=64)
    return Kind(
        TokenPolicy(model, tokenizer, max_new_tokens=8), partial(PromptTask, rows=contexts, group_size=4),
        partial(share_of_word, "yes"), partial(share_of_word, "no"), "max_new_tokens",
    )  # fmt: skip


def action() -> Kind:
    """Episodes as long as the knob `length` says; four of a group start alike."""

    def make(count: int) -> GymnasiumVector:
        return GymnasiumVector([partial(Clock, 8)] * count, reads=[Knob("length", 8, 1, integer=True)])

    policy = ActionPolicy.for_spaces(Clock.observation_space, Clock.action_space, widths=(16,))
    task = partial(EnvTask, make=make, copies=8, steps=8, episodes=True, siblings=4, evaluation_episodes=2)
    return Kind(policy, task, partial(share_of_action, 1), partial(share_of_action, 0), "length")


@pytest.fixture(params=["flow", "token", "action"])
def kind(request: pytest.FixtureRequest, tiny_policy: Callable[..., FlowPolicy]) -> Kind:
    return kinds(tiny_policy)[request.param]()


def kinds(tiny_policy: Callable[..., FlowPolicy]) -> dict[str, Callable[[], Kind]]:
    return {"flow": partial(flow, tiny_policy), "token": token, "action": action}


def stage(kind: Kind, *tasks: str, **changes: Any) -> Stage:
    """One stage for all kinds: nothing in it names a kind."""
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
    return Stage("any", [kind.task(name) for name in tasks], **settings)


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
        lengths.append(rollout.steps if kind.effort == "sampling_steps" else own)
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


def test_a_source_that_rewards_the_opposite_is_found_and_loses_its_share(kind: Kind) -> None:
    """R-MTGB on what is collected from three tasks, one of whose judges is hostile; then a mixture by its scores."""

    def source(sign: int, rollout: Rollout) -> Tensor:
        return sign * 20 * (kind.first(rollout) - 0.5)

    def seen(rollout: Rollout) -> Tensor:
        return torch.stack([kind.first(rollout), kind.second(rollout)], 1)

    signs = {"a": 1, "b": -1, "c": 1}
    judges = [FunctionReward(partial(source, sign), f"by {name}").on(name) for name, sign in signs.items()]
    reward, memory, reading = judges[0] + judges[1] + judges[2], ReplayMemory(192), Reading(seen)
    model = RobustMultiTaskGradientBoostingRegressor(n_shared=5, n_partition=40, n_task=5, random_state=0)
    scores = ModelReward("sources", ["odd"], ask=reading.outlier_scores).logged()
    asked = stage(kind, *signs, steps=4, batch_size=48, reward=reward, updates=[], rules=[], memory=memory)
    fit = Stage("fit", asked.tasks, 0, memory=memory, prepare=[FitEstimator("sources", reading)])
    use = stage(kind, *signs, steps=2, reward=reward + scores, controllers=[TaskMixture(["a", "b", "c"], by="odd")])
    seen_metrics: list[Mapping[str, float]] = []
    stages = [replace(asked, name="ask"), fit, use]
    train(
        Regimen(Cast(policy=kind.policy, sources=model), stages), seed=0,
        listener=lambda event: seen_metrics.append(event.metrics) if event.kind == "step" else None,
    )  # fmt: skip
    shares = [seen_metrics[-1][f"knob/mixture/{name}"] for name in signs]
    assert shares == pytest.approx([0.5, 0, 0.5], abs=0.05)


def test_each_kind_learns_what_the_reward_asks_of_it(kind: Kind) -> None:
    learning = Update(ClippedSurrogateObjective(clip=0.2), learning_rate=1e-2)
    metrics = run(kind, stage(kind, "only", steps=40, batch_size=64, updates=[learning], rules=[],
                              reward=FunctionReward(kind.first, "first")))  # fmt: skip
    assert metrics[-1]["reward/total"] > metrics[0]["reward/total"] + 0.3


def test_one_surrogate_starts_at_ratio_one_on_all_kinds(tiny_policy: Callable[..., FlowPolicy]) -> None:
    surrogate, credit = ClippedSurrogateObjective(clip=0.2), GroupRelativeAdvantage(ddof=0)
    for make in kinds(tiny_policy).values():
        one = make()
        rng, cast = torch.Generator().manual_seed(0), Cast(policy=one.policy)
        task = one.task("only")
        knobs = {knob.name: knob.default for knob in (*one.policy.knobs, *getattr(task, "knobs", ()))}
        rollout = task.collect(cast, knobs, rng, 16)
        judged = credit(rollout.replace(reward=torch.randn(16, generator=rng)), knobs, cast)
        loss = surrogate(Batch(judged, cast, knobs, rng))
        # Exactly 1 but for the rounding of a batched pass beside a step-wise one.
        assert float(loss.metrics["ratio_deviation"]) < 2e-6, one.effort
        # At ratio 1 the surrogate is minus the mean advantage, which is 0 within every group of equal lengths.
        weights = Batch(judged, cast, knobs, rng).weights("sequence")
        assert float(loss.total.detach()) == pytest.approx(-float((judged.advantages * weights).sum()), abs=1e-5)
        assert float(loss.metrics["clip_share"]) == 0


def test_a_schedule_moves_the_discount_that_credit_reads() -> None:
    """Five steps that pay 1 each, then the end: a return is the sum of the powers of the discount in force."""
    seen: list[Tensor] = []

    class Watched(ValueObjective):
        def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            seen.append(batch.rollout["value_target"][0])
            return super().loss(batch)

    task = EnvTask("clock", lambda count: GymnasiumVector([Clock] * count), copies=2, steps=5, episodes=True)
    space = Clock.observation_space
    cast = Cast(
        policy=ActionPolicy.for_spaces(space, Clock.action_space, widths=(4,)),
        critic=ValueNetwork(torso_for(space, (4,))),
    )
    learning = Stage(
        "discounted", [task], steps=3, batch_size=2, reward=EnvironmentReward(), credit=GAE(1.0),
        updates=[Update(Watched(), ["critic"])],
        controllers=[Schedule("discount", Linear(0.5, 0.9, total=2))],
    )  # fmt: skip
    train(Regimen(cast, [learning]), seed=0, listener=lambda event: None)
    for target, discount in zip(seen, (0.5, 0.7, 0.9), strict=True):
        powers = [sum(discount**k for k in range(left)) for left in (5, 4, 3, 2, 1)]
        assert target.tolist() == pytest.approx(powers, rel=1e-5)


def test_siblings_of_an_environment_are_compared_with_each_other_alone() -> None:
    """Returns of two groups differ by their starts; what is left after credit is only what siblings did."""
    one = action()
    rng, cast, task = torch.Generator().manual_seed(0), Cast(policy=one.policy), one.task("only")
    rollout = task.collect(cast, {"temperature": 1.0, "length": 8.0, "discount": 1.0}, rng, 16)
    assert rollout.group.tolist() == [row // 4 for row in range(16)]
    paid = one.first(rollout) + rollout.group * 100.0
    credited = GroupRelativeAdvantage(ddof=0)(rollout.replace(reward=paid), {}, cast)
    means = credited.advantages[:, 0].reshape(4, 4).mean(1)
    assert means.tolist() == pytest.approx([0] * 4, abs=1e-4)
    assert float(credited.advantages.abs().max()) < 3
