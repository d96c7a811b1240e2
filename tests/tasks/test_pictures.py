"""Pictures of a folder as a world, and OneReward's full scale, on tiny models loaded from disk by the real code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensordict import TensorDict
from torch import Tensor, nn

import tiny_models
from regimen.iteration import Counters, StageRun
from regimen.models.comparators import PastedComparator, Questions
from regimen.papers import onereward
from regimen.policies import FlowPolicy
from regimen.rollout import Rollout
from regimen.tasks.worlds.pictures import BORDERS, BOXES, CRITERIA, PicturesWorld, random_boxes

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

SIZE, HELD_OUT, CPU = 16, 2, torch.device("cpu")
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 255, 255), (0, 0, 0))


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return path


def pictures(folder: Path) -> Path:
    """Six pictures of one colour; of the second and the last it is known where something is written."""
    folder.mkdir()
    records: list[dict[str, Any]] = []
    for number, colour in enumerate(COLOURS):
        Image.new("RGB", (20, 20), colour).save(folder / f"{number}.png")
        records.append({"file_name": f"{number}.png", "text": f"colour {number}"})
    corner = Image.new("L", (20, 20))
    corner.paste(255, (0, 0, 10, 10))
    corner.save(folder / "corner.png")
    for number in (1, 5):
        records[number] |= {"words": "hello", "mask": "corner.png", "target": "0.png"}
    write(folder / "metadata.jsonl", records)
    return folder


def preferences(path: Path) -> Path:
    """The last two are held out, one of them of a fill."""
    asked = [("fill", "structure"), ("remove", "removal"), ("fill", "alignment"), ("text", "alignment")]
    asked += [("fill", "aesthetics"), ("remove", "removal")]
    records = [
        {"task": task, "criterion": criterion, "better": f"pictures/{n}.png", "worse": f"pictures/{(n + 1) % 6}.png"}
        | {"text": f"colour {n}"}
        for n, (task, criterion) in enumerate(asked)
    ]
    records[1] |= {"source": "pictures/4.png", "mask": "pictures/corner.png"}
    return write(path, records)


@dataclass(frozen=True)
class Files:
    """What a user of the world has on disk."""

    model: str
    pictures: Path
    preferences: Path
    judge: str
    evaluator: str

    def world(self, dtype: torch.dtype = torch.float32) -> PicturesWorld:
        return PicturesWorld(
            0, self.model, self.pictures, self.preferences, self.judge, self.evaluator, resolution=SIZE,
            held_out=HELD_OUT, rank=2, alpha=4, sampling_steps=2, evaluation_steps=2, dtype=dtype,
        )  # fmt: skip


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Files:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("disk")
    found = pictures(folder / "pictures")
    model = tiny_models.save(folder / "model", tiny_models.flux_fill_pipeline())
    judge = tiny_models.save(folder / "judge", *tiny_models.qwen_judge())
    return Files(model, found, preferences(folder / "preferences.jsonl"), judge, judge)


@pytest.fixture(scope="module")
def world(disk: Files) -> PicturesWorld:
    return disk.world()


def weights(members: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {f"{m}/{name}": p.detach().clone() for m in members for name, p in members[m].named_parameters()}


def rgb(number: int) -> Tensor:
    return (torch.tensor(COLOURS[number]) / 255)[:, None, None].expand(3, SIZE, SIZE)


# Files


def test_every_task_asks_about_the_pictures_that_it_can_and_the_last_are_held_out(world: PicturesWorld) -> None:
    def said(rows: TensorDict) -> list[str]:
        return [world.texts[row] for row in rows["prompt"].tolist()]

    assert world.tasks == ("fill", "extend", "remove", "text")
    captions = [f"colour {number}" for number in range(4)]
    assert [said(world.rows[task]) for task in world.tasks] == [
        captions,
        captions,
        ["remove"] * 4,
        ['the text "hello"'],
    ]
    assert {task: len(rows) for task, rows in world.held_out.items()} == dict.fromkeys(world.tasks, 2) | {"text": 1}
    assert torch.equal(world.conditioner.pictures(world.rows["text"])[0], rgb(1))
    wanted = world.frozen.images(world.rows["remove"]["target"].tolist(), CPU)
    assert torch.equal(wanted, torch.stack([rgb(0), rgb(0), rgb(2), rgb(3)]))
    itself = world.frozen.images(world.rows["extend"]["target"].tolist(), CPU)
    assert torch.equal(itself, world.conditioner.pictures(world.rows["extend"]))


def test_a_mask_is_the_file_s_or_the_task_s_own(world: PicturesWorld) -> None:
    corner = torch.zeros(1, SIZE, SIZE)
    corner[:, : SIZE // 2, : SIZE // 2] = 1
    assert torch.equal(world.conditioner.mask(world.rows["text"])[0], corner)
    assert torch.equal(world.conditioner.mask(world.rows["remove"])[1], corner)
    rows = world.rows["fill"][:1].clone()
    rows["box"] = torch.tensor([[0.25, 0.5, 0.0, 0.75]])
    assert world.conditioner.mask(rows)[0, 0].nonzero().amax(0).tolist() == [7, 11]
    assert world.conditioner.mask(rows).sum() == 4 * 12


@pytest.mark.parametrize("task", [*BOXES, "extend"])
def test_random_masks_have_the_sizes_of_their_tasks(task: str) -> None:
    top, bottom, left, right = random_boxes(task, 400, torch.Generator().manual_seed(0)).T
    high, wide = bottom - top, right - left
    assert min(top.min(), left.min()) >= 0
    assert max(bottom.max(), right.max()) <= 1
    if task == "extend":
        assert bool(((high == 1) != (wide == 1)).all())
        share = torch.minimum(high, wide)
        assert BORDERS[0] - 1e-6 <= float(share.min()) < float(share.max()) <= BORDERS[1] + 1e-6
        for side in (top == 1 - share, bottom == share, left == 1 - share, right == share):
            assert float(side.float().mean()) > 0.15
        return
    for extent, (least, greatest) in zip((high, wide), BOXES[task], strict=True):
        assert least - 1e-6 <= float(extent.min()) < float(extent.max()) <= greatest + 1e-6


def test_labelled_pairs_show_better_first_in_the_place_of_their_criterion(world: PicturesWorld) -> None:
    tasks = {task.name: task for task in world.labelled()}
    assert sorted(tasks) == ["fill", "remove", "text"]
    rollout = tasks["remove"].collect({}, {}, torch.Generator().manual_seed(0), 1)
    place = CRITERIA.names.index("removal")
    assert rollout["asked"].nonzero().tolist() == [[0, place]]
    assert float(rollout["label"][0, place]) == 1
    assert torch.equal(rollout["first"][0, place], rgb(1))
    assert torch.equal(rollout["second"][0, place], rgb(2))
    assert torch.equal(world.conditioner.pictures(rollout.context)[0], rgb(4))


def test_files_that_lack_something_are_named(disk: Files, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    write(bare / "metadata.jsonl", [{"file_name": "a.png"}] * 3)
    with pytest.raises(ValueError, match=r"metadata\.jsonl, record 0: no 'text'; it has file_name, expected file_name"):
        replace(disk, pictures=bare).world()
    write(
        bare / "metadata.jsonl",
        [{"file_name": "a.png", "text": "a", "words": "b"}] + [{"file_name": "a", "text": "a"}] * 2,
    )
    with pytest.raises(ValueError, match=r"last held_out=2 lines of .*bare/metadata.jsonl none is for task text"):
        replace(disk, pictures=bare).world()
    pair = {"task": "remove", "criterion": "structure", "better": "a", "worse": "b", "text": "c"}
    odd = write(tmp_path / "odd.jsonl", [pair] * 3)
    with pytest.raises(
        ValueError, match=r"odd\.jsonl, record 0: criterion 'structure' does not apply to task 'remove', whose"
    ):
        replace(disk, preferences=odd).world()


# The pipeline and the policy


@torch.no_grad()
def test_texts_masked_pictures_and_grid_are_those_of_the_pipeline(disk: Files, world: PicturesWorld) -> None:
    pipeline = diffusers.FluxFillPipeline.from_pretrained(disk.model)
    rows = world.rows["text"]
    seen = world.conditioner(rows)
    prompts, pooled, _ = pipeline.encode_prompt('the text "hello"', device="cpu")
    torch.testing.assert_close(seen["prompt_embeds"], prompts, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen["pooled"], pooled, atol=1e-4, rtol=1e-4)
    negative, _, _ = pipeline.encode_prompt("nsfw", device="cpu")
    torch.testing.assert_close(seen["null_prompt_embeds"], negative, atol=1e-4, rtol=1e-4)
    picture = (world.conditioner.pictures(rows) * 2 - 1) * (1 - seen["mask"])
    latents = (pipeline.vae.encode(picture).latent_dist.mode() - 0.06) * 1.5
    torch.testing.assert_close(seen["masked"], latents)
    # 2 x 2 tokens: the shift is that of the pipeline's own grid, at every level.
    from diffusers.pipelines.flux.pipeline_flux_fill import calculate_shift

    pipeline.scheduler.set_timesteps(sigmas=[0.75, 0.5], mu=calculate_shift(4))
    level, shift = torch.tensor([0.75, 0.5]), world.frozen.shift
    torch.testing.assert_close(pipeline.scheduler.sigmas[:2], shift * level / (1 + (shift - 1) * level))


def test_only_adapters_are_trained_and_saved_and_the_reference_is_without_them(world: PicturesWorld) -> None:
    policy, judge = world.policy(0), world.judge(0)
    for module in (policy, judge):
        trainable = {name for name, p in module.named_parameters() if p.requires_grad}
        assert trainable
        assert all("lora_" in name for name in trainable)
        assert set(module.state_dict()) == trainable
    assert not any("visual" in name for name in judge.state_dict())
    knobs = {"sampling_steps": 2.0, "noise_level": 0.0, "guidance": 4.0}

    def drawn(of: FlowPolicy) -> Tensor:
        return of.sample(world.rows["fill"], knobs, torch.Generator().manual_seed(0))["image"]

    base = drawn(policy)
    assert torch.equal(drawn(policy.reference()), base)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.5)
    assert torch.equal(drawn(policy.reference()), base)
    assert not torch.equal(drawn(policy), base)


def test_adapters_of_a_half_precision_pipeline_learn_in_single_precision(disk: Files) -> None:
    world, rng = disk.world(torch.bfloat16), torch.Generator().manual_seed(0)
    policy, knobs = world.policy(0), {"sampling_steps": 2.0, "noise_level": 0.0, "guidance": 4.0}
    kinds = {(p.requires_grad, p.dtype) for p in policy.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    rollout = policy.sample(world.rows["fill"], knobs, rng)
    rollout = rollout.replace(loss_mask=torch.tensor([[False, True]]).expand(4, -1))
    image = policy.reparameterised(rollout, rng)["image"]
    image.sum().backward()
    gradients = [p.grad for name, p in policy.named_parameters() if "lora_B" in name]
    assert all(g is not None and g.dtype == torch.float32 for g in gradients)
    assert any(bool(g.any()) for g in gradients if g is not None)


def test_supervision_shows_the_picture_that_is_wanted(world: PicturesWorld) -> None:
    rollout = world.supervised("remove", 0.0).collect({}, {}, torch.Generator().manual_seed(0), 8)
    wanted = world.frozen.latents(rollout.context["target"].tolist(), CPU)
    assert torch.equal(rollout["image"], wanted)
    everything = world.supervised(None, 0.9).collect({}, {}, torch.Generator().manual_seed(0), 13)
    assert len(everything) == 13
    prompts = torch.cat([world.rows[task]["prompt"] for task in world.tasks]).sort().values
    assert not torch.equal(everything.context["prompt"].sort().values, prompts)


class Brighter(nn.Module):
    """A judge to whom brighter is better."""

    criteria = CRITERIA

    def compare(self, questions: Questions, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).flatten(1).sum(1)


def test_a_judge_sees_candidates_inside_the_mask_alone(world: PicturesWorld) -> None:
    rows = world.rows["text"]
    judge = PastedComparator(Brighter(), lambda c: (world.conditioner.pictures(c), world.conditioner.mask(c)))
    rollout = Rollout.create(
        task="text", group=torch.zeros(1, dtype=torch.int64), mask=torch.ones(1, 1).bool(), context=rows
    )
    questions = CRITERIA.questions(rollout)
    a = torch.rand(len(questions), 3, SIZE, SIZE, requires_grad=True)
    b = torch.zeros(len(questions), 3, SIZE, SIZE)
    margin = judge.compare(questions, a, b)
    margin.sum().backward()
    assert a.grad is not None
    assert torch.equal(a.grad[0], world.conditioner.mask(rows)[0].expand(3, -1, -1))
    torch.testing.assert_close(margin[0], a[0, :, : SIZE // 2, : SIZE // 2].sum())


def test_wins_are_the_evaluator_s_and_the_accuracy_the_judge_s(world: PicturesWorld, monkeypatch: Any) -> None:
    def painter(value: float) -> Any:
        class Painter:
            def sample(self, asked: TensorDict, knobs: Any, rng: Any) -> Rollout:
                count = len(asked)
                image = torch.full((count, 3, SIZE, SIZE), value)
                return Rollout.create(
                    task="policy", group=torch.arange(count), mask=torch.ones(count, 1).bool(), context=asked,
                    columns={"image": image},
                )  # fmt: skip

        return Painter()

    monkeypatch.setattr(world, "evaluator", lambda device: Brighter())
    cast = {"policy": painter(0.8), "base": painter(0.2), "reward_model": Brighter()}
    found = world.task("fill").evaluate(cast, {}, torch.Generator())
    assert found.metrics == dict.fromkeys(CRITERIA.of_tasks["fill"], 1.0) | {"win": 1.0, "judge_accuracy": 1.0}
    same = world.task("text").evaluate(cast | {"policy": cast["base"]}, {}, torch.Generator())
    # No pair of this task is held out.
    assert same.metrics == dict.fromkeys(CRITERIA.of_tasks["text"], 0.5) | {"win": 0.5}
    # Of the held-out removal black is said to be better than red.
    assert world.task("remove").evaluate(cast, {}, torch.Generator()).metrics["judge_accuracy"] == 0


# The paper


@pytest.fixture(scope="module")
def full(disk: Files) -> onereward.Settings:
    """The full scale's own settings, on tiny models."""
    return replace(
        onereward.PAPER.scales["full"],
        device="cpu", resolution=SIZE, held_out=HELD_OUT, sampling_steps=2, judge_iterations=1, judge_batch=3,
        refresh_batch=3, steps=4,
        batch_size=4, learning_rate=1e-2, model=disk.model, pictures=str(disk.pictures),
        preferences=str(disk.preferences), judge=disk.judge, evaluator=disk.evaluator,
    )  # fmt: skip


def test_full_scale_trains_judges_on_labels_and_then_the_policy_through_them(full: onereward.Settings) -> None:
    started, learning = onereward.base(0, full), onereward.one_reward(0, full)
    assert [stage.name for stage in (*started.stages, *learning.stages)] == ["judges", "reward"]
    for regimen, trained in ((started, {"reward_model", "pooled_judge"}), (learning, {"policy"})):
        run = StageRun(regimen, regimen.stages[0])
        run.start(fresh=True)
        before = weights(regimen.cast)
        metrics = run.iterate(0, Counters(), torch.Generator().manual_seed(0))
        assert all(torch.isfinite(torch.tensor(value)) for value in metrics.values())
        changed = {name for name, value in weights(regimen.cast).items() if not torch.equal(value, before[name])}
        assert {name.split("/")[0] for name in changed} == trained
        assert all("lora_" in name for name in changed)
    # An evaluation of the policy against itself without adapters.
    task = learning.evaluated()[0]
    knobs = {"sampling_steps": 2.0, "noise_level": 0.0, "guidance": 4.0}
    found = task.evaluate(learning.cast, knobs, torch.Generator().manual_seed(0)).metrics
    assert set(found) == {*CRITERIA.of_tasks["fill"], "win", "judge_accuracy"}
    assert all(0 <= value <= 1 for value in found.values())


def test_full_scale_has_a_model_for_each_task_in_the_supervised_arm(full: onereward.Settings) -> None:
    regimen = onereward.supervised(0, full)
    run = StageRun(regimen, regimen.stages[0])
    run.start(fresh=True)
    before = weights(regimen.cast)
    run.iterate(0, Counters(), torch.Generator().manual_seed(0))
    changed = {
        name.split("/")[0] for name, value in weights(regimen.cast).items() if not torch.equal(value, before[name])
    }
    assert changed == {f"{task}_model" for task in ("fill", "extend", "remove", "text")}
