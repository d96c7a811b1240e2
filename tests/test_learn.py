"""The learn step: micro-batches add up, numbers that are not finite stay away from the weights, state comes back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regimen.cast import Cast
from regimen.credit import GroupRelativeAdvantage
from regimen.knobs import Knob, Knobs
from regimen.learn import Learned, Learner
from regimen.memory import NewestRollout
from regimen.objectives import ClippedSurrogateObjective, EntropyBonus, ReferenceKL, SFTObjective
from regimen.objectives.base import Batch, Objective
from regimen.policies import FlowPolicy
from regimen.rollout import Rollout
from regimen.storage import load_tree, save_tree
from regimen.update import Epochs, Update

Sampled = Callable[..., tuple[FlowPolicy, Rollout]]


class Level(Objective):
    """The mean of the column `level` times a weight: its gradient is the mean level."""

    name = "level"

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        level = batch.rollout["level"].mean()
        return batch.member("policy").weight.sum() * level * batch.share, {"level": level}


class Scalar(nn.Module):
    """One weight, and a version."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.version = 0


def memory_of(rollout: Rollout) -> NewestRollout:
    memory = NewestRollout()
    memory.add(rollout)
    return memory


def levels(*values: float) -> NewestRollout:
    count = len(values)
    mask = torch.ones(count, 1, dtype=torch.bool)
    column = {"level": torch.tensor(values)}
    return memory_of(Rollout.create(task="t", group=torch.arange(count), mask=mask, columns=column))


def descent(**settings: Any) -> Update:
    options: dict[str, Any] = {"learning_rate": 1.0, "optimizer": torch.optim.SGD, "max_grad_norm": None, **settings}
    return Update(options.pop("objective", Level()), **options)


def learn(update: Update, memory: NewestRollout, member: nn.Module | None = None) -> tuple[Learned, Any]:
    cast = Cast(policy=member or Scalar())
    learned = Learner(update, cast).learn(memory, cast, Knobs.of(update), torch.Generator().manual_seed(0))
    return learned, cast["policy"]


def judged(sampled: Sampled, batch: int = 10) -> tuple[FlowPolicy, Rollout]:
    """A policy and its credited rollout, with steps of some samples and whole samples left out."""
    policy, rollout = sampled(batch)
    rng = torch.Generator().manual_seed(0)
    loss_mask = rollout.loss_mask & (torch.rand(batch, 4, generator=rng) < 0.7)
    loss_mask[3] = False
    rollout = rollout.replace(reward=torch.rand(batch, generator=rng), group=torch.arange(batch) // 5)
    return policy, GroupRelativeAdvantage()(rollout.replace(loss_mask=loss_mask), {}, {})


def gradients(objective: Objective, policy: FlowPolicy, rollout: Rollout, micro_batch: int | None) -> list[Tensor]:
    """What the weights moved by in one step of plain descent."""
    before = [p.detach().clone() for p in policy.parameters()]
    cast = Cast(policy=policy)
    cast.snapshot("policy", "reference")
    with torch.no_grad():
        cast["reference"].denoiser.out.bias += 0.2
    update = descent(objective=objective, micro_batch=micro_batch)
    Learner(update, cast).learn(memory_of(rollout), cast, Knobs.of(update), torch.Generator())
    moved = [old - new.detach() for old, new in zip(before, policy.parameters(), strict=True)]
    with torch.no_grad():
        for parameter, old in zip(policy.parameters(), before, strict=True):
            parameter.copy_(old)
    return moved


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 9, 100])
@pytest.mark.parametrize("aggregate", ["sequence", "token", "constant"])
def test_micro_batches_give_the_gradient_of_the_whole(sampled: Sampled, aggregate: Any, micro_batch: int) -> None:
    policy, rollout = judged(sampled)
    for objective in (
        ClippedSurrogateObjective(0.2, aggregate=aggregate), SFTObjective(aggregate),
        ClippedSurrogateObjective(0.2, aggregate=aggregate) + 0.5 * ReferenceKL("exact", aggregate),
    ):  # fmt: skip
        whole = gradients(objective, policy, rollout, None)
        assert sum(float(g.abs().sum()) for g in whole) > 1e-3
        for found, expected in zip(gradients(objective, policy, rollout, micro_batch), whole, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_micro_batches_report_the_losses_and_metrics_of_the_whole(sampled: Sampled) -> None:
    policy, rollout = judged(sampled)
    update = descent(objective=ClippedSurrogateObjective(0.2) + 0.1 * EntropyBonus(), learning_rate=0.0)
    whole, parts = (
        learn(replace(update, micro_batch=size), memory_of(rollout), policy)[0].metrics for size in (None, 4)
    )
    for name in ("policy/loss", "policy/loss/surrogate", "policy/loss/entropy", "policy/grad_norm"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6)
    assert parts["policy/clip_share"] == whole["policy/clip_share"] == 0
    # Slices of two and of one sample: their metrics count by their samples.
    assert learn(descent(micro_batch=2), levels(1.0, 2.0, 6.0))[0].metrics["policy/level"] == pytest.approx(3.0)


def test_steps_are_those_of_the_optimiser() -> None:
    """Mean level 3: the weight goes from 0 to -3, -6, -9."""
    learned, policy = learn(descent(batches=Epochs(3, 1)), levels(2.0, 4.0))
    assert float(policy.weight.detach()) == pytest.approx(-9.0)
    assert (learned.gradient_steps, learned.skipped, policy.version) == (3, 0, 1)
    assert learned.metrics == pytest.approx(
        {"policy/loss": (0 - 9 - 18) / 3, "policy/loss/level": -9, "policy/level": 3, "policy/grad_norm": 3}
    )


def test_gradient_is_scaled_down_to_the_limit_and_logged_as_it_was() -> None:
    learned, policy = learn(descent(max_grad_norm=0.5), levels(4.0))
    assert float(policy.weight.detach()) == pytest.approx(-0.5, abs=1e-5)
    assert learned.metrics["policy/grad_norm"] == pytest.approx(4.0)
    _, policy = learn(descent(max_grad_norm=5.0), levels(4.0))
    assert float(policy.weight.detach()) == pytest.approx(-4.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_all_gradients_and_what_is_left_of_them_are_torchs(dtype: torch.dtype) -> None:
    policy = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3).to(dtype))
    learner = Learner(descent(max_grad_norm=0.5), Cast(policy=policy))
    rng = torch.Generator().manual_seed(0)
    twins = [nn.Parameter(parameter.detach().clone()) for parameter in policy.parameters()]
    for parameter, twin in list(zip(policy.parameters(), twins, strict=True))[1:]:
        parameter.grad = torch.randn(parameter.shape, generator=rng).to(parameter)
        twin.grad = parameter.grad.clone()
    norm = learner._norm()
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(twins, 0.5))
    learner._clip(norm)
    for parameter, twin in zip(policy.parameters(), twins, strict=True):
        torch.testing.assert_close(parameter.grad, twin.grad)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_step_that_is_not_finite_is_skipped_and_counted(bad: float, optimizer: Any) -> None:
    """Of the three minibatches one holds a bad number; the other two are taken and reported."""
    update = descent(batches=Epochs(1, 3), optimizer=optimizer)
    learned, policy = learn(update, levels(1.0, bad, 1.0))
    assert (learned.gradient_steps, learned.skipped, policy.version) == (2, 1, 1)
    assert bool(policy.weight.isfinite().all())
    assert float(policy.weight.detach()) < -1
    assert all(math.isfinite(value) for value in learned.metrics.values())
    assert learned.metrics["policy/grad_norm"] == pytest.approx(1.0)


def test_skipped_step_leaves_no_trace_in_weights_or_optimiser() -> None:
    cast = Cast(policy=Scalar())
    update = descent(optimizer=torch.optim.AdamW, learning_rate=0.1)
    learner = Learner(update, cast)
    learned = learner.learn(levels(math.nan), cast, {}, torch.Generator())
    assert learned == Learned({}, 0, 1, None)
    assert float(cast["policy"].weight.detach()) == 0
    assert cast["policy"].version == 0
    assert learner.state_dict()["state"] == {}
    learner.learn(levels(1.0), cast, {}, torch.Generator())
    assert float(cast["policy"].weight.detach()) == pytest.approx(-0.1)


def test_loss_that_is_finite_with_a_gradient_that_is_not_is_skipped() -> None:
    class Root(Objective):
        def loss(self, batch: Batch) -> Tensor:
            return batch.member("policy").weight.abs().sqrt().sum()

    learned, policy = learn(descent(objective=Root()), levels(1.0))
    assert (learned.gradient_steps, learned.skipped) == (0, 1)
    assert float(policy.weight.detach()) == 0


def test_one_bad_micro_batch_spoils_its_minibatch_only() -> None:
    learned, policy = learn(descent(batches=Epochs(1, 2), micro_batch=1), levels(1.0, 1.0, 1.0, math.nan))
    assert (learned.gradient_steps, learned.skipped) == (1, 1)
    assert float(policy.weight.detach()) == pytest.approx(-1.0)


def test_first_ratio_deviation_is_that_before_the_first_step(sampled: Sampled) -> None:
    policy, rollout = judged(sampled)
    update = descent(objective=ClippedSurrogateObjective(0.2), batches=Epochs(3, 1), learning_rate=0.1)
    learned, _ = learn(update, memory_of(rollout), policy)
    assert learned.first_ratio_deviation < 1e-5
    assert learned.metrics["policy/ratio_deviation"] > 1e-3
    again, _ = learn(update, memory_of(rollout), policy)
    assert again.first_ratio_deviation > 1e-3
    assert learn(descent(), levels(1.0))[0].first_ratio_deviation is None


def test_identical_rewards_move_nothing(sampled: Sampled) -> None:
    policy, rollout = sampled()
    rollout = rollout.replace(reward=torch.full((8,), 0.3), group=torch.arange(8) // 4)
    before = [p.detach().clone() for p in policy.parameters()]
    learned, _ = learn(
        descent(objective=ClippedSurrogateObjective()), memory_of(GroupRelativeAdvantage()(rollout, {}, {})), policy
    )
    assert learned.metrics["policy/grad_norm"] == 0
    assert all(torch.equal(old, new) for old, new in zip(before, policy.parameters(), strict=True))


def test_learning_rate_knob_is_read_at_every_iteration() -> None:
    cast = Cast(policy=Scalar())
    update = descent(learning_rate=Knob("learning_rate", 1.0))
    learner, knobs = Learner(update, cast), Knobs.of(update)
    weights = []
    for rate in (1.0, 0.25, 0.0):
        knobs.set("learning_rate", rate, by="test")
        learner.learn(levels(1.0), cast, knobs, torch.Generator())
        weights.append(float(cast["policy"].weight.detach()))
    assert weights == pytest.approx([-1.0, -1.25, -1.25])


def test_only_the_members_of_the_update_are_moved() -> None:
    class Both(Objective):
        def loss(self, batch: Batch) -> Tensor:
            return batch.member("policy").weight.sum() + batch.member("critic").weight.sum()

    cast = Cast(policy=Scalar(), critic=Scalar())
    Learner(descent(objective=Both(), members=["critic"]), cast).learn(levels(1.0), cast, {}, torch.Generator())
    assert [float(cast[name].weight.detach()) for name in ("policy", "critic")] == [0.0, -1.0]
    assert [cast[name].version for name in ("policy", "critic")] == [0, 1]


def test_minibatch_without_samples_is_no_step() -> None:
    learned, policy = learn(descent(batches=Epochs(1, 4)), levels(1.0, 1.0))
    assert learned.gradient_steps == 2
    memory = levels(1.0, 1.0)
    memory.add(memory.newest().replace(loss_mask=torch.zeros(2, 1, dtype=torch.bool)))
    learned, policy = learn(descent(), memory)
    assert learned == Learned({}, 0, 0, None)
    assert policy.version == 0


def test_loss_that_reaches_no_weight_is_refused() -> None:
    class Elsewhere(Objective):
        def loss(self, batch: Batch) -> Tensor:
            return torch.zeros((), requires_grad=True) * 1

    with pytest.raises(
        ValueError, match="update 'policy': the loss does not depend on any trainable parameter of poli"
    ):
        learn(descent(objective=Elsewhere()), levels(1.0))
    with pytest.raises(ValueError, match="member 'policy' has no trainable parameters"):
        learn(descent(), levels(1.0), Scalar().requires_grad_(False))


def test_state_round_trip_through_a_file_continues_the_same(sampled: Sampled, tmp_path: Path) -> None:
    """Adam's moments and the schedule's rate come back, bit for bit."""
    update = Update(ClippedSurrogateObjective(0.2), learning_rate=0.01, batches=Epochs(2, 2))
    ends = []
    for resumed in (False, True):
        policy, rollout = judged(sampled)
        cast = Cast(policy=policy)
        learner = Learner(update, cast)
        for step in range(4):
            learner.learn(memory_of(rollout), cast, Knobs.of(update), torch.Generator().manual_seed(step))
            if resumed and step == 1:
                save_tree(tmp_path / "optimizer", {"learner": learner.state_dict(), "cast": cast.state_dict()})
                policy, _ = judged(sampled)
                cast = Cast(policy=policy)
                learner, saved = Learner(update, cast), load_tree(tmp_path / "optimizer")
                cast.load_state_dict(saved["cast"])
                learner.load_state_dict(saved["learner"])
        ends.append([p.detach() for p in policy.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_learns_the_better_of_two_answers(sampled: Sampled) -> None:
    """Group-relative credit and the surrogate raise the log-probability of what was rewarded above its siblings."""
    policy, rollout = sampled(32)
    rollout = rollout.replace(reward=(torch.arange(32) % 2).float(), group=torch.arange(32) // 2)
    credited = GroupRelativeAdvantage(ddof=0)(rollout, {}, {})
    update = Update(ClippedSurrogateObjective(0.2), learning_rate=3e-3, batches=Epochs(20, 1))
    learn(update, memory_of(credited), policy)
    change = (policy.logprob(rollout).detach() - rollout.logprobs)[:, :3].mean(1)
    assert float(change[1::2].mean()) > 0.01
    assert float(change[0::2].mean()) < -0.01


def test_a_fused_step_is_the_plain_one_and_is_told_as_a_change() -> None:
    """Weights that were sent elsewhere are sent again when their version has moved."""
    results = []
    for fused in (True, False):
        member = Scalar()
        before = member.weight._version
        learn(descent(optimizer=torch.optim.Adam, options={"fused": fused}), levels(1.0, 3.0), member)
        assert member.weight._version > before
        results.append(member.weight.detach())
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


def test_optimisers_take_their_step_in_one_pass_unless_told_otherwise() -> None:
    parameters = [nn.Parameter(torch.zeros(2))]
    assert descent(optimizer=torch.optim.Adam).build_optimizer(parameters).defaults["fused"]
    told = descent(optimizer=torch.optim.Adam, options={"foreach": True}).build_optimizer(parameters)
    assert not told.defaults["fused"]
    assert "fused" not in descent(optimizer=torch.optim.Adadelta).build_optimizer(parameters).defaults
