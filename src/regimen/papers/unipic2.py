"""UniPic 2.0 (arXiv 2509.04548): staged online RL on one flow policy, editing first, then generation.

Claim: the second stage of reinforcement raises its own task and does not undo the first: both tasks end above
the jointly pre-trained policy, and at least four fifths of the first stage's gain are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from regimen.cast import Cast, ReferenceRefresh, RefreshMode
from regimen.controllers import Alternating, Schedule
from regimen.credit import GroupRelativeAdvantage
from regimen.knobs import Knob
from regimen.lab.experiment import Arm, Claim, Paper, SeedResults
from regimen.objectives import ClippedSurrogateObjective, FlowMatchingObjective, ReferenceKL
from regimen.regimen import Regimen, Stage
from regimen.rewards import ClassifierReward, EditReward, Expression
from regimen.rewards.geneval import GenEvalReward
from regimen.tasks.worlds import digits, scenes
from regimen.update import Epochs, Update

World = Literal["digits", "scenes", "stable_diffusion"]


@dataclass(frozen=True)
class Settings:
    """Numbers of the experiment.

    Attributes:
        world: what is generated and edited, see `WORLDS`.
        pretrain_steps: supervised steps of the common start, on captions of which `wrong_captions` are wrong; 0 for a
            model that has been trained.
        stage_steps: reinforcement iterations per stage; every arm takes two stages' worth.
        batch_size: samples per iteration, in groups of `group_size`.
        kl_weight: of the KL from the policy at the stage's start (`reference` "copy"), or from the policy without
            its adapters ("fixed").
        device: where the cast is trained.
        micro_batch: samples per backward pass, to save memory.
        size: of the scenes' policy.
        model, prompts, edits, pairs: of `StableDiffusionWorld`: a pipeline, and JSON-lines files; pairs are for the
            supervised arms.
        judge, evaluator, edit_judge: object detectors and a vision-language model, for `StableDiffusionWorld`.
    """

    world: World = "digits"
    pretrain_steps: int = 1500
    pretrain_learning_rate: float = 1e-3
    wrong_captions: float = 0.4
    stage_steps: int = 60
    batch_size: int = 256
    group_size: int = 16
    learning_rate: float = 3e-4
    clip: float = 1e-3
    kl_weight: float = 0.0
    evaluate_every: int = 20
    reference: RefreshMode = "copy"
    device: str = "cpu"
    micro_batch: int | None = None
    size: scenes.Size = "large"
    model: str = "Skywork/UniPic2-SD3.5M-Kontext-2B"
    prompts: str = "prompts.jsonl"
    edits: str = "edits.jsonl"
    pairs: str | None = None
    judge: str = "facebook/detr-resnet-101"
    evaluator: str = "hustvl/yolos-base"
    edit_judge: str = "Qwen/Qwen2.5-VL-7B-Instruct"


def digits_world(seed: int, s: Settings) -> tuple[Any, Expression]:
    """Handwritten digits; the probability of the class asked for, and the closeness to the edit asked for."""
    world = digits.DigitsWorld(seed)
    return world, EditReward(digits.edit_target).on("edit") + ClassifierReward(world.judge).on("generate")


def scenes_world(seed: int, s: Settings) -> tuple[Any, Expression]:
    """Coloured shapes; the demands of the caption that a detector sees met, and the closeness to the edit."""
    world = scenes.ScenesWorld(seed, s.size)
    follows_edit = EditReward(scenes.edit_target, scale=scenes.CLOSENESS)
    return world, follows_edit.on("edit") + GenEvalReward(world.judge.detect, counting="share").on("generate")


def stable_diffusion_world(seed: int, s: Settings) -> tuple[Any, Expression]:
    """Stable Diffusion 3 on GenEval's prompts and edits of photographs, judged by a detector and a language model."""
    from regimen.models.detectors import DetectorFromTransformers
    from regimen.rewards.vlm import VLMEditReward
    from regimen.tasks.worlds.stable_diffusion import StableDiffusionWorld

    judge, evaluator = (DetectorFromTransformers.from_pretrained(name) for name in (s.judge, s.evaluator))
    world = StableDiffusionWorld(s.model, s.prompts, s.edits, pairs=s.pairs, evaluator=evaluator, judge=judge)
    edit_judge = VLMEditReward.from_pretrained(s.edit_judge, world.sources, world.instructions)
    return world, edit_judge.on("edit") + GenEvalReward(judge, counting="share").on("generate")


WORLDS: dict[World, Callable[[int, Settings], tuple[Any, Expression]]] = {
    "digits": digits_world,
    "scenes": scenes_world,
    "stable_diffusion": stable_diffusion_world,
}
"""By name: `(seed, settings) -> world` (its policy and tasks) and what rewards it."""


class Parts:
    """The world, the policy and the stages that the arms are made of."""

    def __init__(self, seed: int, settings: Settings) -> None:
        self.settings = settings
        # One reward for every stage: each component applies to its own task.
        self.world, self.reward = WORLDS[settings.world](seed, settings)
        self.cast = Cast(policy=self.world.policy(seed).to(settings.device))
        self.edit = self.world.editing(settings.group_size)
        self.generate = self.world.generation(settings.group_size)

    def regimen(self, *stages: Stage) -> Regimen:
        """A regimen evaluated on both tasks."""
        return Regimen(self.cast, stages, evaluations=[self.generate, self.edit])

    def supervised(self, name: str, steps: int, learning_rate: float, wrong: float) -> Stage:
        """Flow matching on pairs of which a share has a wrong caption."""
        s = self.settings
        update = Update(FlowMatchingObjective(), learning_rate=learning_rate, micro_batch=s.micro_batch)
        task = self.world.supervised("pairs", wrong)
        return Stage(name, [task], steps, s.batch_size, updates=[update], evaluate_every=max(steps // 5, 1))

    def reinforce(self, name: str, *tasks: str, stages: int = 1) -> Stage:
        """Group-relative reinforcement on some tasks, which take turns if there are two."""
        s = self.settings
        objective = ClippedSurrogateObjective(clip=s.clip) + Knob("kl_weight", s.kl_weight) * ReferenceKL("flow_grpo")
        turns = [Schedule(f"mixture/{t}", Alternating(2, 0.5, i == 0, i == 1)) for i, t in enumerate(tasks)]
        return Stage(
            name,
            [{"edit": self.edit, "generate": self.generate}[task] for task in tasks],
            s.stage_steps * stages,
            s.batch_size,
            reward=self.reward,
            credit=GroupRelativeAdvantage(std="batch", ddof=0, clip=5.0),
            updates=[
                Update(
                    objective,
                    learning_rate=s.learning_rate,
                    options={"weight_decay": 1e-4},
                    batches=Epochs(1, 2),
                    micro_batch=s.micro_batch,
                )
            ],
            rules=[ReferenceRefresh(mode=s.reference)],
            controllers=turns if len(tasks) > 1 else (),
            evaluate_every=s.evaluate_every,
        )


def base(seed: int, s: Settings) -> Regimen:
    """The common start: joint supervised pre-training on noisy captions; a pre-trained model as it is."""
    parts = Parts(seed, s)
    if not s.pretrain_steps:
        return parts.regimen(Stage("start", [parts.generate], 0))
    return parts.regimen(parts.supervised("pretrain", s.pretrain_steps, s.pretrain_learning_rate, s.wrong_captions))


def staged(seed: int, s: Settings) -> Regimen:
    """The method: editing, then generation."""
    parts = Parts(seed, s)
    return parts.regimen(parts.reinforce("edit", "edit"), parts.reinforce("generate", "generate"))


def reversed_order(seed: int, s: Settings) -> Regimen:
    """Generation, then editing."""
    parts = Parts(seed, s)
    return parts.regimen(parts.reinforce("generate", "generate"), parts.reinforce("edit", "edit"))


def mixed(seed: int, s: Settings) -> Regimen:
    """Both tasks in turn, iteration by iteration."""
    parts = Parts(seed, s)
    return parts.regimen(parts.reinforce("mixed", "edit", "generate", stages=2))


def edit_only(seed: int, s: Settings) -> Regimen:
    """Editing for the length of both stages."""
    parts = Parts(seed, s)
    return parts.regimen(parts.reinforce("edit", "edit", stages=2))


def generate_only(seed: int, s: Settings) -> Regimen:
    """Generation for the length of both stages."""
    parts = Parts(seed, s)
    return parts.regimen(parts.reinforce("generate", "generate", stages=2))


def supervised(seed: int, s: Settings) -> Regimen:
    """Supervised training goes on: as many optimiser steps on the same noisy captions."""
    parts = Parts(seed, s)
    return parts.regimen(parts.supervised("supervised", 4 * s.stage_steps, s.learning_rate, s.wrong_captions))


def supervised_clean(seed: int, s: Settings) -> Regimen:
    """As many supervised steps on captions without errors: an upper reference, which no arm is given."""
    parts = Parts(seed, s)
    return parts.regimen(parts.supervised("supervised", 4 * s.stage_steps, s.learning_rate, 0.0))


def smaller_gain(seed: SeedResults) -> float:
    """The smaller of the two tasks' gains of the staged policy over its start."""
    before, after = seed["staged"].after("start"), seed["staged"].final
    return min(after[m] - before[m] for m in ("generate/accuracy", "edit/success"))


def kept_share(metric: str, seed: SeedResults) -> float:
    """How much of the first stage's gain in an edit metric is left after the second."""
    run = seed["staged"]
    before = run.after("start")[metric]
    gain = run.after("edit")[metric] - before
    if gain <= 0:  # The share of a loss that is left would pass for a gain that is kept.
        raise ValueError(f"the first stage's gain is {gain:.3f}, so there is nothing to keep")
    return (run.final[metric] - before) / gain


def difference(arm: str, metric: str, seed: SeedResults) -> float:
    """Staged against another arm on one metric."""
    return seed["staged"].final[metric] - seed[arm].final[metric]


def compared(arm: str) -> list[Claim]:
    """Staged minus another arm on both tasks: shown with intervals, claimed by nobody."""
    return [
        Claim(
            f"staged_vs_{arm}_{metric.split('/')[0]}",
            f"Staged minus {arm}, {label}",
            partial(difference, arm, metric),
            ["staged", arm],
            judged=False,
        )
        for metric, label in (("generate/accuracy", "generation accuracy"), ("edit/success", "edit success"))
    ]


REINFORCEMENT = ("stage_steps", "learning_rate", "clip", "kl_weight", "evaluate_every", "reference")
"""Settings that the common start does not depend on."""

PAPER = Paper(
    slug="unipic2",
    title="Skywork UniPic 2.0: Building Kontext Model with Online RL for Unified Multimodal Model",
    arxiv="2509.04548",
    verb="learn, judge",
    policy="flow",
    claim="Staged online reinforcement (editing, then generation) of one flow policy raises both tasks over the "
    "jointly pre-trained policy, and the second stage undoes at most a fifth of the first's gain.",
    arms=[
        Arm("base", "base (joint pre-training)", base, cached=True, ignores=REINFORCEMENT),
        Arm("supervised", "supervised, continued", supervised, start="base"),
        Arm("edit_only", "editing only", edit_only, start="base"),
        Arm("generate_only", "generation only", generate_only, start="base"),
        Arm("mixed", "mixed (in turn)", mixed, start="base"),
        Arm("staged", "staged: edit, then generate (PDTR)", staged, start="base"),
        Arm("reversed", "reversed: generate, then edit", reversed_order, start="base"),
        Arm("supervised_clean", "supervised on clean captions", supervised_clean, start="base", extended=True),
    ],
    claims=[
        Claim("both_rise", "Both tasks end above the start (the smaller of the two gains)", smaller_gain, ["staged"]),
        Claim(
            "gain_kept",
            "The second stage keeps 0.8 of the first's gain in edit success",
            partial(kept_share, "edit/success"),
            ["staged"],
            above=0.8,
        ),
        Claim(
            "fidelity_kept",
            "The second stage keeps 0.8 of the first's gain in edit fidelity (the judge's own formula)",
            partial(kept_share, "edit/fidelity"),
            ["staged"],
            above=0.8,
            judged=False,
        ),
        *compared("mixed"),
        *compared("reversed"),
        *compared("supervised"),
    ],
    metrics={
        "generate/accuracy": "generation accuracy",
        "edit/success": "edit success",
        "edit/fidelity": "edit fidelity",
        "generate/distance_to_real": "distance to the nearest real digit",
        "edit/distance_to_target": "distance to the exact edit",
        "generate/judge_probability": "judge's probability",
    },
    scales={
        "quick": Settings(pretrain_steps=200, stage_steps=5, evaluate_every=5),
        "default": Settings(),
        "scenes": Settings(
            world="scenes",
            device="cuda",
            pretrain_steps=12_000,
            stage_steps=100,
            batch_size=384,
            group_size=24,
        ),
        "full": Settings(
            world="stable_diffusion",
            device="cuda",
            pretrain_steps=0,
            stage_steps=500,
            batch_size=192,
            group_size=24,
            clip=1e-4,
            kl_weight=0.04,
            reference="fixed",
            micro_batch=1,
        ),
    },
    requires={"full": "diffusers"},
)
