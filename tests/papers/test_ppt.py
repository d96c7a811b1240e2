"""PPT: the smoke test, what each stage trains and freezes, the teachers, exact resume, and recorded tracks."""

from __future__ import annotations

import dataclasses
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from regimen import papers
from regimen.iteration import Counters, StageRun
from regimen.knobs import Knobs
from regimen.lab.experiment import ArmResult
from regimen.lab.jobs import run_folder
from regimen.lab.results import read_results
from regimen.lab.runner import Plan, run_experiment
from regimen.loop import Interrupted, Outcome, train
from regimen.objectives import Objective
from regimen.objectives.base import Batch
from regimen.papers.ppt import PAPER, Settings, Stages, gain, no_distillation, no_short, over_line, ppt, scratch
from regimen.progress import Event
from regimen.regimen import Regimen, Stage
from regimen.rollout import Rollout
from regimen.runs import read_metrics
from regimen.tasks.worlds.tracks import EXTRA, FOLDS

QUICK: Settings = PAPER.scales["quick"]
TINY = dataclasses.replace(
    QUICK, train=60, test=20, batch_size=16, short_steps=3, warm_steps=3, long_steps=3, way_steps=3, evaluate_every=100
)
ARMS = ["scratch", "no_distillation", "ppt"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of scale quick."""
    out = tmp_path_factory.mktemp("ppt") / "quick"
    run_experiment(Plan(partial(papers.load, PAPER.slug), out, scale="quick"))
    return out


def weights(regimen: Regimen, member: str) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in regimen.cast[member].state_dict().items()}


def moved(before: dict[str, Tensor], regimen: Regimen, member: str) -> set[str]:
    return {name for name, value in regimen.cast[member].state_dict().items() if not torch.equal(before[name], value)}


def run_stage(regimen: Regimen, stage: Stage) -> None:
    run, counters = StageRun(regimen, stage), Counters()
    run.start(fresh=True)
    rng = torch.Generator().manual_seed(0)
    for step in range(stage.steps):
        run.iterate(step, counters, rng)


def futures(stages: Stages, size: int = 8) -> Rollout:
    knobs = Knobs.of(stages.cast["policy"])
    return stages.world.futures().collect(stages.cast, knobs, torch.Generator().manual_seed(0), size)


def loss_of(objective: Objective, stages: Stages, rollout: Rollout, **knobs: float) -> Tensor:
    return objective(Batch(rollout, stages.cast, Knobs.of(objective, **knobs), torch.Generator())).total


# The smoke test


def test_every_arm_is_trained_and_every_claim_computed(quick: Path) -> None:
    results = read_results(quick)
    assert results["failures"] == []
    assert list(results["arms"]) == ARMS
    assert [entry["name"] for entry in results["left_out"]] == ["short_ade"]
    assert all(claim["missing"] == {} for claim in results["claims"])


def test_every_arm_sees_as_many_tracks(quick: Path) -> None:
    spent = read_results(quick)["arms"]
    assert {spent[arm]["0"]["rows"] for arm in ARMS} == {50 * 128}
    assert {spent[arm]["0"]["samples"] for arm in ARMS} == {0}


def test_stages_follow_one_another(quick: Path) -> None:
    records = read_metrics(run_folder(quick, "ppt", 0) / "metrics.jsonl")
    names = [record["stage"] for record in records if record["kind"] == "step"]
    assert names == ["short"] * 10 + ["warm"] * 10 + ["long"] * 10 + ["whole"] * 20
    losses = [record["metrics"] for record in records if record["kind"] == "step" and record["stage"] == "whole"]
    assert all(metrics["trajectory+short_term_projection/loss/distill_short"] > 0 for metrics in losses)
    assert losses[-1]["knob/weight/distill_short"] == 5


def test_claims_are_differences_in_metres() -> None:
    def result(**metrics: float) -> ArmResult:
        evaluations = [{"stage": "whole", "metrics": {f"forecasts/{name}": value for name, value in metrics.items()}}]
        return ArmResult(evaluations, 0, 0, 0, 0.0)

    seed = {"ppt": result(ade=0.5, velocity_ade=1.1), "scratch": result(ade=0.75)}
    assert gain("ade", "scratch", seed) == 0.25
    assert over_line("ade", "velocity", seed) == pytest.approx(0.6)
    assert [claim.name for claim in PAPER.claims if claim.judged] == ["ade", "fde"]
    assert PAPER.method == "ppt"


# Stages


def test_the_default_scale_gives_every_arm_as_many_updates() -> None:
    totals = {
        sum(stage.steps for stage in build(0, TINY).stages) for build in (scratch, ppt, no_short, no_distillation)
    }
    assert totals == {12}
    default = PAPER.scales["default"]
    assert (default.short_steps, default.warm_steps, default.long_steps, default.way_steps) == (400, 150, 300, 500)
    assert (default.count, default.diversity, default.scale, default.batch_size) == (6, 1.0, 4.0, 128)
    assert (default.destination, default.distill_short, default.distill_long) == (1.0, 5.0, 0.5)
    for stage in ppt(0, TINY).stages:
        assert all((update.optimizer, update.max_grad_norm) == (torch.optim.Adam, 1.0) for update in stage.updates)


def test_every_arm_begins_with_the_same_networks() -> None:
    starts = [weights(build(3, TINY), "policy") for build in (scratch, ppt, no_short)]
    assert all(torch.equal(starts[0][name], start[name]) for start in starts for name in starts[0])
    other = weights(scratch(4, TINY), "policy")
    assert not torch.equal(starts[0]["destinations.head.query"], other["destinations.head.query"])


def test_the_warm_up_changes_nothing_but_the_head() -> None:
    regimen = ppt(0, TINY)
    policy, short = weights(regimen, "policy"), weights(regimen, "next_position")
    run_stage(regimen, regimen.stages[1])
    changed = moved(policy, regimen, "policy")
    assert changed
    assert all(name.startswith("destinations.head.") for name in changed)
    assert moved(short, regimen, "next_position") == set()


def test_the_first_stage_trains_the_transformer_that_destinations_go_on_with() -> None:
    regimen = ppt(0, TINY)
    policy = weights(regimen, "policy")
    run_stage(regimen, regimen.stages[0])
    changed = moved(policy, regimen, "policy")
    assert "destinations.transformer.embed.weight" in changed
    assert all(name.startswith("destinations.transformer.") for name in changed)


def test_teachers_are_what_the_policy_was_and_never_change() -> None:
    regimen = ppt(0, TINY)
    ends: dict[str, Any] = {}
    for stage in regimen.stages[:3]:
        run_stage(regimen, stage)
        ends[stage.name] = weights(regimen, "next_position"), weights(regimen, "destinations")
    run_stage(regimen, regimen.stages[3])
    for teacher, expected in (("short_term", ends["short"][0]), ("long_term", ends["long"][1])):
        assert moved(expected, regimen, teacher) == set()
        assert not regimen.cast[teacher].training
        assert not any(p.requires_grad for p in regimen.cast[teacher].parameters())
    assert moved(ends["long"][1], regimen, "destinations")


def test_the_last_stage_begins_where_the_third_ended() -> None:
    regimen = ppt(0, TINY)
    run = StageRun(regimen, regimen.stages[3])
    regimen.cast.snapshot("next_position", "short_term")
    run.start(fresh=True)
    policy = regimen.cast["policy"]
    mine, theirs = policy.trajectory.transformer.state_dict(), policy.destinations.transformer.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert torch.equal(policy.trajectory.prompts[0, 4], policy.destinations.head.query[0, 0])


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_without_weight_a_teacher_has_no_influence(weight: float) -> None:
    found = []
    for seed in (0, 1):
        stages = Stages(0, TINY)
        other = Stages(seed, TINY)
        stages.cast._members.update(
            short_term=other.cast["next_position"].requires_grad_(False),
            long_term=other.cast["destinations"].requires_grad_(False),
        )
        objectives = [update.objective for update in stages.whole(weight, weight).updates]
        found.append([float(loss_of(each, stages, futures(stages)).detach()) for each in objectives])
    assert (found[0] == found[1]) == (weight == 0)


def test_the_losses_of_the_first_stages_are_the_paper_s() -> None:
    """Every next position of the whole track; the nearest destination, and how near all are to each other."""
    stages = Stages(0, TINY)
    rollout, cast = futures(stages), stages.cast
    past, truth = rollout.context["past"], rollout.actions
    track = torch.cat([past, truth], 1)
    tracks = stages.world.positions().collect(cast, {}, torch.Generator().manual_seed(0), 8)
    assert torch.equal(torch.cat([tracks.context["past"], tracks.actions], 1), track)
    following = cast["next_position"].network(track[:, :19])[0]
    (next_position,) = stages.short_term().updates
    short = loss_of(next_position.objective, stages, tracks)
    assert torch.allclose(short, (following - track[:, 1:]).square().mean(), atol=1e-6)
    ends = cast["policy"].destinations(past)[0]
    recon = (ends - truth[:, -1:]).norm(dim=2).amin(1).mean()
    first, second = torch.triu_indices(ends.shape[1], ends.shape[1], 1)
    joint = (-(ends[:, first] - ends[:, second]).square().sum(2) / 4).exp().mean()
    for stage in (stages.warm_up(), stages.long_term(1)):
        assert torch.allclose(loss_of(stage.updates[0].objective, stages, rollout), recon + joint, atol=1e-5)


def test_the_losses_of_the_last_stage_are_the_paper_s() -> None:
    """Of the networks' own outputs: distances, means over steps and samples, and teachers on the true trajectory."""
    stages = Stages(0, TINY)
    short, long = Stages(5, TINY).cast["next_position"], Stages(5, TINY).cast["destinations"]
    stages.cast._members.update(short_term=short.requires_grad_(False), long_term=long.requires_grad_(False))
    rollout, cast = futures(stages), stages.cast
    past, truth = rollout.context["past"], rollout.actions
    ends, state = cast["policy"].destinations(past)
    apart = (ends - truth[:, -1:]).norm(dim=2)
    nearest = ends[torch.arange(8), apart.argmin(1)]
    way, states = cast["policy"].trajectory(past, nearest)
    # Slots 8 to 19 of the pedestrian's whole track.
    taught = short.network(torch.cat([past, truth], 1)[:, :19])[1][:, 7:19]
    told = long.network(past)[1]
    on_the_way = (way - truth).norm(dim=2).mean()
    on_the_way = on_the_way + 5 * (cast["short_term_projection"](states) - taught).square().mean()
    at_the_end = apart.amin(1).mean() + 0.5 * (cast["long_term_projection"](state) - told).square().mean()
    found = [loss_of(update.objective, stages, rollout) for update in stages.whole(5.0, 0.5).updates]
    assert torch.allclose(torch.stack(found), torch.stack([on_the_way, at_the_end]), atol=1e-5)


def test_the_way_s_loss_does_not_move_the_destinations() -> None:
    ends = []
    for updates in (slice(0, 2), slice(1, 2)):
        regimen = ppt(0, TINY)
        regimen.cast.snapshot("next_position", "short_term")
        stage = regimen.stages[3]
        run_stage(regimen, dataclasses.replace(stage, updates=stage.updates[updates]))
        ends.append(weights(regimen, "destinations"))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_the_baseline_has_the_same_terms_and_no_teacher() -> None:
    ((update,),) = [stage.updates for stage in scratch(0, TINY).stages]
    assert [leaf.name for leaf in update.objective.leaves()] == ["way", "destination", "diversity"]
    assert update.members == ("policy",)
    leaves = [
        leaf.name for stage in ppt(0, TINY).stages for update in stage.updates for leaf in update.objective.leaves()
    ]
    assert leaves == [
        *("regression", "destination", "diversity", "destination", "diversity"),
        *("way", "distill_short", "destination", "distill_long"),
    ]


def test_four_stages_learn_to_forecast_where_going_straight_on_fails() -> None:
    settings = dataclasses.replace(
        QUICK, train=300, test=100, batch_size=32, short_steps=10, warm_steps=30, long_steps=60, way_steps=60
    )
    outcome = train(ppt(100, settings), seed=100)
    first, final = (outcome.evaluations[at]["metrics"] for at in (0, -1))
    assert final["forecasts/ade"] < 0.5 * first["forecasts/ade"]
    assert final["forecasts/fde"] < 0.8 * final["forecasts/velocity_fde"]
    assert final["forecasts/fde"] < final["forecasts/central_fde"]


@pytest.mark.parametrize("stop", [5, 10])
def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path: Path, stop: int) -> None:
    def trained(out: Path, **options: Any) -> Outcome:
        return train(ppt(0, TINY), seed=0, out=out, **options)

    def listener(event: Event) -> None:
        seen.append(event.kind)
        if seen.count("step") == stop and event.kind == "step":
            signal.raise_signal(signal.SIGTERM)

    seen: list[str] = []
    whole = trained(tmp_path / "whole")
    with pytest.raises(Interrupted):
        trained(tmp_path / "halved", listener=listener)
    halved = trained(tmp_path / "halved", resume=True)
    assert halved.evaluations[-1]["metrics"] == whole.evaluations[-1]["metrics"]
    for member in ("policy", "short_term", "long_term"):
        mine, theirs = (outcome.cast[member].state_dict() for outcome in (whole, halved))
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


# Recordings


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """Files like those of ETH and UCY, of a few walkers each."""
    rng = torch.Generator().manual_seed(0)
    for name in [*(name for names in FOLDS.values() for name in names), *EXTRA]:
        start, step = 8 * torch.rand(3, 2, generator=rng), torch.randn(3, 2, generator=rng) / 2
        lines = [
            "\t".join(
                f"{number:.4f}" for number in (10.0 * frame, walker + 1.0, *(start + frame * step)[walker].tolist())
            )
            for frame in range(24)
            for walker in range(3)
        ]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    return tmp_path


def real(folder: Path, **changes: Any) -> Settings:
    tiny: dict[str, Any] = dict(width=8, hidden=(8,), batch_size=8, evaluate_every=100, device="cpu")
    steps = dict(short_steps=2, warm_steps=2, long_steps=2, way_steps=2)
    return dataclasses.replace(PAPER.scales["full"], data=str(folder), **tiny, **steps, **changes)


def test_the_full_scale_learns_from_recordings_and_each_seed_is_tested_on_one_fold(recordings: Path) -> None:
    for arm in PAPER.arms:
        outcome = train(arm.build(1, real(recordings)), seed=1)
        assert outcome.counters.rows == 8 * 8
    tested = [Stages(seed, real(recordings)).world.test for seed in range(6)]
    assert [len(test) for test in tested] == [15, 15, 30, 15, 15, 15]
    assert torch.equal(tested[0], tested[5])
    assert not torch.equal(tested[0], tested[1])


def test_the_full_scale_has_the_networks_of_the_paper() -> None:
    full = PAPER.scales["full"]
    assert (full.width, full.layers, full.heads, full.count, full.hidden) == (128, 3, 4, 20, (512, 512, 512))
    policy = Stages(0, dataclasses.replace(full, world="pedestrians", train=4, test=4, device="cpu")).cast["policy"]
    assert policy.forecast(torch.zeros(2, 8, 2)).shape == (2, 20, 12, 2)


def test_without_recordings_the_full_scale_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"lacks biwi_eth.txt, .*name a folder that holds them .--set data=FOLD"
    ):
        ppt(0, dataclasses.replace(PAPER.scales["full"], data=str(tmp_path), device="cpu"))
