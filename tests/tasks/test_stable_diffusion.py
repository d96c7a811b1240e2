"""Stable Diffusion as a world, and the paper's full scale, on tiny models loaded from disk by the real code."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensordict import TensorDict
from torch import Tensor

import tiny_models
from regimen import Cast, Regimen, Stage, Update
from regimen.functions.geneval import Detections
from regimen.iteration import Counters, StageRun
from regimen.models.detectors import DetectorFromTransformers
from regimen.objectives import FlowMatchingObjective
from regimen.papers import unipic2
from regimen.policies import FlowPolicy
from regimen.rewards.geneval import GenEvalReward
from regimen.rollout import Rollout
from regimen.tasks.worlds.stable_diffusion import StableDiffusionWorld

pytest.importorskip("diffusers")
pytest.importorskip("peft")

SIZE, HELD_OUT = 16, 2
KNOBS = {"sampling_steps": 2.0, "noise_level": 0.7, "guidance": 4.5}
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Files:
    """What a user of the world has on disk."""

    folder: Path
    model: Path
    prompts: Path
    edits: Path
    pairs: Path

    def world(self, **options: Any) -> StableDiffusionWorld:
        settings = {"resolution": SIZE, "held_out": HELD_OUT, "rank": 2, "alpha": 4, "evaluation_steps": 2, **options}
        settings.setdefault("labels", tiny_models.CLASSES)
        return StableDiffusionWorld(self.model, self.prompts, self.edits, **settings)


def files(folder: Path, factor: int = 4, count: int = 6, objects: int = 1) -> Files:
    tiny_models.sd3_pipeline(factor=factor).save_pretrained(folder / "model")
    (folder / "images").mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (20, 20), colour).save(folder / "images" / f"{name}.png")
    names = list(COLOURS)
    prompts = [
        # A text with a line separator of Unicode's.
        {"prompt": f"{n}\u2028 a {c}", "include": [{"class": c, "count": objects}], "tag": "counting"}
        for n, c in zip(range(count), tiny_models.CLASSES * count, strict=False)
    ]
    edits = []
    for n in range(count):
        source, target = names[n % 4], names[(n + 1) % 4]
        edit = {"source": f"images/{source}.png", "instruction": f"make it {target}", "target": f"images/{target}.png"}
        edits.append(edit)
    del edits[-1]["target"]
    pairs = [{"image": f"images/{name}.png", "caption": f"all {name}"} for name in names]
    pairs += [{"image": "images/red.png", "caption": "make it red", "source": "images/blue.png"}]
    return Files(
        folder, folder / "model", write(folder / "prompts.jsonl", prompts), write(folder / "edits.jsonl", edits),
        write(folder / "pairs.jsonl", pairs),
    )  # fmt: skip


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Files:
    torch.set_num_threads(1)
    return files(tmp_path_factory.mktemp("disk"))


@pytest.fixture(scope="module")
def world(disk: Files) -> StableDiffusionWorld:
    return disk.world(pairs=disk.pairs)


class Painter:
    """A policy that answers contexts with what a function paints."""

    def __init__(self, paint: Callable[[TensorDict], Tensor]) -> None:
        self.paint = paint

    def sample(self, asked: TensorDict, knobs: Mapping[str, float], rng: torch.Generator) -> Rollout:
        count = len(asked)
        return Rollout.create(
            task="policy", group=torch.arange(count), mask=torch.ones(count, 1, dtype=torch.bool), context=asked,
            columns={"image": self.paint(asked)},
        )  # fmt: skip


def rgb(name: str) -> Tensor:
    return torch.tensor(COLOURS[name])[:, None, None].expand(3, SIZE, SIZE) / 255


def weights(policy: FlowPolicy) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in policy.named_parameters()}


def moved(policy: FlowPolicy, before: dict[str, Tensor]) -> set[str]:
    return {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}


# Files


def test_the_last_lines_are_held_out(world: StableDiffusionWorld) -> None:
    def said(rows: TensorDict) -> list[str]:
        return [world.texts[i] for i in rows["prompt"].tolist()]

    assert said(world.captions) == ["0\u2028 a cat", "1\u2028 a dog", "2\u2028 a bench", "3\u2028 a cat"]
    assert said(world.held_out_captions) == ["4\u2028 a dog", "5\u2028 a bench"]
    assert said(world.edits) == ["make it green", "make it blue", "make it white", "make it red"]
    assert said(world.held_out_edits) == ["make it green", "make it blue"]
    assert world.captions["requirements"][:, 0, 0].tolist() == [0, 1, 2, 0]
    assert world.captions["requirements"][:, 0, 1].tolist() == [1] * 4
    assert not world.edits["requirements"].any()
    assert world.captions["source"].tolist() == [-1] * 4
    assert (world.edits["source"] >= 0).all()
    assert world.held_out_edits["target"].tolist()[1] == -1
    assert len(world.pairs) == 5  # type: ignore[arg-type]


def test_pictures_are_found_beside_the_file(world: StableDiffusionWorld) -> None:
    task = world.editing(1)
    rollout = Painter(lambda asked: torch.zeros(len(asked), 3, SIZE, SIZE)).sample(task.rows[:2], {}, torch.Generator())
    torch.testing.assert_close(world.sources(rollout), torch.stack([rgb("red"), rgb("green")]))
    torch.testing.assert_close(world.targets(rollout), torch.stack([rgb("green"), rgb("blue")]))
    assert world.instructions(rollout) == ["make it green", "make it blue"]
    none = Painter(lambda asked: torch.zeros(len(asked), 3, SIZE, SIZE)).sample(world.captions, {}, torch.Generator())
    assert not world.sources(none).any()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("prompts", '{"prompt": "a", "include": [{"class": "cat"}]}\n{"prompt"', r"prompts\.jsonl, line 2: not JSON"),
        (
            "prompts",
            '{"prompt": "a", "include": [{"class": "cat"}]}',
            r"has 1 lines, of which held_out=2 .* at least 3",
        ),
        (
            "prompts",
            '{"prompt": "a"}\n' * 3,
            r"prompts\.jsonl, record 0: no 'include'; it has prompt, expected prompt, ",
        ),
        (
            "prompts",
            '{"prompt": "a", "include": [{"class": "cow"}]}\n' * 3,
            "record 0, class 'cow': class 'cow' is none",
        ),
        ("edits", '{"source": "a.png"}\n' * 3, r"edits\.jsonl, record 0: no 'instruction'; it has source"),
        ("edits", "[]\n" * 3, r"edits\.jsonl, line 1: a list, expected an object"),
        ("pairs", '{"image": "a.png"}', r"pairs\.jsonl, record 0: no 'caption'"),
    ],
)
def test_files_that_lack_something_are_named(name: str, text: str, message: str, disk: Files, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        replace(disk, **{name: path}).world(pairs=path if name == "pairs" else None)


def detector(names: tuple[str, ...]) -> Any:
    model = tiny_models.yolos()
    model.config.id2label = dict(enumerate(names))
    return DetectorFromTransformers(model, size=(32, 32))


def test_judge_and_evaluator_must_number_their_classes_alike(disk: Files) -> None:
    one, other = detector(("cat", "dog", "bench")), detector(("bench", "dog", "cat"))
    assert disk.world(evaluator=one, judge=one, labels=None).captions["requirements"][:, 0, 0].tolist() == [0, 1, 2, 0]
    with pytest.raises(ValueError, match=r"different numbers for a class .* prompt 0 \('0\u2028 a cat'\); expected"):
        disk.world(evaluator=one, judge=other, labels=None)
    # What nobody asks for may have any number.
    disk.world(evaluator=detector(("cat", "dog", "bench", "a", "b")), judge=one, labels=None)
    with pytest.raises(ValueError, match="class 'cat' is none of"):
        disk.world(labels=None)


def test_classes_are_called_as_geneval_calls_them(disk: Files, tmp_path: Path) -> None:
    record = {"prompt": "a tv remote", "include": [{"class": "tv remote", "count": 1}]}
    prompts = write(tmp_path / "prompts.jsonl", [record] * 3)
    world = replace(disk, prompts=prompts).world(evaluator=detector(("mouse", "remote", "cat")), labels=None)
    assert world.captions["requirements"][0, 0, 0] == 1


# The policy


def test_only_adapters_are_trained_and_saved(world: StableDiffusionWorld) -> None:
    policy = world.policy(0)
    trainable = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    assert set(policy.state_dict()) == trainable
    assert policy.shape == (4, SIZE // 4, SIZE // 4)
    assert policy.shift == 3.0
    same, other = world.policy(0).state_dict(), world.policy(1).state_dict()
    assert all(torch.equal(same[key], value) for key, value in policy.state_dict().items())
    assert any(not torch.equal(other[key], value) for key, value in policy.state_dict().items())


def test_samples_are_pictures_and_their_scores_repeat(world: StableDiffusionWorld) -> None:
    policy, rng = world.policy(0), torch.Generator().manual_seed(0)
    cast = {"policy": policy}
    parts = [task.collect(cast, KNOBS, rng, 4) for task in (world.generation(2), world.editing(2))]
    both = Rollout.cat(parts)
    assert both["image"].shape == (8, 3, SIZE, SIZE)
    assert ((both["image"] >= 0) & (both["image"] <= 1)).all()
    assert both.task_names == ("generate", "edit")
    with torch.no_grad():
        found = policy.distribution(both).logprob
    torch.testing.assert_close(found[both.loss_mask], both.logprobs[both.loss_mask], atol=1e-4, rtol=1e-4)


def test_the_prompt_and_the_source_matter(world: StableDiffusionWorld) -> None:
    policy = world.policy(0)

    def drawn(**changed: int) -> Tensor:
        rows = world.edits[:1].clone()
        for key, value in changed.items():
            rows[key] = torch.tensor([value])
        return policy.sample(rows, KNOBS, torch.Generator().manual_seed(0)).actions

    base = drawn()
    assert torch.equal(drawn(), base)
    assert not torch.equal(drawn(prompt=0), base)
    assert not torch.equal(drawn(source=-1), base)
    assert torch.equal(drawn(target=-1), base), "a policy must not see the result that is wanted"


# Supervision


@pytest.mark.parametrize("wrong", [0.0, 0.5])
def test_pairs_are_latents_with_their_texts(wrong: float, world: StableDiffusionWorld) -> None:
    task = world.supervised("pairs", wrong)
    assert world.pairs is not None
    rng = torch.Generator().manual_seed(0)
    rollout = task.collect({}, {}, rng, 500)
    latents = world.frozen.latents(world.pairs["image"].tolist(), rng.device)
    shown = (rollout["image"][:, None] - latents).abs().flatten(2).amax(2).argmin(1)
    # Two of the five pairs show one picture; its edit has a source.
    shown = torch.where(rollout.context["source"] >= 0, 4, shown)
    right = world.pairs["context", "prompt"][shown]
    share = (rollout.context["prompt"] != right).float().mean()
    # One of the five texts that may come instead is the right one: 0.5 * 4/5.
    assert float(share) == pytest.approx(0.8 * wrong, abs=0.1 if wrong else 0)


def test_supervision_changes_adapters_alone(world: StableDiffusionWorld) -> None:
    policy = world.policy(0)
    update = Update(FlowMatchingObjective(), learning_rate=1e-2)
    stage = Stage("s", [world.supervised("pairs", 0.0)], 1, 4, updates=[update])
    run = StageRun(Regimen(Cast(policy=policy), [stage]), stage)
    run.start(fresh=True)
    before = weights(policy)
    metrics = run.iterate(0, Counters(), torch.Generator().manual_seed(0))
    changed = moved(policy, before)
    assert changed
    assert all("lora_" in name for name in changed)
    assert all(torch.isfinite(torch.tensor(value)) for value in metrics.values())


def test_supervision_needs_pairs(disk: Files) -> None:
    with pytest.raises(ValueError, match=r"StableDiffusionWorld.supervised needs pairs; give the world a file"):
        disk.world().supervised("pairs", 0.0)


# Evaluation


def finder(label: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Detections]:
    """A detector that sees one object in every image, of the class that a function says."""

    def detect(images: Tensor) -> Detections:
        found = label(images)[:, None]
        box = torch.tensor([0.0, 0.0, 4.0, 4.0]).expand(len(images), 1, 4)
        return Detections(found, torch.zeros_like(found), box, torch.ones(len(images), 1))

    return detect


def test_generation_is_measured_by_the_evaluator_and_not_by_the_judge(disk: Files) -> None:
    # A picture is as bright as its class; the judge sees a dog everywhere.
    world = disk.world(
        evaluator=finder(lambda images: (images.mean((1, 2, 3)) * 10).round().long()),
        judge=finder(lambda images: torch.ones(len(images), dtype=torch.int64)),
    )

    def paint(asked: TensorDict) -> Tensor:
        wanted = asked["requirements"][:, 0, 0].float() / 10
        return wanted[:, None, None, None].expand(-1, 3, SIZE, SIZE)

    evaluation = world.generation(2).evaluate({"policy": Painter(paint)}, {}, torch.Generator())
    assert evaluation.metrics == {"accuracy": 1.0, "graded": 1.0, "judge_probability": 0.5}
    assert evaluation.samples["prompts"] == ["4\u2028 a dog", "5\u2028 a bench"]
    dark = world.generation(2).evaluate({"policy": Painter(lambda a: 0 * paint(a))}, {}, torch.Generator())
    assert dark.metrics == {"accuracy": 0.0, "graded": 0.0, "judge_probability": 0.5}
    alone = disk.world().generation(2).evaluate({"policy": Painter(paint)}, {}, torch.Generator())
    assert alone.metrics == {}


def test_edits_are_measured_against_their_targets(world: StableDiffusionWorld) -> None:
    def evaluated(paint: Callable[[TensorDict], Tensor]) -> dict[str, float]:
        evaluation = world.editing(2).evaluate({"policy": Painter(paint)}, {}, torch.Generator())
        # The second held-out edit has no target.
        assert len(evaluation.samples["source_result_target"]) == 3
        return dict(evaluation.metrics)

    exact = evaluated(lambda asked: world.frozen.images(asked["target"].tolist(), torch.device("cpu")))
    assert exact == {"success": 1.0, "fidelity": 1.0, "distance_to_target": 0.0}
    lazy = evaluated(lambda asked: world.frozen.images(asked["source"].tolist(), torch.device("cpu")))
    assert lazy["success"] == 0
    # Red against green: two of three channels differ by 1.
    assert lazy["distance_to_target"] == pytest.approx((2 / 3) ** 0.5)


def test_a_real_policy_is_evaluated(disk: Files) -> None:
    found = detector(tiny_models.CLASSES)
    world = disk.world(evaluator=found, judge=found, labels=None)
    cast = {"policy": world.policy(0)}
    knobs = {"sampling_steps": 2.0, "noise_level": 0.0, "guidance": 1.0}
    for task in (world.generation(2), world.editing(2)):
        evaluation = task.evaluate(cast, knobs, torch.Generator().manual_seed(0))
        assert all(0 <= value <= 2 for value in evaluation.metrics.values())
        assert len(evaluation.metrics) == 3


# The paper


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> unipic2.Settings:
    """The full scale's own settings, on tiny models: its resolution, its held-out lines, its KL, its LoRA."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("full")
    # 65 lines: 64 are held out. An autoencoder of factor 64 makes 8 x 8 latents of 512 x 512 pixels.
    disk = files(folder, factor=64, count=66, objects=3)
    judge, evaluator = (tiny_models.yolos(800, 100, spread=0.3, seed=seed) for seed in (3, 1))
    return replace(
        unipic2.PAPER.scales["full"],
        device="cpu", batch_size=4, group_size=2, stage_steps=1, learning_rate=1e-2, micro_batch=2,
        model=str(disk.model), prompts=str(disk.prompts), edits=str(disk.edits), pairs=str(disk.pairs),
        judge=tiny_models.save(folder / "judge", judge),
        evaluator=tiny_models.save(folder / "evaluator", evaluator),
        edit_judge=tiny_models.save(folder / "vlm", *tiny_models.llava()),
    )  # fmt: skip


def test_full_scale_of_unipic2_trains_adapters_alone(full: unipic2.Settings) -> None:
    regimen = unipic2.staged(0, full)
    policy = regimen.cast["policy"]
    assert [stage.name for stage in regimen.stages] == ["edit", "generate"]
    rng = torch.Generator().manual_seed(0)
    components = {"edit": {"edit/instruction", "edit/consistency"}, "generate": {"generate/geneval"}}
    for stage in regimen.stages:
        run = StageRun(regimen, stage)
        run.start(fresh=True)
        before = weights(policy)
        metrics = run.iterate(0, Counters(), rng)
        told = {name.removeprefix("reward/") for name in metrics if name.startswith("reward/" + stage.name)}
        assert told == components[stage.name]
        assert all(0 <= metrics[f"reward/{name}"] <= 1 for name in told)
        assert not any(name.endswith("/failed") for name in metrics)
        assert all(torch.isfinite(torch.tensor(value)) for value in metrics.values())
        assert metrics["knob/kl_weight"] == pytest.approx(0.04)
        assert metrics["reward/total_std"] > 0
        changed = moved(policy, before)
        assert changed
        assert all("lora_" in name for name in changed)


def test_full_scale_starts_from_the_model_as_it_is_and_only_supervised_arms_need_pairs(full: unipic2.Settings) -> None:
    without = replace(full, pairs=None)
    needs = [arm.name for arm in unipic2.PAPER.arms if "supervised" in arm.name]
    for arm in unipic2.PAPER.arms:
        if arm.name in needs:
            with pytest.raises(ValueError, match="supervised needs pairs"):
                arm.build(0, without)
        else:
            regimen = arm.build(0, without)
            assert (regimen.stages[0].steps == 0) == (arm.name == "base")
            assert [task.name for task in regimen.evaluated()] == ["generate", "edit"]


def test_full_scale_keeps_the_base_policy_as_its_reference(full: unipic2.Settings) -> None:
    regimen = unipic2.staged(0, full)
    stage, policy = regimen.stages[0], regimen.cast["policy"]
    StageRun(regimen, stage).start(fresh=True)
    rollout = stage.tasks[0].collect(regimen.cast, {**KNOBS}, torch.Generator().manual_seed(0), 2)
    reference = regimen.cast["reference"]
    with torch.no_grad():
        same = policy.distribution(rollout).kl(reference.distribution(rollout), "flow_grpo")
        assert same.abs().max() < 1e-10
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.5)
        apart = policy.distribution(rollout).kl(reference.distribution(rollout), "flow_grpo")
    assert apart.sum() > 1e-4
    assert all("lora_" in name for name in regimen.cast.state_dict()["members"]["policy"])


def test_full_scale_judge_is_not_its_evaluator(full: unipic2.Settings) -> None:
    world, reward = unipic2.stable_diffusion_world(0, full)
    (judge,) = [leaf.detector for leaf in reward.leaves() if isinstance(leaf, GenEvalReward)]
    assert world.judge is judge
    assert world.evaluator is not judge
    assert full.judge != full.evaluator
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(judge(images).score, world.evaluator(images).score)
