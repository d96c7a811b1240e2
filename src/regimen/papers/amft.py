"""AMFT (arXiv 2508.06944): the balance of imitation and reinforcement, learned from held-out reward while training.

Claim: a weight of imitation that follows the gradient of held-out reward and an entropy target does as well as the best
fixed weight without being tuned, and better than either alone or one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from regimen.cast import Cast
from regimen.controllers import Constant, Controller, MetaGradientWeight, Probe, Schedule, TargetEntropy
from regimen.credit import GroupRelativeAdvantage
from regimen.knobs import Knob
from regimen.lab.experiment import Arm, Claim, Paper, SeedResults
from regimen.objectives import ClippedSurrogateObjective, EntropyBonus, Objective, ReinforceObjective, SFTObjective
from regimen.regimen import Prepare, Regimen, Stage
from regimen.rewards.answers import AnswerReward
from regimen.tasks.worlds.solved_problems import SolvedProblemsWorld
from regimen.tasks.worlds.targets import TargetsWorld
from regimen.update import Update


@dataclass(frozen=True)
class Settings:
    """Numbers of the experiment.

    Attributes:
        world: what is asked: to make `"targets"`, or `"problems"` with worked solutions.
        numbers, demonstrated, corrupted, dim, held_out, drawn: of `TargetsWorld`.
        warm_up, warm_up_learning_rate: of the common start, imitation alone.
        steps: iterations, in every arm.
        answers: sampled in each, the probes' shared out over them included, in groups of `group_size`.
        demonstrations: imitated in each.
        probe: answers of a probe, every `every` iterations.
        start, low, high: of the weight of imitation where it is moved.
        meta_lr, entropy_lr: of the controllers.
        micro_batch: samples per backward pass, to save memory; device: where the policy is trained.
        model, train, test, lora_rank, dtype, max_new_tokens: of `SolvedProblemsWorld`.
    """

    world: Literal["targets", "problems"] = "targets"
    numbers: int = 4
    demonstrated: int = 2000
    corrupted: float = 0.25
    dim: int = 64
    held_out: int = 200
    drawn: int = 12_000
    warm_up: int = 1500
    warm_up_learning_rate: float = 2e-3
    steps: int = 80
    answers: int = 80
    group_size: int = 8
    demonstrations: int = 32
    probe: int = 160
    every: int = 10
    learning_rate: float = 1e-3
    clip: float = 0.2
    entropy_weight: float = 0.01
    start: float = 0.8
    low: float = 0.05
    high: float = 0.95
    meta_lr: float = 0.5
    entropy_lr: float = 0.01
    evaluate_every: int = 40
    micro_batch: int | None = None
    device: str = "cpu"
    model: str = "Qwen/Qwen2.5-Math-7B"
    train: str = "Elliott/Openr1-Math-46k-8192"
    test: str = "HuggingFaceH4/MATH-500"
    lora_rank: int | None = None
    dtype: str = "bfloat16"
    max_new_tokens: int = 2048


def targets(seed: int, s: Settings) -> TargetsWorld:
    """Expressions that make a target, by a small decoder."""
    return TargetsWorld(
        seed,
        s.numbers,
        demonstrated=s.demonstrated,
        corrupted=s.corrupted,
        dim=s.dim,
        held_out=s.held_out,
        drawn=s.drawn,
    )


def problems(seed: int, s: Settings) -> SolvedProblemsWorld:
    """Problems with worked solutions, by a pre-trained model."""
    return SolvedProblemsWorld(s.model, s.train, s.test, s.lora_rank, s.dtype, s.max_new_tokens, s.held_out)


WORLDS: dict[str, Callable[[int, Settings], Any]] = {"targets": targets, "problems": problems}
"""By name: `(seed, settings) -> world`, which gives policy, tasks and verifier."""


class Parts:
    """The world, the policy, the losses and the stages that the arms are made of."""

    def __init__(self, seed: int, settings: Settings) -> None:
        self.settings = settings
        self.world = WORLDS[settings.world](seed, settings)
        self.cast = Cast(policy=self.world.policy().to(settings.device))
        self.imitation = SFTObjective().on("demonstrations")

    @property
    def reinforcement(self) -> Objective:
        """The loss of the policy's own answers."""
        surrogate = ClippedSurrogateObjective(clip=self.settings.clip, aggregate="token")
        return (surrogate - self.settings.entropy_weight * EntropyBonus()).on("questions")

    def regimen(self, *stages: Stage) -> Regimen:
        """A regimen evaluated on held-out questions."""
        return Regimen(self.cast, stages, evaluations=[self.world.questions("questions", "train", 1)])

    def imitate(self, steps: int, learning_rate: float) -> Stage:
        """Imitation alone."""
        update = self._update(self.imitation, learning_rate)
        return Stage("imitate", [self._demonstrations()], steps, self.settings.demonstrations, updates=[update])

    def reinforce(self, steps: int, answers: int) -> Stage:
        """Reinforcement alone."""
        s = self.settings
        return Stage(
            "reinforce", [self._questions()], steps, answers, self._correct(), self._credit(),
            [self._update(self.reinforcement, s.learning_rate)], evaluate_every=s.evaluate_every,
        )  # fmt: skip

    def mixed(self, controller: Controller, weight: float, answers: int, prepare: Sequence[Prepare] = ()) -> Stage:
        """Both in every step: `(1 - mu) * reinforcement + mu * imitation`."""
        s, mu = self.settings, Knob("sft_weight", weight, 0.0, 1.0)
        loss = (1 - mu) * self.reinforcement + mu * self.imitation
        return Stage(
            "mixed",
            [self._questions(), self._demonstrations()],
            s.steps,
            answers + s.demonstrations,
            self._correct(),
            self._credit(),
            [self._update(loss, s.learning_rate)],
            controllers=[controller],
            prepare=prepare,
            knobs={"mixture/questions": answers, "mixture/demonstrations": s.demonstrations},
            evaluate_every=s.evaluate_every,
        )

    def probe(self) -> Probe:
        """Answers to validation questions, whose reward is held out."""
        s = self.settings
        task = self.world.questions("probe", "validation", s.group_size)
        # The sum over an answer's tokens: the gradient of the expected reward.
        held_out = ReinforceObjective(aggregate="constant", horizon=1)
        # Advantages without a deviation, which would weight the prompts.
        return Probe(task, s.probe, self._correct(), GroupRelativeAdvantage(std=None), held_out)

    def _questions(self) -> Any:
        return self.world.questions("questions", "train", self.settings.group_size)

    def _demonstrations(self) -> Any:
        return self.world.demonstrations()

    def _correct(self) -> AnswerReward:
        return AnswerReward(self.world.verifier, tag=self.world.read_answer, expected=self.world.expected)

    def _credit(self) -> GroupRelativeAdvantage:
        # Demonstrations are judged too, and must not count in the deviation of answers.
        return GroupRelativeAdvantage(std="task")

    def _update(self, loss: Objective, learning_rate: float) -> Update:
        return Update(loss, learning_rate=learning_rate, micro_batch=self.settings.micro_batch)


def base(seed: int, s: Settings) -> Regimen:
    """The common start: imitation for a while."""
    parts = Parts(seed, s)
    return parts.regimen(parts.imitate(s.warm_up, s.warm_up_learning_rate))


def imitation(seed: int, s: Settings) -> Regimen:
    """Imitation alone; it samples nothing."""
    parts = Parts(seed, s)
    return parts.regimen(parts.imitate(s.steps, s.learning_rate))


def reinforcement(seed: int, s: Settings) -> Regimen:
    """Reinforcement alone."""
    parts = Parts(seed, s)
    return parts.regimen(parts.reinforce(s.steps, s.answers))


def sequence(seed: int, s: Settings) -> Regimen:
    """Imitation for half of the steps, then reinforcement with all the answers."""
    parts, half = Parts(seed, s), s.steps // 2
    return parts.regimen(parts.imitate(half, s.learning_rate), parts.reinforce(s.steps - half, 2 * s.answers))


def fixed(weight: float, seed: int, s: Settings) -> Regimen:
    """A weight of imitation that stays."""
    parts = Parts(seed, s)
    return parts.regimen(parts.mixed(Schedule("sft_weight", Constant(weight)), weight, s.answers))


def moving(seed: int, s: Settings, meta_lr: float) -> Regimen:
    """A weight of imitation that is learned; without a meta-gradient it follows the entropy target alone."""
    parts = Parts(seed, s)
    probes = meta_lr > 0
    controller = MetaGradientWeight(
        "sft_weight",
        parts.probe() if probes else None,
        low=s.low,
        high=s.high,
        meta_lr=meta_lr,
        entropy_lr=s.entropy_lr,
        every=s.every,
    )
    answers = s.answers - (s.probe // s.every if probes else 0)
    return parts.regimen(parts.mixed(controller, s.start, answers, [TargetEntropy(controller, size=s.demonstrations)]))


def amft(seed: int, s: Settings) -> Regimen:
    """The method; what its probes sample, its steps sample less."""
    return moving(seed, s, s.meta_lr)


def entropy_only(seed: int, s: Settings) -> Regimen:
    """The method without the meta-gradient."""
    return moving(seed, s, 0.0)


def ahead(others: Sequence[str], seed: SeedResults, slack: float = 0.0) -> float:
    """Solve rate of the method minus the mean of other arms', plus a slack."""
    rates = [seed[other].final["questions/solved"] for other in others]
    return seed["amft"].final["questions/solved"] - sum(rates) / len(rates) + slack


FIXED = ("fixed_20", "fixed_50", "fixed_80")
BEST = "fixed_20"
"""The weight that was best on the seeds on which settings were chosen."""

TRAINED = (
    *("steps", "answers", "group_size", "probe", "every", "learning_rate", "clip", "entropy_weight"),
    *("start", "low", "high", "meta_lr", "entropy_lr", "evaluate_every"),
)
"""Settings that the common start does not depend on."""

PAPER = Paper(
    slug="amft",
    title="AMFT: Aligning LLM Reasoners by Meta-Learning the Optimal Imitation-Exploration Balance",
    arxiv="2508.06944",
    verb="adapt, learn",
    policy="token",
    claim="A weight of imitation that follows the gradient of held-out reward and an entropy target does as well as "
    "the best fixed weight without being tuned, and better than imitation, reinforcement, or one after the other.",
    arms=[
        Arm("base", "base (warmed up)", base, cached=True, ignores=TRAINED),
        Arm("imitation", "imitation", imitation, start="base"),
        Arm("reinforcement", "reinforcement", reinforcement, start="base"),
        Arm("sequence", "imitation, then reinforcement", sequence, start="base"),
        Arm("fixed_20", "weight 0.2", partial(fixed, 0.2), start="base"),
        Arm("fixed_50", "weight 0.5", partial(fixed, 0.5), start="base"),
        Arm("fixed_80", "weight 0.8", partial(fixed, 0.8), start="base"),
        Arm("entropy_only", "weight by entropy", entropy_only, start="base"),
        Arm("amft", "weight by meta-gradient and entropy", amft, start="base"),
    ],
    claims=[
        Claim(
            "near_best_fixed",
            "Solved, method minus the best fixed weight, plus 0.03",
            partial(ahead, (BEST,), slack=0.03),
            ["amft", BEST],
        ),
        Claim(
            "above_mean_fixed",
            "Solved, method minus the mean of the fixed weights",
            partial(ahead, FIXED),
            ["amft", *FIXED],
        ),
        Claim(
            "above_sequence",
            "Solved, method minus imitation, then reinforcement",
            partial(ahead, ("sequence",)),
            ["amft", "sequence"],
        ),
        Claim(
            "above_reinforcement",
            "Solved, method minus reinforcement",
            partial(ahead, ("reinforcement",)),
            ["amft", "reinforcement"],
        ),
        Claim(
            "above_imitation", "Solved, method minus imitation", partial(ahead, ("imitation",)), ["amft", "imitation"]
        ),
        Claim(
            "above_entropy_only",
            "Solved, method minus the method without meta-gradient",
            partial(ahead, ("entropy_only",)),
            ["amft", "entropy_only"],
            judged=False,
        ),
    ],
    metrics={
        "questions/solved": "solved",
        "questions/sampled": "solved by a sampled answer",
        "questions/unseen": "solved, targets never trained on",
    },
    scales={
        "quick": Settings(
            demonstrated=100,
            drawn=1000,
            warm_up=10,
            steps=6,
            answers=16,
            probe=16,
            every=2,
            demonstrations=8,
            held_out=20,
        ),
        "default": Settings(),
        "full": Settings(
            world="problems",
            device="cuda",
            warm_up=50,
            warm_up_learning_rate=1e-5,
            steps=500,
            answers=128,
            demonstrations=32,
            probe=128,
            every=20,
            learning_rate=1e-5,
            micro_batch=4,
            lora_rank=64,
            evaluate_every=100,
        ),
    },
    requires={"full": "peft"},
)
