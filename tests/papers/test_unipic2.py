"""UniPic 2.0: its smoke test, what its arms spend, who judges and who evaluates, and what its claims compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from regimen import papers
from regimen.cast import ReferenceRefresh
from regimen.credit import GroupRelativeAdvantage
from regimen.lab.experiment import ArmResult
from regimen.lab.jobs import run_folder
from regimen.lab.results import read_results
from regimen.lab.runner import Plan, run_experiment
from regimen.lab.statistics import judge_claim, verdict
from regimen.papers import unipic2
from regimen.papers.unipic2 import PAPER, WORLDS, Parts, Settings, World
from regimen.runs import read_metrics
from regimen.update import Epochs

REINFORCED = ("edit_only", "generate_only", "mixed", "staged", "reversed")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of scale quick, all of it."""
    out = tmp_path_factory.mktemp("unipic2") / "quick"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGIMEN_CACHE", str(out.parent / "cache"))  # Nothing that an earlier run has kept.
        run_experiment(Plan(partial(papers.load, "unipic2"), out, scale="quick"))
    return out


def own(out: Path, what: str) -> dict[str, int]:
    """What each arm spent itself."""
    return {arm: seeds["0"]["own"][what] for arm, seeds in read_results(out)["arms"].items()}


# The smoke test


def test_every_arm_but_the_extended_one_is_trained(quick: Path) -> None:
    results = read_results(quick)
    assert results["failures"] == []
    assert list(results["arms"]) == ["base", "supervised", *REINFORCED]
    assert all(list(seeds) == ["0"] for seeds in results["arms"].values())
    assert [claim["name"] for claim in results["claims"]] == [claim.name for claim in PAPER.claims]
    assert results["left_out"] == []


def test_every_arm_is_evaluated_on_both_tasks_after_every_stage(quick: Path) -> None:
    arms = {name: seeds["0"] for name, seeds in read_results(quick)["arms"].items()}
    stages = {name: entry["stages"] for name, entry in arms.items()}
    assert stages["staged"] == ["edit", "generate"]
    assert stages["reversed"] == ["generate", "edit"]
    assert stages["mixed"] == ["mixed"]
    for name, entry in arms.items():
        assert entry["evaluations"][0]["stage"] == "start"
        assert {record["stage"] for record in entry["evaluations"]} == {"start", *stages[name]}
        for record in entry["evaluations"]:
            assert record["metrics"].keys() >= set(PAPER.metrics)


def test_every_arm_starts_from_the_base_of_its_seed(quick: Path) -> None:
    arms = {name: seeds["0"] for name, seeds in read_results(quick)["arms"].items()}
    for name in ("supervised", *REINFORCED):
        assert arms[name]["evaluations"][0]["metrics"] == arms["base"]["final"]


def test_arms_that_are_compared_spend_the_same(quick: Path) -> None:
    scale = PAPER.scales["quick"]
    samples, rows, steps = (own(quick, what) for what in ("samples", "rows", "gradient_steps"))
    for arm in REINFORCED:
        assert samples[arm] == 2 * scale.stage_steps * scale.batch_size
        assert rows[arm] == 0
        assert steps[arm] == 4 * scale.stage_steps
    assert steps["supervised"] == 4 * scale.stage_steps
    assert samples["supervised"] == samples["base"] == 0
    assert rows["supervised"] == 4 * scale.stage_steps * scale.batch_size
    assert steps["base"] == scale.pretrain_steps
    charged = {arm: seeds["0"] for arm, seeds in read_results(quick)["arms"].items()}
    for what in ("samples", "gradient_steps"):
        assert charged["staged"][what] == charged["mixed"][what] == own(quick, what)["mixed"] + own(quick, what)["base"]


def scored(out: Path, arm: str) -> list[set[str]]:
    """By iteration, which task was scored by which component."""
    records = read_metrics(run_folder(out, arm, 0) / "metrics.jsonl")
    steps = [record["metrics"] for record in records if record["kind"] == "step"]
    return [{name for name, count in step.items() if name.endswith("/scored") and count} for step in steps]


def test_stages_take_their_task_and_each_task_its_own_judge(quick: Path) -> None:
    edit, generate = {"count/edit/follows_edit/scored"}, {"count/generate/follows_prompt/scored"}
    assert scored(quick, "staged") == [edit] * 5 + [generate] * 5
    assert scored(quick, "reversed") == [generate] * 5 + [edit] * 5
    assert scored(quick, "mixed") == [edit, generate] * 5


def test_samples_to_look_at_are_kept(quick: Path) -> None:
    names = [path.name for path in (run_folder(quick, "staged", 0) / "samples").glob("000010-generate-*.png")]
    assert sorted(names) == ["000010-generate-edit-source_result_target.png", "000010-generate-generate-images.png"]


# Arms and settings


def test_arms_differ_in_nothing_but_their_stages() -> None:
    settings = dataclasses.replace(Settings(), stage_steps=3)
    stages = {arm: PAPER.arm(arm).build(0, settings).stages for arm in ("staged", "mixed")}
    for stage in (*stages["staged"], *stages["mixed"]):
        update = stage.updates[0]
        assert stage.batch_size == settings.batch_size
        assert (update.learning_rate, update.batches) == (settings.learning_rate, stages["mixed"][0].updates[0].batches)
        assert stage.credit == stages["mixed"][0].credit
    assert sum(stage.steps for stage in stages["staged"]) == sum(stage.steps for stage in stages["mixed"]) == 6
    weights = [PAPER.arm(arm).build(0, settings).cast["policy"].state_dict() for arm in ("staged", "mixed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_judge_that_trains_is_not_the_evaluator() -> None:
    parts = Parts(0, Settings())
    judges = [leaf.classifier for leaf in parts.reward.leaves() if hasattr(leaf, "classifier")]
    assert judges == [parts.world.judge]
    assert parts.world.evaluator is not parts.world.judge
    assert type(parts.world.evaluator.estimator) is not type(parts.world.judge.estimator)
    full = PAPER.scales["full"]
    assert len({full.judge, full.evaluator, full.edit_judge}) == 3


def test_the_scenes_scale_fits_together_and_is_judged_by_its_detector() -> None:
    settings = dataclasses.replace(PAPER.scales["scenes"], device="cpu", size="small", batch_size=8, group_size=4)
    parts = Parts(0, settings)
    regimen = parts.regimen(parts.reinforce("edit", "edit"), parts.reinforce("both", "edit", "generate"))
    assert [task.name for task in regimen.evaluated()] == ["generate", "edit"]
    detectors = [leaf.detector for leaf in parts.reward.leaves() if hasattr(leaf, "detector")]
    assert detectors == [parts.world.judge.detect]


def test_every_world_is_named_in_the_settings() -> None:
    assert set(get_args(World)) == set(WORLDS)
    assert {scale.world for scale in PAPER.scales.values()} == set(WORLDS)


def test_scales_differ_where_they_say() -> None:
    quick, default, full = (PAPER.scales[name] for name in ("quick", "default", "full"))
    assert default == Settings()
    assert dataclasses.replace(quick, pretrain_steps=1500, stage_steps=60, evaluate_every=20) == default
    assert full.pretrain_steps == 0  # The model is pre-trained.
    assert PAPER.requires["full"] == "diffusers"


def test_reinforcement_has_the_numbers_of_the_public_trainer() -> None:
    """Advantages by the batch's population deviation, two steps per rollout, the last denoising step left out."""
    parts = Parts(0, Settings())
    stage = parts.reinforce("edit", "edit")
    assert stage.credit == GroupRelativeAdvantage(std="batch", ddof=0, eps=1e-4, clip=5.0)
    (update,) = stage.updates
    assert (update.batches, update.learning_rate, update.max_grad_norm) == (Epochs(1, 2), 3e-4, 1.0)
    assert (update.optimizer, update.options) == (torch.optim.AdamW, {"weight_decay": 1e-4})
    surrogate, divergence = update.objective.leaves()
    assert (surrogate.clip, surrogate.clip_high, surrogate.aggregate) == (1e-3, None, "sequence")
    assert (divergence.estimator, divergence.reference, stage.rules) == (
        "flow_grpo", "reference", [ReferenceRefresh(mode="copy")],
    )  # fmt: skip
    knobs = {knob.name: knob for knob in parts.cast["policy"].knobs}
    found = {name: (knob.default, knob.evaluation) for name, knob in knobs.items()}
    assert found == {"sampling_steps": (8, 20), "noise_level": (0.7, 0.0), "guidance": (1.0, None)}
    assert (stage.steps, stage.batch_size, parts.edit.group_size, Settings().wrong_captions) == (60, 256, 16, 0.4)
    full = PAPER.scales["full"]
    assert (full.clip, full.kl_weight, full.learning_rate, full.group_size) == (1e-4, 0.04, 3e-4, 24)


# Claims


def arm(*stages: tuple[str, Mapping[str, float]]) -> ArmResult:
    """A made-up result with an evaluation per stage."""
    records = [{"stage": stage, "step": 1, "metrics": metrics} for stage, metrics in stages]
    return ArmResult(records, samples=0, rows=0, gradient_steps=0, seconds=0.0)


def metrics(generation: float, editing: float, fidelity: float = 0.5) -> dict[str, float]:
    return {"generate/accuracy": generation, "edit/success": editing, "edit/fidelity": fidelity}


def seed(generation: float = 0.9, editing: float = 0.82, after_edit: float = 0.9) -> dict[str, ArmResult]:
    """A seed whose base is at 0.4 and 0.5."""
    start = ("start", metrics(0.4, 0.5))
    others = {name: arm(start, (name, metrics(0.8, 0.7))) for name in ("mixed", "reversed", "supervised")}
    ends = ("edit", metrics(0.45, after_edit, 0.9)), ("generate", metrics(generation, editing, 0.6))
    return {"staged": arm(start, *ends), **others}


def claim(name: str) -> Any:
    return next(claim for claim in PAPER.claims if claim.name == name)


def test_both_rise_is_the_smaller_gain_of_the_two_tasks() -> None:
    assert claim("both_rise").value(seed()) == pytest.approx(0.32)
    assert claim("both_rise").value(seed(generation=0.45)) == pytest.approx(0.05)
    assert claim("both_rise").value(seed(editing=0.4)) == pytest.approx(-0.1)


def test_gain_kept_is_the_share_of_the_first_stages_gain_at_the_end() -> None:
    assert claim("gain_kept").value(seed()) == pytest.approx(0.8)
    assert claim("gain_kept").value(seed(editing=0.98)) == pytest.approx(1.2)
    assert claim("gain_kept").value(seed(editing=0.5)) == pytest.approx(0.0)
    assert claim("fidelity_kept").value(seed()) == pytest.approx(0.25)


@pytest.mark.parametrize("after_edit", [0.5, 0.4])
def test_a_gain_that_there_is_not_cannot_be_kept(after_edit: float) -> None:
    judged = judge_claim(claim("gain_kept"), [0], {0: seed(editing=after_edit, after_edit=after_edit)})
    assert judged.verdict == "unclear"
    assert "so there is nothing to keep" in judged.missing[0]


def test_comparisons_are_staged_minus_the_other_arm() -> None:
    for other in ("mixed", "reversed", "supervised"):
        assert claim(f"staged_vs_{other}_generate").value(seed()) == pytest.approx(0.1)
        assert claim(f"staged_vs_{other}_edit").value(seed()) == pytest.approx(0.12)


def test_the_verdict_needs_both_judged_claims() -> None:
    assert [claim.name for claim in PAPER.claims if claim.judged] == ["both_rise", "gain_kept"]
    assert PAPER.method == "staged"

    def judged(**numbers: float) -> str:
        results = {i: seed(**{name: value + 0.001 * i for name, value in numbers.items()}) for i in range(5)}
        return verdict([judge_claim(claim, range(5), results) for claim in PAPER.claims])

    assert judged(generation=0.9, editing=0.9) == "holds"
    assert judged(generation=0.3, editing=0.9) == "does not hold"
    assert judged(generation=0.9, editing=0.6) == "does not hold"


def test_kept_and_smaller_gain_read_the_end_of_each_stage_not_what_lies_between() -> None:
    between = [("edit", metrics(0.0, 0.0)), ("edit", metrics(0.45, 0.9)), ("generate", metrics(0.0, 0.0))]
    run = {"staged": arm(("start", metrics(0.4, 0.5)), *between, ("generate", metrics(0.9, 0.82)))}
    assert unipic2.kept_share("edit/success", run) == pytest.approx(0.8)
    assert unipic2.smaller_gain(run) == pytest.approx(0.32)
