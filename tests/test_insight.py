"""What a controller may ask beside metrics: gradients and a probe that leave no trace, are counted, and resume."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from regimen import Cast, Event, Interrupted, Knob, ReferenceRefresh, Regimen, Stage, Update, train
from regimen.controllers import Constant, MetaGradientWeight, Needs, Probe, Schedule, Situation
from regimen.credit import GroupRelativeAdvantage
from regimen.insight import StageInsight
from regimen.knobs import Knobs
from regimen.memory import NewestRollout
from regimen.objectives import ClippedSurrogateObjective, ReferenceKL, ReinforceObjective
from regimen.objectives.base import Batch
from regimen.policies import FlowPolicy
from regimen.rewards import FunctionReward, Scene
from regimen.rewards.judge import judge
from regimen.rollout import Rollout
from regimen.runs import read_metrics
from regimen.tasks import PromptTask

Build = Callable[..., FlowPolicy]
MU = Knob("sft_weight", 0.5, 0.0, 1.0)
SURROGATE, KL = ClippedSurrogateObjective(), ReferenceKL("exact")


def brightness() -> FunctionReward:
    return FunctionReward(lambda rollout: rollout["image"].mean((1, 2, 3)), "brightness")


def prompts(name: str) -> PromptTask:
    return PromptTask(name, TensorDict({"condition": torch.arange(2)}, batch_size=[2]), group_size=4)


def probe(**changes: Any) -> Probe:
    return replace(
        Probe(prompts("probe"), 8, brightness(), GroupRelativeAdvantage(std=None), ReinforceObjective("constant", 1)),
        **changes,
    )


def stage(*controllers: Any, steps: int = 4, objective: Any = (1 - MU) * SURROGATE + MU * KL, **changes: Any) -> Stage:
    return Stage(
        "mixed", [prompts("images")], steps, 16, brightness(), GroupRelativeAdvantage(),
        [Update(objective, learning_rate=1e-2)], controllers=controllers, rules=[ReferenceRefresh()], **changes,
    )  # fmt: skip


def weight(**changes: Any) -> MetaGradientWeight:
    settings = {"imitation": "kl", "reinforcement": "surrogate", "meta_lr": 0.05, "entropy_lr": 0.0, "every": 2}
    return MetaGradientWeight("sft_weight", probe(), **{**settings, **changes})


def weights(policy: FlowPolicy) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])


def trained(policy: FlowPolicy, *controllers: Any, **changes: Any) -> Tensor:
    train(Regimen(Cast(policy=policy), [stage(*controllers, **changes)], evaluations=[]), seed=3)
    return weights(policy)


def look(
    tiny_policy: Build, micro_batch: int | None = None
) -> tuple[StageInsight, Cast, Rollout, list[tuple[str, int]]]:
    """An insight into an update that has a rollout to learn from."""
    cast, rng = Cast(policy=tiny_policy()), torch.Generator().manual_seed(1)
    ReferenceRefresh().start(cast)
    with torch.no_grad():
        for parameter in cast["reference"].parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=rng)
    knobs = {knob.name: knob.default for knob in (*cast["policy"].knobs, MU)} | {"noise_level": 0.7}
    rollout = prompts("images").collect(cast, knobs, rng, 16)
    rollout, _ = judge(brightness(), rollout, Scene(cast, knobs))
    rollout = GroupRelativeAdvantage()(rollout, knobs, cast)
    memory = NewestRollout()
    memory.add(rollout)
    update = Update((1 - MU) * SURROGATE + MU * KL, micro_batch=micro_batch)
    charged: list[tuple[str, int]] = []
    insight = StageInsight(Needs("policy", ("surrogate", "kl"), probe()), update, cast, knobs, None)
    insight.seed(5)
    return insight.at(memory, lambda task, size: charged.append((task.name, size))), cast, rollout, charged


# Gradients


def test_gradients_are_those_of_the_named_losses_before_their_weights(tiny_policy: Build) -> None:
    insight, cast, rollout, _ = look(tiny_policy)
    found, values = insight.gradients("surrogate", "kl"), insight.losses("surrogate", "kl")
    for objective in (SURROGATE, KL):
        parameters = list(cast["policy"].parameters())
        loss = objective(Batch(rollout, cast, insight.knobs, torch.Generator())).total
        expected = torch.autograd.grad(loss, parameters, materialize_grads=True)
        assert torch.equal(found[objective.name], torch.cat([gradient.flatten() for gradient in expected]))
        assert values[objective.name] == pytest.approx(float(loss.detach()), abs=1e-6)
        assert bool(found[objective.name].any())


def test_gradients_of_micro_batches_add_up(tiny_policy: Build) -> None:
    whole, parts = look(tiny_policy)[0].gradients("kl"), look(tiny_policy, micro_batch=5)[0].gradients("kl")
    assert torch.allclose(whole["kl"], parts["kl"], atol=1e-6)


def test_asking_leaves_no_trace(tiny_policy: Build) -> None:
    insight, cast, _, charged = look(tiny_policy)
    before, drawn = weights(cast["policy"]), torch.random.get_rng_state()
    insight.gradients("surrogate", "kl")
    step = torch.ones_like(before)
    with insight.moved(step):
        assert torch.equal(weights(cast["policy"]), before + step)
        samples = insight.probe()
    insight.probe_gradient(samples)
    assert torch.equal(weights(cast["policy"]), before)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert all(parameter.grad is None for parameter in cast["policy"].parameters())
    assert charged == [("probe", 8)]
    assert samples.advantages is not None


def test_weights_come_back_also_after_an_error(tiny_policy: Build) -> None:
    insight, cast, _, _ = look(tiny_policy)
    before = weights(cast["policy"])
    with pytest.raises(RuntimeError, match="stop"), insight.moved(torch.ones_like(before)):
        raise RuntimeError("stop")
    assert torch.equal(weights(cast["policy"]), before)


def test_what_was_not_declared_is_not_given(tiny_policy: Build) -> None:
    insight, *_ = look(tiny_policy)
    with pytest.raises(ValueError, match="asks for loss 'entropy', which its needs do not declare: surrogate, kl"):
        insight.gradients("entropy")
    insight.needs = Needs("policy")
    with pytest.raises(ValueError, match="asks for a probe, which its needs do not declare"):
        insight.probe()


def test_a_probe_alone_needs_no_update_and_may_have_the_knobs_of_an_evaluation(tiny_policy: Build) -> None:
    cast, memory, taken = Cast(policy=tiny_policy()), NewestRollout(), {}
    board = Knobs.of(cast["policy"], noise_level=0.7)
    for evaluating in (False, True):
        looking = Needs(probe=probe(reward=None, credit=None, objective=None, evaluating=evaluating))
        insight = StageInsight(looking, None, cast, board, None).at(memory, lambda task, size: None)
        taken[evaluating] = insight.probe().knob("noise_level")
    assert taken[False].tolist() == pytest.approx([0.7] * 8)
    assert taken[True].tolist() == [0] * 8
    assert board["noise_level"] == 0.7
    with pytest.raises(ValueError, match="asks for gradients, and its needs name no update"):
        insight.gradients()


# In a run


class Asking:
    """Asks for everything and moves nothing."""

    moment, moves = "before_learn", ("sft_weight",)
    needs = Needs("policy", ("surrogate", "kl"), probe())

    def __call__(self, situation: Situation) -> dict[str, float]:
        insight = situation.insight
        assert insight is not None
        insight.gradients("surrogate", "kl")
        insight.probe_gradient(insight.probe())
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass


def test_a_controller_that_asks_and_moves_nothing_changes_no_weight(tiny_policy: Build) -> None:
    assert torch.equal(trained(tiny_policy(), Asking()), trained(tiny_policy()))


@pytest.mark.parametrize(
    ("mu", "objective"), [(1.0, (1 - MU) * KL + MU * SURROGATE), (0.0, (1 - MU) * SURROGATE + MU * KL)]
)
def test_a_weight_of_1_or_0_is_one_loss_alone_bit_by_bit(tiny_policy: Build, mu: float, objective: Any) -> None:
    bound = weight(low=mu, high=mu)
    mixed = trained(tiny_policy(), bound, objective=objective, knobs={"sft_weight": mu}, steps=3)
    assert torch.equal(mixed, trained(tiny_policy(), objective=SURROGATE, steps=3))
    assert not torch.equal(mixed, weights(tiny_policy()))


@pytest.mark.parametrize("agrees", [True, False])
def test_the_weight_moves_towards_the_loss_that_held_out_reward_agrees_with(tiny_policy: Build, agrees: bool) -> None:
    """The other loss is a KL to what the policy still is and has no gradient, so the held-out loss's sign decides."""
    held_out = FunctionReward(lambda rollout: (1 if agrees else -1) * rollout["image"].mean((1, 2, 3)), "held_out")
    moving = MetaGradientWeight(
        "sft_weight", probe(size=64, reward=held_out), imitation="kl", reinforcement="surrogate", entropy_lr=0.0
    )
    seen: list[dict[str, float]] = []
    train(
        Regimen(Cast(policy=tiny_policy()), [stage(moving, steps=1)], evaluations=[]),
        seed=3,
        listener=lambda event: seen.append(dict(event.metrics)) if event.kind == "step" else None,
    )
    found = seen[0]["adapt/meta_gradient"]
    assert (found < -0.1) if agrees else (found > 0.1)
    assert (seen[0]["knob/sft_weight"] < 0.5) == agrees


def test_probes_are_counted_and_the_weight_in_force_is_logged(tiny_policy: Build, tmp_path: Path) -> None:
    regimen = Regimen(Cast(policy=tiny_policy()), [stage(weight())], evaluations=[])
    outcome = train(regimen, seed=3, out=tmp_path / "run")
    assert outcome.counters.samples == 4 * 16 + 2 * 8
    steps = [r["metrics"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "step"]
    moved = [0.5 + step["adapt/meta_move"] for step in steps[:1]]
    assert steps[0]["knob/sft_weight"] == pytest.approx(moved[0])
    assert steps[0]["knob/sft_weight"] == steps[1]["knob/sft_weight"] != steps[2]["knob/sft_weight"]
    assert steps[1]["adapt/meta_move"] == 0


@pytest.mark.parametrize("stop_at", [1, 3])
def test_a_run_with_probes_resumes_exactly(tiny_policy: Build, tmp_path: Path, stop_at: int) -> None:
    def run(out: Path, resume: bool = False, listener: Any = None) -> Tensor:
        policy = tiny_policy()
        regimen = Regimen(Cast(policy=policy), [stage(weight(), steps=6)], evaluations=[])
        train(regimen, seed=3, out=out, resume=resume, listener=listener, checkpoint_every=1)
        return weights(policy)

    def stop(event: Event) -> None:
        if event.kind == "step" and event.step == stop_at + 1:
            raise Interrupted

    whole = run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(tmp_path / "halved", listener=stop)
    assert torch.equal(run(tmp_path / "halved", resume=True), whole)
    logs = [
        [record["metrics"] for record in read_metrics(tmp_path / name / "metrics.jsonl") if record["kind"] == "step"]
        for name in ("whole", "halved")
    ]
    assert logs[0] == logs[1]


# When it is built


def test_needs_that_do_not_fit_the_stage_are_named_when_it_is_built(tiny_policy: Build) -> None:
    def build(*controllers: Any) -> None:
        Regimen(Cast(policy=tiny_policy()), [stage(*controllers)])

    with pytest.raises(ValueError, match="needs the update 'critic', and the stage's updates are: policy"):
        build(weight(update="critic"))
    with pytest.raises(ValueError, match=r"needs the loss 'sft' of update 'policy', whose losses are: .*surrogate.*kl"):
        build(weight(imitation="sft"))
    late = weight()
    late.moment = "after_learn"
    with pytest.raises(ValueError, match="acts at 'after_learn'; they are there at 'before_learn'"):
        build(late)
    uneven = weight()
    uneven.needs = Needs("policy", (), probe(size=6))
    with pytest.raises(ValueError, match="with size 6; expected a multiple of its group_size 4"):
        build(uneven)


def test_a_probe_of_the_stages_own_task_is_an_error(tiny_policy: Build) -> None:
    built = stage()
    own = MetaGradientWeight(
        "sft_weight", probe(task=built.tasks[0]), imitation="kl", reinforcement="surrogate", entropy_lr=0
    )
    with pytest.raises(ValueError, match="probes the stage's own task 'images'"):
        Regimen(Cast(policy=tiny_policy()), [replace(built, controllers=[own])])


def test_knobs_of_a_probe_are_declared() -> None:
    needing = weight()
    needing.needs = Needs("policy", (), probe(reward=0.5 * brightness()))
    assert "weight/brightness" in {knob.name for _, knob in stage(needing).declared()}
    assert "weight/brightness" not in {knob.name for _, knob in stage(Schedule("sft_weight", Constant(1))).declared()}
