"""The scenes' world: a fitted judge, an exact rule that evaluates, and pairs to learn from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from regimen import Cast, Epochs, Regimen, Stage, Update
from regimen.credit import GroupRelativeAdvantage
from regimen.functions.geneval import geneval_score
from regimen.functions.scenes import SHAPE, draw_scenes, read_detections, read_scenes
from regimen.iteration import Counters, StageRun
from regimen.models.detectors import CellDetector
from regimen.objectives import ClippedSurrogateObjective
from regimen.rewards import EditReward, Scene
from regimen.rewards.geneval import GenEvalReward
from regimen.rollout import Rollout
from regimen.tasks.worlds.scene_prompts import sample_edits, texts
from regimen.tasks.worlds.scenes import CLOSENESS, ScenesWorld, contexts, edit_target, unseen_edits

KNOBS = {"sampling_steps": 2.0, "noise_level": 0.7, "guidance": 1.0}


@pytest.fixture(scope="module")
def world() -> ScenesWorld:
    torch.set_num_threads(1)
    return ScenesWorld(0, "tiny", rows=1200, held_out=60)


@pytest.fixture
def quick_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge of few steps, where its quality does not matter."""
    fit = CellDetector.fit
    monkeypatch.setattr(CellDetector, "fit", lambda self, rng: fit(self, rng, steps=20))


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


def evaluated(task: Any, paint: Callable[[TensorDict], Tensor]) -> dict[str, float]:
    evaluation = task.evaluate({"policy": Painter(paint)}, {}, torch.Generator().manual_seed(0))
    return dict(evaluation.metrics)


def test_judge_is_fitted_and_soft_and_evaluator_is_a_rule(world: ScenesWorld) -> None:
    images = draw_scenes(world.held_out_captions["target"])
    judged, ruled = world.judge.detect(images), read_detections(images)
    assert isinstance(world.judge, CellDetector)
    assert not any(p.requires_grad for p in world.judge.parameters())
    there = ruled.score > 0.5
    assert ((judged.score > 0.3) == there).float().mean() > 0.99
    assert (judged.label == ruled.label)[there].float().mean() > 0.98
    assert (judged.colour == ruled.colour)[there].float().mean() > 0.98
    assert set(ruled.score.unique().tolist()) == {0.0, 1.0}
    faded = torch.cat([share * (images + 1) - 1 for share in torch.linspace(0.05, 0.5, 10)])
    unsure = world.judge.detect(faded).score
    assert ((unsure > 0.05) & (unsure < 0.95)).sum() > 20


def test_what_deceives_the_judge_does_not_deceive_the_rule(world: ScenesWorld) -> None:
    """Gradient ascent on the judge: it comes to see what is asked for, and the rule does not."""
    asked = contexts(world.held_out_captions[:24])
    wanted = world.held_out_captions[:24]["target"]
    images = torch.zeros(24, *SHAPE, requires_grad=True)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(world.judge(images).flatten(0, 1), wanted.flatten())
        (slope,) = torch.autograd.grad(loss, images)
        images = (images - 0.05 * slope.sign()).detach().requires_grad_()
    images = images.detach().clamp(-1, 1)
    judged, _ = geneval_score(world.judge.detect(images), asked["requirements"])
    _, strict = geneval_score(read_detections(images), asked["requirements"])
    assert judged.mean() > 0.9
    assert strict.float().mean() < 0.3


def test_training_and_evaluation_prompts_come_from_different_draws(world: ScenesWorld) -> None:
    def asked(table: TensorDict) -> set[tuple[int, ...]]:
        return {tuple(row) for row in torch.cat([table["prompt_ids"], table["source"]], 1).tolist()}

    half = len(world.pairs) // 2
    assert not world.pairs["edit"][:half].any()
    assert world.pairs["edit"][half:].all()
    assert not asked(world.held_out_edits) & asked(world.pairs)
    many, held = sample_edits(3000, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    unseen = unseen_edits(150, many, held)
    assert len(unseen) == 150
    assert not asked(unseen) & asked(many)
    assert asked(sample_edits(150, torch.Generator().manual_seed(1))) & asked(many)
    verbs = [text.split()[0] for text in texts(unseen["prompt_ids"])]
    assert verbs.count("paint") == 50
    assert verbs.count("move") > 46
    assert torch.equal(world.editing(2).rows["prompt_ids"], world.pairs["prompt_ids"][half:])
    assert torch.equal(world.generation(2).rows["prompt_ids"], world.pairs["prompt_ids"][:half])


def test_generation_is_perfect_for_a_fitting_scene(world: ScenesWorld) -> None:
    held = world.held_out_captions
    good = evaluated(world.generation(4), lambda asked: draw_scenes(held["target"]))
    assert good["accuracy"] == good["graded"] == 1
    assert good["judge_probability"] > 0.97
    assert good["distance_to_real"] == 0
    empty = evaluated(world.generation(4), lambda asked: torch.full((len(asked), *SHAPE), -1.0))
    assert empty["accuracy"] == empty["graded"] == 0
    grey = evaluated(world.generation(4), lambda asked: torch.zeros(len(asked), *SHAPE))
    assert grey["accuracy"] == 0
    assert grey["distance_to_real"] > 0.5


def test_editing_is_perfect_for_the_exact_result_alone(world: ScenesWorld) -> None:
    task = world.editing(4)
    exact = evaluated(task, lambda asked: draw_scenes(asked["target"]))
    assert exact == {"success": 1.0, "fidelity": 1.0, "distance_to_target": 0.0}
    lazy = evaluated(task, lambda asked: asked["reference"])
    assert lazy["success"] == 0
    assert lazy["fidelity"] < 0.8


def test_edit_contexts_hold_the_result_and_captions_hide_their_scene(world: ScenesWorld) -> None:
    asked = contexts(torch.cat([world.held_out_captions[:5], world.held_out_edits[:5]]))
    assert not asked["target"][:5].any()
    assert torch.equal(read_scenes(draw_scenes(asked["target"][5:])), world.held_out_edits["target"][:5])
    assert asked["has_reference"].tolist() == [False] * 5 + [True] * 5
    assert torch.equal(read_scenes(asked["reference"][5:]), world.held_out_edits["source"][:5])


@pytest.mark.parametrize("wrong", [0.0, 0.4])
def test_share_of_wrong_prompts_is_as_asked_and_each_is_of_its_kind(wrong: float, world: ScenesWorld) -> None:
    rollout = world.supervised("pairs", wrong).collect({}, {}, torch.Generator().manual_seed(0), 600)
    # One scene may have been drawn for several captions.
    right: dict[tuple[int, ...], list[list[int]]] = {}
    for target, source, prompt in zip(
        *(world.pairs[k].tolist() for k in ("target", "source", "prompt_ids")), strict=True
    ):
        right.setdefault((*target, *source), []).append(prompt)
    scenes = torch.cat([read_scenes(rollout["image"]), read_scenes(rollout.context["reference"])], 1).tolist()
    prompts = rollout.context["prompt_ids"].tolist()
    spoilt = [prompt not in right[tuple(scene)] for scene, prompt in zip(scenes, prompts, strict=True)]
    # Binomial deviation: sqrt(0.4 * 0.6 / 600) = 0.02; another row may say the same by chance.
    assert sum(spoilt) / 600 == pytest.approx(wrong, abs=5 * 0.02 if wrong else 0)
    verbs = [text.split()[0] in ("paint", "move", "remove") for text in texts(rollout.context["prompt_ids"])]
    assert verbs == rollout.context["has_reference"].tolist()


@pytest.mark.usefixtures("quick_judge")
@pytest.mark.parametrize("conditioner", ["embedding", "metaquery"])
def test_one_update_on_both_tasks(conditioner: Any) -> None:
    """Judged as the paper does, with both ways of reading a prompt; a frozen language model stays frozen."""
    world = ScenesWorld(1, "tiny", conditioner, rows=32, held_out=8, evaluation_steps=2)
    policy = world.policy(0)
    reward = EditReward(edit_target, scale=CLOSENESS).on("edit")
    reward = reward + GenEvalReward(world.judge.detect, counting="share", threshold=0.0).on("generate")
    update = Update(ClippedSurrogateObjective(clip=1e-3), learning_rate=1e-2, batches=Epochs(1, 1))
    tasks = [world.generation(4), world.editing(4)]
    stage = Stage("s", tasks, 1, 16, reward=reward, credit=GroupRelativeAdvantage(std="batch"), updates=[update])
    run = StageRun(Regimen(Cast(policy=policy), [stage]), stage)
    run.start(fresh=True)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    trainable = {name for name, p in policy.named_parameters() if p.requires_grad}
    metrics = run.iterate(0, Counters(), torch.Generator().manual_seed(0))
    moved = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert moved <= trainable
    assert (trainable == set(before)) == (conditioner == "embedding")
    assert 0 < metrics["reward/edit/follows_edit"] <= 1
    assert 0 <= metrics["reward/generate/geneval"] <= 1
    assert policy.sample(tasks[0].rows[:2], KNOBS, torch.Generator())["image"].shape == (2, *SHAPE)


@pytest.mark.usefixtures("quick_judge")
def test_a_world_is_decided_by_its_seed_and_leaves_the_global_stream_alone() -> None:
    torch.manual_seed(5)
    at = torch.get_rng_state()
    one, again, other = (ScenesWorld(seed, "tiny", rows=60, held_out=6) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), at)
    assert torch.equal(again.pairs["target"], one.pairs["target"])
    assert torch.equal(again.held_out_edits["target"], one.held_out_edits["target"])
    assert not torch.equal(other.pairs["target"], one.pairs["target"])
    images = draw_scenes(one.pairs["target"][:4])
    assert torch.equal(again.judge(images), one.judge(images))
    assert not torch.equal(other.judge(images), one.judge(images))


def test_edit_reward_is_1_at_the_target(world: ScenesWorld) -> None:
    policy = Painter(lambda asked: draw_scenes(asked["target"]))
    rollout = world.editing(2).collect({"policy": policy}, {}, torch.Generator().manual_seed(0), 4)
    assert EditReward(edit_target, scale=CLOSENESS).score(rollout, Scene()).tolist() == [1.0] * 4


def test_unknown_settings_are_named() -> None:
    for settings in ({"size": "huge"}, {"conditioner": "clip"}):
        with pytest.raises(ValueError, match="expected tiny, small, large; embedding or metaquery"):
            ScenesWorld(0, **settings)  # type: ignore[arg-type]
