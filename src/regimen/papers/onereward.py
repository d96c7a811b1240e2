"""OneReward (arXiv 2508.21066): one judge of pairs for many tasks and criteria trains one editor, through its gradient.

Claim: reward learning with one judge that is told task and criterion raises every task over the base, by the true
rater, and beats the same training with a judge that is told neither, whose criteria conflict between tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from regimen.cast import Cast, ReferenceRefresh, RefreshMode
from regimen.lab.experiment import Arm, Claim, Paper, SeedResults
from regimen.memory import ReplayMemory
from regimen.models.comparators import Told
from regimen.objectives import FlowMatchingObjective, PairwiseVerdictObjective, RewardBackpropObjective
from regimen.regimen import Regimen, Stage
from regimen.rewards import PairwiseReward
from regimen.rewards.pairwise import Transform
from regimen.tasks.worlds.inpainting import CRITERIA, TASKS, InpaintingWorld, names
from regimen.update import Draws, Update

JUDGES: dict[str, Told] = {"reward_model": ("task", "criterion"), "pooled_judge": ()}
"""Comparators of one architecture, by what they are told of a question."""


@dataclass(frozen=True)
class Settings:
    """Numbers of the experiment.

    Attributes:
        pretrain_steps: supervised steps of the common start, on all tasks mixed; `wrong_prompts` of the classes asked
            for are wrong.
        judge_iterations, judge_batch, judge_steps: of the judges' start: each iteration labels a batch of the base's
            samples, and every judge takes so many gradient steps.
        steps: reward learning, `batch_size` samples each.
        refresh_steps: gradient steps of the judge per iteration on the samples of the last `buffer` iterations, once
            there are `refresh_after` samples.
        wrong_labels: share of the labels that are turned around.
        transform: of a probability of winning; `"log"` is the paper's loss, `"prob"` that of ReFL.
        decay: of the reference that follows the policy (dynamic).
        width, hidden: of the denoiser and the judges.
    """

    pretrain_steps: int = 1500
    pretrain_batch: int = 128
    pretrain_learning_rate: float = 1e-3
    wrong_prompts: float = 0.3
    judge_iterations: int = 50
    judge_batch: int = 480
    judge_steps: int = 40
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


class Parts:
    """The world, the cast and the stages that the arms are made of."""

    def __init__(self, seed: int, settings: Settings, judge: str = "reward_model", models: Sequence[str] = ()) -> None:
        s = self.settings = settings
        self.world, self.judge, self.models = InpaintingWorld(seed), judge, models
        judges = {name: self.world.judge(seed, s.hidden, told) for name, told in JUDGES.items()}
        own = {name: self.world.policy(seed, s.width) for name in models}
        self.cast = Cast(policy=self.world.policy(seed, s.width), **judges, **own)
        self.cast.snapshot("policy", as_="base")
        for name in models:
            self.cast.start(name, of="policy")

    def regimen(self, *stages: Stage) -> Regimen:
        """A regimen evaluated on every task against the base."""
        members = self.models or ["policy"] * len(TASKS)
        evaluations = [
            self.world.task(task, evaluated=member, judge=self.judge)
            for task, member in zip(TASKS, members, strict=True)
        ]
        return Regimen(self.cast, stages, evaluations=evaluations)

    def pretrain(self) -> Stage:
        """Flow matching on all tasks mixed; the base is its end."""
        s = self.settings
        update = Update(FlowMatchingObjective(), learning_rate=s.pretrain_learning_rate)
        last = ReferenceRefresh(member="base", mode="copy", every=s.pretrain_steps)
        data = self.world.supervised(None, s.wrong_prompts)
        return Stage("pretrain", [data], s.pretrain_steps, s.pretrain_batch, updates=[update], rules=[last])

    def judges(self) -> Stage:
        """Every judge on the same labelled samples of the base."""
        s = self.settings
        updates = [self.refresh(name, s.judge_steps) for name in JUDGES]
        fixed = ReferenceRefresh(mode="fixed")
        return self._stage("judges", s.judge_iterations, s.judge_batch, fixed, s.judge_iterations, updates)

    def refresh(self, judge: str, steps: int) -> Update:
        """A judge on labelled pairs from the memory, once that holds enough not to be learned by heart."""
        s = self.settings
        batches = Draws(steps, s.refresh_batch, after=s.refresh_after)
        return Update(PairwiseVerdictObjective(judge), [judge], s.judge_learning_rate, batches=batches)

    def reward_learning(self, reference: RefreshMode, refresh: bool = True) -> Stage:
        """The policy through the gradient of the judge, which is refreshed on the policy's labelled samples."""
        s = self.settings
        reward = PairwiseReward(CRITERIA, self.judge, transform=s.transform)
        policy = Update(RewardBackpropObjective(reward), learning_rate=s.learning_rate)
        judge = [self.refresh(self.judge, s.refresh_steps)] if refresh else []
        follows = ReferenceRefresh(mode=reference, decay=s.decay)
        return self._stage("reward", s.steps, s.batch_size, follows, s.buffer, [*judge, policy])

    def _stage(
        self, name: str, steps: int, batch: int, reference: ReferenceRefresh, buffer: int, updates: Sequence[Update]
    ) -> Stage:
        return Stage(
            name,
            [self.world.task(task, self.settings.wrong_labels) for task in TASKS],
            steps,
            batch,
            updates=updates,
            rules=[reference],
            memory=partial(ReplayMemory, buffer * batch),
        )


def base(seed: int, s: Settings) -> Regimen:
    """The common start: joint supervised pre-training, then the judges on labelled samples."""
    parts = Parts(seed, s)
    return parts.regimen(parts.pretrain(), parts.judges())


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
    """A model for each task, trained on as supervised as before, a third of the steps each."""
    models = [f"{task}_model" for task in TASKS]
    parts = Parts(seed, s, models=models)
    updates = [
        Update(FlowMatchingObjective(member=model).on(f"{task}_data"), [model], s.learning_rate)
        for task, model in zip(TASKS, models, strict=True)
    ]
    data = [parts.world.supervised(task, s.wrong_prompts) for task in TASKS]
    return parts.regimen(Stage("supervised", data, s.steps // len(TASKS), len(TASKS) * s.batch_size, updates=updates))


def mean_win(arm: str, seed: SeedResults) -> float:
    """Share of wins against the base, a mean over all (task, criterion)."""
    final = seed[arm].final
    return sum(final[name] for name in names()) / len(names())


def difference(arm: str, other: str, seed: SeedResults) -> float:
    """One arm's mean share of wins minus another's."""
    return mean_win(arm, seed) - mean_win(other, seed)


def least_gain(seed: SeedResults) -> float:
    """The smallest of the tasks' shares of wins, each above the base's against itself (with other noise)."""
    won, itself = seed["onereward"].final, seed["base"].final
    return min(won[f"{task}/win"] - itself[f"{task}/win"] for task in TASKS)


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
    },
)
