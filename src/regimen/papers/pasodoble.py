"""PasoDoble (arXiv 2511.11881): two policies that train each other, one writing questions, the other answering them.

Claim: a solver that is trained only on questions and answers of a proposer that is trained beside it gets better on
held-out questions, more than with a proposer that stays as it was; what the proposer is not rewarded for (questions
that nobody solves, or that are like the last ones) keeps the game from collapsing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from regimen.cast import Cast
from regimen.controllers import Phase, Phases, Piecewise, Schedule
from regimen.credit import GroupRelativeAdvantage, PassRateSelector
from regimen.knobs import Knob
from regimen.lab.experiment import Arm, Claim, Paper, SeedResults
from regimen.memory import QuestionMemory
from regimen.objectives import ClippedSurrogateObjective, SFTObjective
from regimen.regimen import Regimen, Stage
from regimen.rewards.answers import AnswerReward
from regimen.rewards.chance import ChanceReward
from regimen.rewards.expression import Expression
from regimen.rewards.questions import PassRate, ProposerReward, QuestionDiversity, QuestionGuard
from regimen.tasks.dataset import DatasetTask
from regimen.tasks.dual_play import PROPOSER, SOLVER, QuestionReview
from regimen.tasks.worlds.proposed_chains import ProposedChainsWorld
from regimen.tasks.worlds.proposed_problems import ProposedProblemsWorld
from regimen.update import Epochs, Update

REVIEW = "review"


@dataclass(frozen=True)
class Settings:
    """Numbers of the experiment.

    Attributes:
        world: what is asked: `"chains"` of arithmetic, or `"problems"` about pieces of text.
        longest, noise, layers, dim: of `ProposedChainsWorld`.
        fact_steps, text_steps, text_batch, pretrain_learning_rate: of the chains' common start, supervised training on
            facts and then on texts of both roles.
        held_out: questions of the evaluation.
        steps: iterations, in every arm.
        pieces: of knowledge in each; proposals: about a piece; answers: to a proposal.
        low, high: a question is learned from whose pass rate is between them.
        base, diversity_weight, diversity_floor, history, similar: of the proposer's reward.
        writes, reviews: of the offline variant, gradient steps of the proposer and then of the solver.
        micro_batch: samples per backward pass, to save memory; device: where the policies are trained.
        model, knowledge, test, lora_rank, dtype, max_new_tokens: of `ProposedProblemsWorld`.
    """

    world: Literal["chains", "problems"] = "chains"
    longest: int = 5
    noise: float = 0.12
    layers: int = 2
    dim: int = 64
    fact_steps: int = 120
    text_steps: int = 500
    text_batch: int = 32
    pretrain_learning_rate: float = 3e-3
    held_out: int = 400
    steps: int = 40
    pieces: int = 2
    proposals: int = 8
    answers: int = 8
    learning_rate: float = 1e-4
    clip: float = 0.2
    low: float = 0.2
    high: float = 1.0
    base: float = 0.1
    diversity_weight: float = 0.2
    diversity_floor: float = 0.3
    history: int = 100
    similar: float = 0.8
    writes: int = 10
    reviews: int = 5
    evaluate_every: int | None = 20
    micro_batch: int | None = None
    device: str = "cpu"
    model: str = "Qwen/Qwen3-1.7B-Base"
    knowledge: str = "YouAreSpecialToMe/filtered_MegaMath"
    test: str = "HuggingFaceH4/MATH-500"
    lora_rank: int | None = None
    dtype: str = "bfloat16"
    max_new_tokens: int = 6144


def chains(seed: int, s: Settings) -> ProposedChainsWorld:
    """Chained arithmetic, by a small decoder."""
    return ProposedChainsWorld(seed, s.longest, noise=s.noise, layers=s.layers, dim=s.dim, held_out=s.held_out)


def problems(seed: int, s: Settings) -> ProposedProblemsWorld:
    """Problems about pieces of text, by a pre-trained model."""
    return ProposedProblemsWorld(s.model, s.knowledge, s.test, s.lora_rank, s.dtype, s.max_new_tokens, s.held_out)


WORLDS: dict[str, Callable[[int, Settings], Any]] = {"chains": chains, "problems": problems}
"""By name: `(seed, settings) -> world`, which gives policy, tasks, verifier and the rules of questions."""


class Parts:
    """The world, the cast and the stages that the arms are made of."""

    def __init__(self, seed: int, settings: Settings, ruled: bool = True) -> None:
        """Unless `ruled`, every question is worth something, whoever solves it and whatever it is like."""
        self.seed, self.settings, self.ruled = seed, settings, ruled
        self.world = WORLDS[settings.world](seed, settings)
        self.cast = Cast(solver=self.world.policy().to(settings.device))

    @property
    def low(self) -> float:
        """The pass rate above which a question is taken for valid."""
        return self.settings.low if self.ruled else -0.01

    def fork(self) -> None:
        """Give the cast a proposer, which begins as the solver does."""
        self.cast = Cast(solver=self.cast[SOLVER], proposer=self.world.policy().to(self.settings.device))
        self.cast.start(PROPOSER, of=SOLVER)

    def regimen(self, *stages: Stage) -> Regimen:
        """A regimen evaluated on held-out questions."""
        proposer = PROPOSER if PROPOSER in self.cast else SOLVER
        return Regimen(self.cast, stages, evaluations=[self.world.play(2, 2, proposer)])

    def read(self, name: str, tasks: Sequence[DatasetTask], steps: int, batch_size: int) -> Stage:
        """Supervised training on the first task, with a few of the others; its rate warmed up and later lowered."""
        rate = self.settings.pretrain_learning_rate
        points = [(0, rate / 50), (30, rate), (steps // 2 + 31, rate), (steps + 32, rate / 10)]
        update = Update(
            SFTObjective(member=SOLVER),
            [SOLVER],
            Knob("learning_rate", rate),
            options={"betas": (0.9, 0.99), "weight_decay": 0.0},
        )
        moving = [Schedule("learning_rate", Piecewise(points, linear=True))]
        few = {f"mixture/{task.name}": 0.3 for task in tasks[1:]}
        return Stage(name, tasks, steps, batch_size, updates=[update], controllers=moving, knobs=few)

    def tokens(self, question: str) -> list[int]:
        """A question as the policies read it, by which questions are compared."""
        return list(self.cast[SOLVER].encode_answer(question).tolist())

    def judged(self, chance: bool = False) -> Expression:
        """Whether an answer is the proposer's own; what a proposal is worth; and, logged, what that is made of."""
        s, world = self.settings, self.world
        answer = ChanceReward(seed=self.seed, name="correct") if chance else AnswerReward(
            world.verifier, tag=world.read_answer, expected="reference"
        )  # fmt: skip
        correct, guard = answer.on(SOLVER, REVIEW), QuestionGuard(world.rules)
        rate = PassRate(correct, guard)
        diversity = QuestionDiversity(rate, low=self.low, history=s.history, similar=s.similar, tokens=self.tokens)
        floor, weight = (s.diversity_floor, s.diversity_weight) if self.ruled else (-1.0, 0.0)
        proposal = ProposerReward(
            rate, diversity, low=self.low, diversity_floor=floor, base=s.base, diversity_weight=weight
        )
        return correct + proposal + rate.logged() + diversity.logged() + guard.logged()

    def credit(self) -> PassRateSelector:
        """Groups are compared within themselves; answers count whose question is neither too easy nor too hard."""
        return PassRateSelector(GroupRelativeAdvantage(), self.low, self.settings.high, of=[SOLVER, REVIEW])

    def update(self, role: str, task: str) -> Update:
        """One role learns from the samples of a task, with its own optimiser."""
        s = self.settings
        longest = next(int(knob.default) for knob in self.cast[role].knobs if knob.name == "max_new_tokens")
        loss = ClippedSurrogateObjective(s.clip, aggregate="constant", horizon=longest, member=role)
        return Update(loss, [role], s.learning_rate, batches=Epochs(tasks=[task]), micro_batch=s.micro_batch)

    def play(self, *roles: str, chance: bool = False) -> Stage:
        """Both write and answer; those that are named learn."""
        s, task = self.settings, self.world.play(self.settings.proposals, self.settings.answers)
        return Stage(
            "play", [task], s.steps, s.pieces * task.group_size, self.judged(chance), self.credit(),
            [self.update(role, role) for role in roles], evaluate_every=s.evaluate_every,
        )  # fmt: skip

    def take_turns(self) -> Stage:
        """The proposer learns and fills a buffer of questions; then the solver learns from those; and again."""
        s, task = self.settings, self.world.play(self.settings.proposals, self.settings.answers)
        memory = QuestionMemory(s.low, s.high)
        review = QuestionReview(REVIEW, memory, solve=task.solve, answers=s.answers)
        write = Phase({"mixture/play": 1.0, "mixture/review": 0.0}, PROPOSER, s.writes, 2 * s.writes)
        answer = Phase(
            {"mixture/play": 0.0, "mixture/review": 1.0}, SOLVER, s.reviews, 2 * s.reviews, lambda: not memory.questions
        )
        phases = Phases([write, answer])
        return Stage(
            "turns", [task, review], s.steps, s.pieces * task.group_size, self.judged(), self.credit(),
            [self.update(PROPOSER, PROPOSER), self.update(SOLVER, REVIEW)], [phases], memory=memory,
            knobs=phases.first, evaluate_every=s.evaluate_every,
        )  # fmt: skip


def base(seed: int, s: Settings) -> Regimen:
    """The common start: facts, then noisy texts of both roles; a pre-trained model as it is."""
    parts = Parts(seed, s)
    if s.world == "problems":
        return parts.regimen(Stage("start", [parts.world.play(2, 2, SOLVER)], 0))
    policy = parts.cast[SOLVER]
    facts, corpus = parts.world.facts(policy), parts.world.corpus(policy, s.text_batch * s.text_steps // 4)
    return parts.regimen(
        parts.read("facts", [facts], s.fact_steps, len(facts.rows)),
        parts.read("corpus", [corpus, facts], s.text_steps, s.text_batch),
    )


def played(seed: int, s: Settings, roles: Sequence[str], ruled: bool = True, chance: bool = False) -> Regimen:
    """An arm from the common start."""
    parts = Parts(seed, s, ruled)
    parts.fork()
    return parts.regimen(parts.play(*roles, chance=chance))


def dual(seed: int, s: Settings) -> Regimen:
    """The method: both learn."""
    return played(seed, s, (PROPOSER, SOLVER))


def frozen(seed: int, s: Settings) -> Regimen:
    """The proposer stays as it was."""
    return played(seed, s, (SOLVER,))


def unruled(seed: int, s: Settings) -> Regimen:
    """Both learn; also questions that nobody solves, or that are like the last ones, are worth something."""
    return played(seed, s, (PROPOSER, SOLVER), ruled=False)


def by_chance(seed: int, s: Settings) -> Regimen:
    """The control: whether an answer is right is drawn by chance."""
    return played(seed, s, (PROPOSER, SOLVER), chance=True)


def offline(seed: int, s: Settings) -> Regimen:
    """The variant in which the roles learn by turns, over a buffer of questions."""
    parts = Parts(seed, s)
    parts.fork()
    return parts.regimen(parts.take_turns())


def difference(metric: str, one: str, other: str, seed: SeedResults) -> float:
    """One arm minus another on a metric."""
    return seed[one].final[f"play/{metric}"] - seed[other].final[f"play/{metric}"]


def claim(name: str, text: str, other: str, metric: str = "accuracy", judged: bool = True) -> Claim:
    """The method minus another arm."""
    return Claim(name, text, partial(difference, metric, "dual", other), ["dual", other], judged=judged)


PLAYED = (
    *("steps", "pieces", "proposals", "answers", "learning_rate", "clip", "low", "high", "base", "diversity_weight"),
    *("diversity_floor", "history", "similar", "writes", "reviews", "evaluate_every", "micro_batch"),
)
"""Settings that the common start does not depend on."""

PAPER = Paper(
    slug="pasodoble",
    title="Better LLM Reasoning via Dual-Play",
    arxiv="2511.11881",
    verb="collect, judge",
    policy="token",
    claim="A solver that is trained only on questions and answers of a proposer that is trained beside it gets better "
    "on held-out questions, more than with a frozen proposer, and than without a validity threshold and diversity.",
    arms=[
        Arm("base", "base (noisy texts of both roles)", base, cached=True, ignores=PLAYED),
        Arm("dual", "both learn", dual, start="base"),
        Arm("frozen", "frozen proposer", frozen, start="base"),
        Arm("unruled", "both learn, no threshold, no diversity", unruled, start="base"),
        Arm("chance", "both learn, answers right by chance", by_chance, start="base", extended=True),
        Arm("offline", "both learn, by turns", offline, start="base", extended=True),
    ],
    claims=[
        claim("above_start", "Accuracy of sampled answers, both learn minus the start", "base"),
        claim("above_frozen", "Accuracy of sampled answers, both learn minus a frozen proposer", "frozen"),
        claim("above_unruled", "Accuracy of sampled answers, minus without threshold and diversity", "unruled"),
        claim("true", "True reference answers, minus without threshold and diversity", "unruled", "true", False),
        claim("distinct", "Distinct questions, minus without threshold and diversity", "unruled", "distinct", False),
        claim("greedy", "Accuracy of likeliest answers, both learn minus the start", "base", "greedy_accuracy", False),
    ],
    metrics={
        "play/accuracy": "accuracy (sampled)",
        "play/greedy_accuracy": "accuracy (likeliest)",
        "play/accuracy_4": "4 operands",
        "play/accuracy_5": "5 operands",
        "play/formed": "well-formed proposals",
        "play/true": "true reference answers",
        "play/distinct": "distinct questions",
        "play/operands": "operands of questions",
    },
    scales={
        "quick": Settings(
            fact_steps=10, text_steps=30, held_out=40, steps=6, pieces=1, proposals=4, answers=4, writes=2, reviews=1,
            evaluate_every=None,
        ),
        "default": Settings(),
        "full": Settings(
            world="problems", device="cuda", steps=2000, pieces=1, proposals=6, answers=6, learning_rate=1e-6,
            evaluate_every=200, micro_batch=4,
        ),
    },
    requires={"full": "math-verify"},
)  # fmt: skip
