"""The loop through the public interface: learning, mixture, knobs, failures, bad numbers."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from regimen import Cast, Epochs, Event, Interrupted, Knob, ReferenceRefresh, Regimen, RunError, Stage, Update, train
from regimen.controllers import Linear, Schedule
from regimen.credit import GroupRelativeAdvantage
from regimen.functions import nearest_distance
from regimen.iteration import allocate
from regimen.models import MLPDenoiser
from regimen.objectives import ClippedSurrogateObjective, FlowMatchingObjective, ReferenceKL
from regimen.policies import FlowPolicy
from regimen.rewards import reward_from
from regimen.rollout import Rollout
from regimen.runs import read_metrics
from regimen.tasks import DatasetTask, Evaluation, PromptTask

SHAPE = (1, 2, 2)


def tiny_policy(**options: object) -> FlowPolicy:
    torch.manual_seed(0)
    settings: dict[str, object] = {"sampling_steps": 4, "evaluation_steps": 8, **options}
    return FlowPolicy(MLPDenoiser(SHAPE, 2, width=32, blocks=1), SHAPE, **settings)  # type: ignore[arg-type]


def prompts(name: str = "prompts", group_size: int = 8) -> PromptTask:
    def brightness(policy: FlowPolicy, knobs: object, rng: torch.Generator) -> Evaluation:
        contexts = TensorDict({"condition": torch.arange(2).repeat(32)}, batch_size=[64])
        image = policy.sample(contexts, knobs, rng)["image"]  # type: ignore[arg-type]
        return Evaluation({"brightness": float(image.mean())}, {"images": image[:8]})

    rows = TensorDict({"condition": torch.arange(2)}, batch_size=[2])
    return PromptTask(name, rows, group_size=group_size, evaluate=brightness)


@reward_from
def bright(rollout: Rollout) -> torch.Tensor:
    return rollout["image"].flatten(1).mean(1)


def reinforce(task: PromptTask | None = None, **settings: object) -> Stage:
    options: dict[str, object] = {
        "reward": bright,
        "credit": GroupRelativeAdvantage(),
        "updates": [Update(ClippedSurrogateObjective(clip=0.01), learning_rate=3e-3, batches=Epochs(1, 2))],
        **settings,
    }
    steps = options.pop("steps", 40)
    return Stage("reinforce", [task or prompts()], steps, 64, **options)  # type: ignore[arg-type]


def test_reinforcement_learns_what_is_rewarded() -> None:
    outcome = train(Regimen(Cast(policy=tiny_policy()), [reinforce()]))
    before, after = (record["metrics"]["prompts/brightness"] for record in outcome.evaluations)
    assert after > before + 0.5
    assert outcome.counters.samples == 40 * 64
    assert outcome.counters.gradient_steps == 80


def test_flow_matching_learns_the_data() -> None:
    data = torch.tensor([[1.0, -1.0, 1.0, -1.0], [-1.0, 1.0, -1.0, 1.0]]).view(2, *SHAPE)
    rows = TensorDict({"image": data, "context": {"condition": torch.arange(2)}}, batch_size=[2])
    update = Update(FlowMatchingObjective(), learning_rate=5e-3)
    policy = tiny_policy(evaluation_steps=30)
    train(Regimen(Cast(policy=policy), [Stage("fit", [DatasetTask("pairs", rows)], 300, 64, updates=[update])]))
    contexts = TensorDict({"condition": torch.arange(2).repeat(50)}, batch_size=[100])
    knobs = {"sampling_steps": 30, "noise_level": 0.0, "guidance": 1.0}
    drawn = policy.sample(contexts, knobs, torch.Generator().manual_seed(0))["image"]
    assert float((drawn - data.repeat(50, 1, 1, 1)).square().mean().sqrt()) < 0.25
    assert float(nearest_distance(drawn, data).mean()) < 0.25


def test_same_seed_same_numbers_and_another_seed_others(tmp_path: Path) -> None:
    runs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(Regimen(Cast(policy=tiny_policy()), [reinforce(steps=4)]), seed=seed, out=tmp_path / name)
        runs.append([r["metrics"] for r in read_metrics(tmp_path / name / "metrics.jsonl")])
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_evaluating_more_often_does_not_change_training() -> None:
    policies = []
    for every in (None, 1):
        policy = tiny_policy()
        train(Regimen(Cast(policy=policy), [reinforce(steps=3, evaluate_every=every)]))
        policies.append(policy.state_dict())
    assert all(torch.equal(policies[0][key], policies[1][key]) for key in policies[0])


def test_run_leaves_what_it_promises(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(Regimen(Cast(policy=tiny_policy()), [reinforce(steps=3)]), out=out)
    names = {path.name for path in out.iterdir()}
    assert names == {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "samples",
        "tensorboard",
        "cast-reinforce.safetensors",
    }
    assert list((out / "samples").glob("*.png"))
    step = next(r for r in read_metrics(out / "metrics.jsonl") if r["kind"] == "step")
    for name in (
        "reward/prompts/bright",
        "reward/total",
        "advantage/size",
        "policy/loss/surrogate",
        "knob/noise_level",
    ):
        assert name in step["metrics"]


def test_logged_total_is_what_credit_consumed() -> None:
    seen: list[Rollout] = []

    class Spy(GroupRelativeAdvantage):
        def __call__(self, rollout: Rollout, knobs: object, cast: object) -> Rollout:
            seen.append(rollout)
            return super().__call__(rollout, knobs, cast)  # type: ignore[arg-type]

    events: list[Event] = []
    stage = reinforce(steps=1, credit=Spy())
    train(Regimen(Cast(policy=tiny_policy()), [stage]), listener=events.append)
    logged = next(event for event in events if event.kind == "step").metrics
    assert logged["reward/total"] == pytest.approx(float(seen[0].reward.mean()), abs=1e-7)


def test_scheduled_knob_is_in_force_in_the_same_iteration_and_in_the_rollout() -> None:
    levels: list[float] = []

    @reward_from
    def note(rollout: Rollout) -> torch.Tensor:
        levels.append(float(rollout.knobs["noise_level"][0]))
        return rollout["image"].flatten(1).mean(1)

    events: list[Event] = []
    stage = reinforce(steps=3, reward=note, controllers=[Schedule("noise_level", Linear(0.9, 0.3, 2))])
    train(Regimen(Cast(policy=tiny_policy()), [stage]), listener=events.append)
    assert levels == pytest.approx([0.9, 0.6, 0.3])
    logged = [event.metrics["knob/noise_level"] for event in events if event.kind == "step"]
    assert logged == pytest.approx(levels)


def test_mixture_shares_are_kept_over_time_in_whole_groups() -> None:
    owed = {"a": 0.0, "b": 0.0}
    totals = {"a": 0, "b": 0}
    for _ in range(30):
        sizes = allocate({"a": 1.0, "b": 9.0}, 40, {"a": 8, "b": 8}, owed)
        assert all(size % 8 == 0 for size in sizes.values())
        for name, size in sizes.items():
            totals[name] += size
    assert totals == {"a": 120, "b": 1080}


def test_absent_task_is_counted_right() -> None:
    events: list[Event] = []
    stage = Stage(
        "mix",
        [prompts("a"), prompts("b")],
        3,
        32,
        reward=bright,
        credit=GroupRelativeAdvantage(),
        updates=[Update(ClippedSurrogateObjective(clip=0.01))],
        controllers=[Schedule("mixture/b", Linear(0.0, 1.0, 2))],
    )
    outcome = train(Regimen(Cast(policy=tiny_policy()), [stage]), listener=events.append)
    steps = [event.metrics for event in events if event.kind == "step"]
    assert steps[0]["count/a/bright/scored"] == 32
    assert "count/b/bright/scored" not in steps[0]
    assert steps[2]["count/a/bright/scored"] == steps[2]["count/b/bright/scored"] == 16
    assert outcome.counters.samples == sum(
        step.get(f"count/{task}/bright/scored", 0) for step in steps for task in ("a", "b")
    )


def test_reward_that_always_raises_stops_the_run_and_says_why(tmp_path: Path) -> None:
    @reward_from
    def broken(rollout: Rollout) -> torch.Tensor:
        raise ZeroDivisionError("no judge today")

    with pytest.raises(RunError, match=r"64 of the last 64.*broken.*ZeroDivisionError: no judge today"):
        train(Regimen(Cast(policy=tiny_policy()), [reinforce(reward=broken)]), out=tmp_path / "run")


def test_reward_of_wrong_shape_is_a_failure_that_names_it() -> None:
    @reward_from
    def table(rollout: Rollout) -> torch.Tensor:
        return torch.zeros(len(rollout), 7)

    with pytest.raises(RunError, match=r"returned shape \[64, 7\], expected \[64\]"):
        train(Regimen(Cast(policy=tiny_policy()), [reinforce(reward=table)]))


def test_reward_that_hangs_is_cut_off() -> None:
    @reward_from
    def slow(rollout: Rollout) -> torch.Tensor:
        while True:
            time.sleep(0.01)

    started = time.time()
    with pytest.raises(RunError, match=r"'slow' did not return within 0.2 s"):
        train(Regimen(Cast(policy=tiny_policy()), [reinforce(reward=slow, reward_timeout_s=0.2)]))
    assert time.time() - started < 20


def test_few_failures_leave_their_group_and_the_run_goes_on() -> None:
    @reward_from
    def patchy(rollout: Rollout) -> torch.Tensor:
        value = rollout["image"].flatten(1).mean(1)
        value[0] = torch.nan
        return value

    events: list[Event] = []
    outcome = train(Regimen(Cast(policy=tiny_policy()), [reinforce(steps=2, reward=patchy)]), listener=events.append)
    step = next(event.metrics for event in events if event.kind == "step")
    assert step["count/prompts/patchy/failed"] == 1
    assert step["count/prompts/patchy/scored"] == 63
    assert outcome.counters.gradient_steps == 4


def test_group_of_one_is_refused_with_a_remedy() -> None:
    with pytest.raises(ValueError, match="group_size >= 2"):
        train(Regimen(Cast(policy=tiny_policy()), [reinforce(prompts(group_size=1))]))


def test_noise_level_zero_cannot_train_with_ratios() -> None:
    with pytest.raises(ValueError, match=r"needs 'logprobs'.*noise_level > 0"):
        train(Regimen(Cast(policy=tiny_policy(noise_level=0.0)), [reinforce()]))


def test_nonfinite_loss_never_reaches_the_weights_and_stops_the_run() -> None:
    policy = tiny_policy()
    policy_before = {key: value.clone() for key, value in policy.state_dict().items()}

    class Poisoned(ClippedSurrogateObjective):
        def loss(self, batch: object) -> torch.Tensor:
            value, _ = super().loss(batch)  # type: ignore[arg-type]
            return value * torch.nan

    stage = reinforce(updates=[Update(Poisoned(clip=0.01))], max_skipped=3)
    with pytest.raises(RunError, match="3 gradient steps in a row were not finite"):
        train(Regimen(Cast(policy=policy), [stage]))
    assert all(torch.equal(value, policy_before[key]) for key, value in policy.state_dict().items())


def test_nonfinite_loss_can_restore_the_last_good_checkpoint(tmp_path: Path) -> None:
    calls = {"count": 0}

    class SometimesPoisoned(ClippedSurrogateObjective):
        def loss(self, batch: object) -> torch.Tensor:
            calls["count"] += 1
            value, _ = super().loss(batch)  # type: ignore[arg-type]
            return value * torch.nan if 6 <= calls["count"] < 8 else value

    stage = reinforce(steps=8, updates=[Update(SometimesPoisoned(clip=0.01))], max_skipped=2, on_nonfinite="restore")
    events: list[Event] = []
    outcome = train(
        Regimen(Cast(policy=tiny_policy()), [stage]), out=tmp_path / "run", checkpoint_every=2, listener=events.append
    )
    assert outcome.counters.step == 0
    assert outcome.counters.skipped == 2
    assert any("restored" in event.text for event in events)
    steps = [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if record["kind"] == "step"]
    assert steps == list(range(1, 9))


def test_stop_rule_ends_a_stage() -> None:
    outcome = train(
        Regimen(Cast(policy=tiny_policy()), [reinforce(stop=lambda metrics: metrics["reward/total"] > -1e9)])
    )
    assert outcome.counters.iterations == 1


def test_reference_is_refreshed_at_the_start_of_every_stage() -> None:
    policy = tiny_policy()
    cast = Cast(policy=policy)
    objective = ClippedSurrogateObjective(clip=0.01) + Knob("kl_weight", 0.5) * ReferenceKL("exact")
    events: list[Event] = []
    stages = [
        Stage(
            name,
            [prompts()],
            2,
            32,
            reward=bright,
            credit=GroupRelativeAdvantage(),
            updates=[Update(objective, learning_rate=1e-2)],
            rules=[ReferenceRefresh(mode="copy")],
        )
        for name in ("first", "second")
    ]
    train(Regimen(cast, stages), listener=events.append)
    divergence = [event.metrics["policy/loss/kl"] for event in events if event.kind == "step"]
    assert divergence[0] == divergence[2] == 0
    assert divergence[1] > 0
    assert divergence[3] > 0


def test_listener_that_interrupts_leaves_a_run_that_resumes(tmp_path: Path) -> None:
    def run(out: Path, stop_at: int | None, resume: bool) -> None:
        def listen(event: Event) -> None:
            if event.kind == "step" and event.step == stop_at:
                raise Interrupted

        train(
            Regimen(Cast(policy=tiny_policy()), [reinforce(steps=6)]),
            out=out,
            resume=resume,
            listener=listen,
            checkpoint_every=2,
        )

    run(tmp_path / "whole", None, False)
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", 5, False)
    run(tmp_path / "cut", None, True)
    whole, cut = (
        [{k: v for k, v in r.items() if k != "time"} for r in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "cut")
    )
    assert whole == cut


def test_the_time_of_prepare_steps_is_counted() -> None:
    outcome = train(
        Regimen(Cast(policy=tiny_policy()), [reinforce(steps=0, prepare=[lambda *_: time.sleep(0.2)])]),
        listener=lambda event: None,
    )
    assert 0.2 <= outcome.counters.seconds < 5
