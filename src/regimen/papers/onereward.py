"""OneReward (arXiv 2508.21066): one judge of pairs for many tasks and criteria trains one editor, through its gradient.

Claim: reward learning with one judge that is told task and criterion raises every task over the base, by the true
rater, and beats the same training with a judge that is told neither, whose criteria conflict between tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from regimen.cast import Cast, ReferenceRefresh, RefreshMode
from regimen.lab.experiment import Arm, Claim, Paper, SeedResults
from regimen.memory import ReplayMemory
from regimen.models.comparators import Told
from regimen.objectives import FlowMatchingObjective, PairwiseVerdictObjective, RewardBackpropObjective
from regimen.regimen import Regimen, Stage
from regimen.rewards import PairwiseReward
from regimen.rewards.pairwise import Transform
from regimen.tasks.worlds.inpainting import InpaintingWorld
from regimen.update import Draws, Update

JUDGES: dict[str, Told] = {"reward_model": ("task", "criterion"), "pooled_judge": ()}
"""Comparators of one architecture, by what they are told of a question."""
CRITERIA = ("alignment", "consistency", "structure", "aesthetics", "removal")
"""By which wins are counted; each task has some of them."""
World = Literal["digits", "pictures"]


@dataclass(frozen=True)
class Settings:
    """Numbers of the experiment.

    Attributes:
        world: what is filled in, see `WORLDS`.
        pretrain_steps: supervised steps of the common start, on all tasks mixed, with a share `wrong_prompts` of wrong
            prompts.
        judge_iterations, judge_batch, judge_steps: of the judges' start: each iteration brings a batch of labelled
            pairs (digits: of the base's samples), and every judge takes so many gradient steps on the last
            `judge_buffer` iterations.
        steps: reward learning, `batch_size` samples each.
        refresh_steps: gradient steps of the judge per iteration on the samples of the last `buffer` iterations, once
            there are `refresh_after` samples; 0 steps leave the judge as it is.
        wrong_labels: share of the digits' labels that are turned around.
        transform: of a probability of winning; `"log"` is the paper's loss, `"prob"` that of ReFL.
        decay: of the reference that follows the policy (dynamic).
        width, hidden: of the digits' denoiser and judges.
        device: where the cast is trained.
        micro_batch: samples per backward pass, to save memory.
        model, pictures, preferences, judge, evaluator, resolution, held_out, sampling_steps: of `PicturesWorld`.
    """

    world: World = "digits"
    pretrain_steps: int = 1500
    pretrain_batch: int = 128
    pretrain_learning_rate: float = 1e-3
    wrong_prompts: float = 0.3
    judge_iterations: int = 50
    judge_batch: int = 480
    judge_steps: int = 40
    judge_buffer: int = 50
    judge_learning_rate: float = 1e-3
    steps: int = 160
    batch_size: int = 192
    learning_rate: float = 5e-5
    refresh_steps: int = 10
    refresh_batch: int = 128
    refresh_after: int = 1536
    buffer: int = 48
    wrong_labels: float = 0.1
    transform: Transform = "log"
    decay: float = 0.99
    width: int = 128
    hidden: int = 128
    device: str = "cpu"
    micro_batch: int | None = None
    model: str = "black-forest-labs/FLUX.1-Fill-dev"
    pictures: str = "pictures"
    preferences: str = "preferences.jsonl"
    judge: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    evaluator: str = "Qwen/Qwen2-VL-7B-Instruct"
    resolution: int = 512
    held_out: int = 64
    sampling_steps: int = 20


def digits_world(seed: int, s: Settings) -> Any:
    """Handwritten digits to be filled in, extended, or freed of a blob, labelled by known formulas."""
    return InpaintingWorld(seed, width=s.width, hidden=s.hidden, wrong_labels=s.wrong_labels)


def pictures_world(seed: int, s: Settings) -> Any:
    """FLUX.1 Fill on the pictures of a folder, with pairs that were labelled beforehand."""
    from regimen.tasks.worlds.pictures import PicturesWorld

    make = partial(PicturesWorld, resolution=s.resolution, held_out=s.held_out, sampling_steps=s.sampling_steps)
    return make(seed, s.model, s.pictures, s.preferences, s.judge, s.evaluator)


WORLDS: dict[World, Callable[[int, Settings], Any]] = {"digits": digits_world, "pictures": pictures_world}
"""By name: its policy, judges and tasks, from seed and settings."""


class Parts:
    """The world, the cast and the stages that the arms are made of."""

    def __init__(self, seed: int, settings: Settings, judge: str = "reward_model", apart: bool = False) -> None:
        s = self.settings = settings
        self.world, self.judge = WORLDS[s.world](seed, s), judge
        self.models = [f"{task}_model" for task in self.world.tasks] if apart else []
        judges = {name: self.world.judge(seed, told) for name, told in JUDGES.items()}
        own = {name: self.world.policy(seed) for name in self.models}
        members = {"policy": self.world.policy(seed), **judges, **own}
        self.cast = Cast(**{name: member.to(s.device) for name, member in members.items()})
        self.cast.adopt("base", self.cast["policy"].reference(), of="policy")
        for name in self.models:
            self.cast.start(name, of="policy")

    def regimen(self, *stages: Stage) -> Regimen:
        """A regimen evaluated on every task against the base."""
        members = self.models or ["policy"] * len(self.world.tasks)
        evaluations = [
            self.world.task(task, evaluated=member, judge=self.judge)
            for task, member in zip(self.world.tasks, members, strict=True)
        ]
        return Regimen(self.cast, stages, evaluations=evaluations)

    def pretrain(self) -> Stage:
        """Flow matching on all tasks mixed; the base is its end."""
        s = self.settings
        update = Update(FlowMatchingObjective(), learning_rate=s.pretrain_learning_rate, micro_batch=s.micro_batch)
        last = ReferenceRefresh(member="base", mode="copy", every=s.pretrain_steps)
        data = self.world.supervised(None, s.wrong_prompts)
        return Stage("pretrain", [data], s.pretrain_steps, s.pretrain_batch, updates=[update], rules=[last])

    def judges(self) -> Stage:
        """Every judge on the same labelled pairs."""
        s = self.settings
        return Stage(
            "judges",
            self.world.labelled(),
            s.judge_iterations,
            s.judge_batch,
            updates=[self.refresh(name, s.judge_steps) for name in JUDGES],
            rules=[ReferenceRefresh(mode="fixed")],
            memory=partial(ReplayMemory, s.judge_buffer * s.judge_batch),
        )

    def refresh(self, judge: str, steps: int) -> Update:
        """A judge on labelled pairs from the memory, once that holds enough not to be learned by heart."""
        s = self.settings
        batches = Draws(steps, s.refresh_batch, after=s.refresh_after)
        objective = PairwiseVerdictObjective(judge)
        return Update(objective, [judge], s.judge_learning_rate, batches=batches, micro_batch=s.micro_batch)

    def reward_learning(self, reference: RefreshMode, refresh: bool = True) -> Stage:
        """The policy through the gradient of the judge, which is refreshed on the policy's labelled samples."""
        s = self.settings
        reward = PairwiseReward(self.cast[self.judge].criteria, self.judge, transform=s.transform)
        objective = RewardBackpropObjective(reward)
        judge = [self.refresh(self.judge, s.refresh_steps)] if refresh and s.refresh_steps else []
        return Stage(
            "reward",
            [self.world.task(task) for task in self.world.tasks],
            s.steps,
            s.batch_size,
            updates=[*judge, Update(objective, learning_rate=s.learning_rate, micro_batch=s.micro_batch)],
            rules=[ReferenceRefresh(mode=reference, decay=s.decay)],
            memory=partial(ReplayMemory, s.buffer * s.batch_size),
        )


def base(seed: int, s: Settings) -> Regimen:
    """The common start: joint supervised pre-training, then the judges on labelled samples."""
    parts = Parts(seed, s)
    return parts.regimen(*([parts.pretrain()] if s.pretrain_steps else []), parts.judges())


def one_reward(seed: int, s: Settings) -> Regimen:
    """The method (Algorithm 1): the judge is told task and criterion, the reference stays."""
    parts = Parts(seed, s)
    return parts.regimen(parts.reward_learning("fixed"))


def dynamic(seed: int, s: Settings) -> Regimen:
    """Algorithm 2: the reference follows the policy."""
    parts = Parts(seed, s)
    return parts.regimen(parts.reward_learning("ema"))


def unconditioned(seed: int, s: Settings) -> Regimen:
    """The baseline: the same judge, told neither task nor criterion."""
    parts = Parts(seed, s, "pooled_judge")
    return parts.regimen(parts.reward_learning("fixed"))


def frozen(seed: int, s: Settings) -> Regimen:
    """The judge stays as it was trained on the base's samples."""
    parts = Parts(seed, s)
    return parts.regimen(parts.reward_learning("fixed", refresh=False))


def supervised(seed: int, s: Settings) -> Regimen:
    """A model for each task, trained on as supervised as before, an equal part of the steps each."""
    parts = Parts(seed, s, apart=True)
    tasks, learn = parts.world.tasks, partial(Update, learning_rate=s.learning_rate, micro_batch=s.micro_batch)
    updates = [
        learn(FlowMatchingObjective(member=model).on(f"{task}_data"), [model])
        for task, model in zip(tasks, parts.models, strict=True)
    ]
    data = [parts.world.supervised(task, s.wrong_prompts) for task in tasks]
    return parts.regimen(Stage("supervised", data, s.steps // len(tasks), len(tasks) * s.batch_size, updates=updates))


def wins(final: Mapping[str, float]) -> dict[str, float]:
    """The shares of wins against the base, by `<task>/<criterion>`."""
    return {name: value for name, value in final.items() if name.partition("/")[2] in CRITERIA}


def mean_win(arm: str, seed: SeedResults) -> float:
    """Share of wins against the base, a mean over all (task, criterion)."""
    won = wins(seed[arm].final)
    return sum(won.values()) / len(won)


def difference(arm: str, other: str, seed: SeedResults) -> float:
    """One arm's mean share of wins minus another's."""
    return mean_win(arm, seed) - mean_win(other, seed)


def least_gain(seed: SeedResults) -> float:
    """The smallest of the tasks' shares of wins, each above the base's against itself (with other noise)."""
    won, itself = seed["onereward"].final, seed["base"].final
    return min(value - itself[name] for name, value in won.items() if name.endswith("/win"))


def shown(name: str, text: str, arm: str, other: str) -> Claim:
    """A difference with its interval, which nobody claims."""
    return Claim(name, text, partial(difference, arm, other), [arm, other], judged=False)


POLICY = ("steps", "batch_size", "learning_rate", "refresh_steps", "buffer", "transform", "decay")
"""Settings that the common start does not depend on."""

PAPER = Paper(
    slug="onereward",
    title="OneReward: Unified Mask-Guided Image Generation via Multi-Task Human Preference Learning",
    arxiv="2508.21066",
    verb="judge, learn",
    policy="flow",
    claim="Reward learning through one judge of pairs that is told task and criterion raises every task over the base "
    "by the true rater, and beats the same training through a judge that is told neither.",
    arms=[
        Arm("base", "base (joint pre-training)", base, cached=True, ignores=POLICY),
        Arm("supervised", "supervised, a model per task", supervised, start="base"),
        Arm("unconditioned", "judge told nothing", unconditioned, start="base"),
        Arm("onereward", "OneReward (fixed reference)", one_reward, start="base"),
        Arm("dynamic", "OneReward (reference follows)", dynamic, start="base"),
        Arm("frozen", "OneReward, judge not refreshed", frozen, start="base", extended=True),
    ],
    claims=[
        Claim(
            "beats_unconditioned",
            "Mean share of wins over all tasks and criteria, above that with the judge that is told nothing",
            partial(difference, "onereward", "unconditioned"),
            ["onereward", "unconditioned"],
        ),
        Claim(
            "every_task_rises",
            "The smallest of the tasks' shares of wins, above the base's against itself",
            least_gain,
            ["onereward", "base"],
        ),
        Claim(
            "mean_win", "Mean share of wins over the base", partial(mean_win, "onereward"), ["onereward"], 0.5, False
        ),
        shown("dynamic_vs_fixed", "Following minus fixed reference", "dynamic", "onereward"),
        shown("vs_supervised", "OneReward minus supervised", "onereward", "supervised"),
    ],
    metrics={
        "fill/alignment": "fill, alignment: wins",
        "fill/consistency": "fill, consistency: wins",
        "fill/structure": "fill, structure: wins",
        "extend/consistency": "extend, consistency: wins",
        "extend/structure": "extend, structure: wins",
        "remove/removal": "remove, removal quality: wins",
        "fill/judge_accuracy": "judge's accuracy, fill",
        "extend/judge_accuracy": "judge's accuracy, extend",
        "remove/judge_accuracy": "judge's accuracy, remove",
    },
    scales={
        "quick": Settings(
            pretrain_steps=60,
            judge_iterations=2,
            judge_batch=96,
            judge_steps=20,
            refresh_after=96,
            steps=6,
            batch_size=48,
            buffer=8,
        ),
        "default": Settings(),
        "full": Settings(
            world="pictures",
            device="cuda",
            pretrain_steps=0,
            wrong_prompts=0.0,
            judge_iterations=2000,
            judge_batch=32,
            judge_steps=1,
            judge_buffer=1,
            judge_learning_rate=1e-4,
            steps=500,
            batch_size=32,
            learning_rate=1e-5,
            refresh_steps=0,
            refresh_batch=32,
            refresh_after=1,
            buffer=1,
            micro_batch=1,
        ),
    },
    requires={"full": "diffusers"},
)
