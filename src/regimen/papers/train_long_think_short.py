"""Train Long, Think Short (arXiv 2508.08940): a token budget that shrinks while the policy learns.

Claim: at the same final budget and as many updates, a budget that shrinks in steps leaves a more accurate policy than
one that is tight from the start, at about the same number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from regimen.cast import Cast
from regimen.controllers import Constant, Curve, Piecewise, Schedule, Steps
from regimen.credit import GroupRelativeAdvantage
from regimen.knobs import Knob
from regimen.lab.experiment import Arm, Claim, Paper, SeedResults
from regimen.objectives import ClippedSurrogateObjective, SFTObjective
from regimen.regimen import Regimen, Stage
from regimen.rewards.answers import AnswerReward
from regimen.rewards.expression import Expression
from regimen.rewards.text import LengthReward, TagFormatReward
from regimen.tasks.dataset import DatasetTask
from regimen.tasks.worlds.chains import ChainsWorld
from regimen.tasks.worlds.gsm8k import GSM8KWorld
from regimen.update import Epochs, Update

CORRECT, LENGTH, FORMAT = 0.6, 0.3, 0.1
"""Weights of the reward's components."""


@dataclass(frozen=True)
class Settings:
    """Numbers of the experiment.

    Attributes:
        world: what is asked: `"chains"` of arithmetic, or `"gsm8k"`.
        digits, modulus, restate, layers: of `ChainsWorld`.
        fact_steps, trace_steps, trace_batch, pretrain_learning_rate: of the chains' common start, supervised training
            on facts and then on verbose traces.
        steps: iterations of reinforcement, in every arm.
        batch_size: answers per iteration, in groups of `group_size`.
        minibatches: gradient steps per iteration.
        start_budget, final_budget: tokens; every arm is evaluated under the final one.
        tighter_budget: a final budget that forces steps of a chain to be skipped.
        drops: of the budget, at equal distances.
        max_new_tokens: longest answer, the same in every arm.
        held_out: questions of the evaluation.
        device: where the policy is trained; micro_batch: samples per backward pass, to save memory.
        model, train, test, rule, lora_rank, dtype: of `GSM8KWorld`.
    """

    world: Literal["chains", "gsm8k"] = "chains"
    digits: int = 4
    modulus: int = 5
    restate: int = 4
    layers: int = 2
    fact_steps: int = 150
    trace_steps: int = 2300
    trace_batch: int = 16
    pretrain_learning_rate: float = 2e-3
    steps: int = 100
    batch_size: int = 192
    group_size: int = 8
    minibatches: int = 1
    learning_rate: float = 3e-4
    clip: float = 0.2
    start_budget: int = 48
    final_budget: int = 24
    tighter_budget: int = 16
    drops: int = 3
    max_new_tokens: int = 80
    held_out: int = 500
    evaluate_every: int = 20
    device: str = "cpu"
    micro_batch: int | None = None
    model: str = "Qwen/Qwen2.5-7B"
    train: str = "openai/gsm8k"
    test: str = "openai/gsm8k"
    rule: Literal["numeric", "math-verify"] = "numeric"
    lora_rank: int | None = None
    dtype: str = "bfloat16"


def chains(seed: int, s: Settings) -> ChainsWorld:
    """Chained arithmetic for a small decoder."""
    return ChainsWorld(seed, s.digits, s.modulus, s.restate, s.layers, s.start_budget, s.max_new_tokens, s.held_out)


def gsm8k(seed: int, s: Settings) -> GSM8KWorld:
    """Word problems for a pre-trained model."""
    return GSM8KWorld(s.model, s.train, s.test, s.rule, s.lora_rank, s.dtype, s.max_new_tokens, s.held_out)


WORLDS: dict[str, Callable[[int, Settings], Any]] = {"chains": chains, "gsm8k": gsm8k}
"""By name: `(seed, settings) -> world`, which gives policy, questions and verifier."""


class Parts:
    """The world, the policy and the stages that the arms are made of."""

    def __init__(self, seed: int, settings: Settings) -> None:
        self.settings = settings
        self.world = WORLDS[settings.world](seed, settings)
        self.cast = Cast(policy=self.world.policy().to(settings.device))

    def regimen(self, *stages: Stage, budget: int) -> Regimen:
        """A regimen evaluated on held-out questions under a budget."""
        return Regimen(self.cast, stages, evaluations=[self.world.questions(1, budget)])

    def demonstrate(self, task: DatasetTask, steps: int, batch_size: int) -> Stage:
        """Supervised training, its learning rate warmed up and later lowered."""
        rate = self.settings.pretrain_learning_rate
        points = [(0, rate / 50), (50, rate), (steps // 2 + 51, rate), (steps + 52, rate / 10)]
        update = Update(
            SFTObjective(),
            learning_rate=Knob("learning_rate", rate),
            options={"betas": (0.9, 0.99), "weight_decay": 0.0},
        )
        moving = [Schedule("learning_rate", Piecewise(points, linear=True))]
        return Stage(task.name, [task], steps, batch_size, updates=[update], controllers=moving)

    def judged(self, correct: float, length: float, shape: Literal["triangular", "band"]) -> Expression:
        """The reward: the answer, its length against the budget in force, the format of the tags."""
        return (
            correct * AnswerReward(self.world.verifier, tag="answer")
            + length * LengthReward(shape)
            + FORMAT * TagFormatReward(("think", "answer"), prefix=self.world.opened)
        )

    def reinforce(self, curve: Curve, reward: Expression, budget: int) -> Stage:
        """Group-relative reinforcement under a budget that follows a curve."""
        s = self.settings
        return Stage(
            "reinforce",
            [self.world.questions(s.group_size, budget)],
            s.steps,
            s.batch_size,
            reward=reward,
            credit=GroupRelativeAdvantage(ddof=0),
            updates=[
                Update(
                    ClippedSurrogateObjective(clip=s.clip),
                    learning_rate=s.learning_rate,
                    batches=Epochs(1, s.minibatches),
                    micro_batch=s.micro_batch,
                )
            ],
            controllers=[Schedule("token_budget", curve)],
            evaluate_every=s.evaluate_every,
        )


def base(seed: int, s: Settings) -> Regimen:
    """The common start: facts, then verbose traces; a pre-trained model as it is."""
    parts = Parts(seed, s)
    if s.world == "gsm8k":
        return parts.regimen(Stage("start", [parts.world.questions(1, s.final_budget)], 0), budget=s.final_budget)
    facts = parts.world.facts(parts.cast["policy"])
    traces = parts.world.traces(parts.cast["policy"], s.trace_batch * s.trace_steps // 2)
    return parts.regimen(
        parts.demonstrate(facts, s.fact_steps, len(facts.rows)),
        parts.demonstrate(traces, s.trace_steps, s.trace_batch),
        budget=s.final_budget,
    )


def shrinking(s: Settings, end: int, kind: Literal["exponential", "linear"] = "exponential") -> Curve:
    """The paper's schedule: equal drops, each budget for as many iterations."""
    return Steps(s.start_budget, end, s.drops, s.steps, kind)


def reinforced(
    seed: int,
    s: Settings,
    curve: Curve,
    budget: int,
    correct: float = CORRECT,
    length: float = LENGTH,
    shape: Literal["triangular", "band"] = "triangular",
) -> Regimen:
    """An arm: from the common start, under a curve of budgets that ends at `budget`."""
    parts = Parts(seed, s)
    return parts.regimen(parts.reinforce(curve, parts.judged(correct, length, shape), budget), budget=budget)


def fixed(seed: int, s: Settings) -> Regimen:
    """The baseline: the final budget from the start."""
    return reinforced(seed, s, Constant(s.final_budget), s.final_budget)


def curriculum(seed: int, s: Settings) -> Regimen:
    """The method: the budget shrinks by equal factors."""
    return reinforced(seed, s, shrinking(s, s.final_budget), s.final_budget)


def no_length(seed: int, s: Settings) -> Regimen:
    """The final budget is stated and length is not rewarded."""
    return reinforced(seed, s, Constant(s.final_budget), s.final_budget, length=0.0)


def linear(seed: int, s: Settings) -> Regimen:
    """The budget shrinks by equal differences."""
    return reinforced(seed, s, shrinking(s, s.final_budget, "linear"), s.final_budget)


def band(seed: int, s: Settings) -> Regimen:
    """Any length up to the shrinking budget is as good as another."""
    return reinforced(seed, s, shrinking(s, s.final_budget), s.final_budget, shape="band")


def heavy_fixed(seed: int, s: Settings) -> Regimen:
    """The baseline where length counts twice as much as the answer."""
    return reinforced(seed, s, Constant(s.final_budget), s.final_budget, LENGTH, CORRECT)


def heavy_curriculum(seed: int, s: Settings) -> Regimen:
    """The method where length counts twice as much as the answer."""
    return reinforced(seed, s, shrinking(s, s.final_budget), s.final_budget, LENGTH, CORRECT)


def tight_fixed(seed: int, s: Settings) -> Regimen:
    """The baseline at a budget that forces steps to be skipped."""
    return reinforced(seed, s, Constant(s.tighter_budget), s.tighter_budget)


def tight_curriculum(seed: int, s: Settings) -> Regimen:
    """The method down to a budget that forces steps to be skipped."""
    return reinforced(seed, s, shrinking(s, s.tighter_budget), s.tighter_budget)


def difference(metric: str, one: str, other: str, seed: SeedResults) -> float:
    """One arm minus another on a metric."""
    return seed[one].final[f"questions/{metric}"] - seed[other].final[f"questions/{metric}"]


def length_margin(one: str, other: str, seed: SeedResults) -> float:
    """How far the relative difference of two arms' mean tokens stays below 0.15."""
    ratio = seed[one].final["questions/tokens"] / seed[other].final["questions/tokens"]
    return 0.15 - abs(ratio - 1)


REINFORCEMENT = (
    *("steps", "batch_size", "group_size", "minibatches", "learning_rate", "clip"),
    *("tighter_budget", "drops", "evaluate_every", "micro_batch"),
)
"""Settings that the common start does not depend on."""

PAPER = Paper(
    slug="train-long-think-short",
    title="Train Long, Think Short: Curriculum Learning for Efficient Reasoning",
    arxiv="2508.08940",
    verb="adapt, judge",
    policy="token",
    claim="At the same final token budget and as many updates, a budget that shrinks in steps gives higher accuracy "
    "than one that is tight from the start, at about the same number of tokens.",
    arms=[
        Arm("base", "base (verbose traces)", base, cached=True, ignores=REINFORCEMENT),
        Arm("fixed", "fixed budget", fixed, start="base"),
        Arm("curriculum", "shrinking budget", curriculum, start="base"),
        Arm("no_length", "no length reward", no_length, start="base"),
        Arm("linear", "shrinking linearly", linear, start="base", extended=True),
        Arm("band", "shrinking, band", band, start="base", extended=True),
        Arm("heavy_fixed", "fixed, length-heavy", heavy_fixed, start="base", extended=True),
        Arm("heavy_curriculum", "shrinking, length-heavy", heavy_curriculum, start="base", extended=True),
        Arm("tight_fixed", "fixed, tighter budget", tight_fixed, start="base", extended=True),
        Arm("tight_curriculum", "shrinking, tighter budget", tight_curriculum, start="base", extended=True),
    ],
    claims=[
        Claim(
            "more_accurate",
            "Accuracy under the final budget, shrinking minus fixed",
            partial(difference, "accuracy", "curriculum", "fixed"),
            ["curriculum", "fixed"],
        ),
        Claim(
            "as_long",
            "0.15 minus the relative difference of their mean tokens",
            partial(length_margin, "curriculum", "fixed"),
            ["curriculum", "fixed"],
        ),
        Claim(
            "shorter_than_start",
            "Tokens of the start minus those under the shrinking budget",
            partial(difference, "tokens", "base", "curriculum"),
            ["curriculum", "base"],
            judged=False,
        ),
        Claim(
            "length_reward_shortens",
            "Tokens without length reward minus those under the fixed budget",
            partial(difference, "tokens", "no_length", "fixed"),
            ["no_length", "fixed"],
            judged=False,
        ),
        Claim(
            "length_heavy",
            "Accuracy where length counts twice as much as the answer, shrinking minus fixed",
            partial(difference, "accuracy", "heavy_curriculum", "heavy_fixed"),
            ["heavy_curriculum", "heavy_fixed"],
            judged=False,
        ),
    ],
    metrics={
        "questions/accuracy": "accuracy",
        "questions/tokens": "tokens",
        "questions/accuracy_cut": "accuracy when cut at 1.25 of the budget",
    },
    scales={
        "quick": Settings(fact_steps=20, trace_steps=30, steps=8, batch_size=32, held_out=100),
        "default": Settings(),
        "full": Settings(
            world="gsm8k",
            device="cuda",
            steps=600,
            batch_size=64,
            learning_rate=1e-5,
            start_budget=256,
            final_budget=87,
            tighter_budget=64,
            max_new_tokens=512,
            micro_batch=8,
            lora_rank=64,
        ),
    },
    requires={"full": "peft"},
)
