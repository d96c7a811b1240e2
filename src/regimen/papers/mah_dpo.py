"""MAH-DPO (arXiv 2510.01167): several objectives at once, each with preference pairs and a head of its own.

Claim: a model with a head for each objective, trained by head-specific DPO, improves all objectives at once where one
head trained on the same pairs gives one of them up; the heads' weights move the outcome when the model is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from typing import Any, Literal

from scipy.stats import spearmanr

from regimen.cast import Cast
from regimen.credit import HindsightValues, PairsPerObjective
from regimen.lab.experiment import Arm, Claim, Paper, SeedResults
from regimen.models import ProcessValue
from regimen.objectives import DPOObjective, SFTObjective, ValueObjective
from regimen.policies import GuidedDecoding, TokenPolicy
from regimen.regimen import Regimen, Stage
from regimen.rewards import FunctionReward
from regimen.tasks.base import Task
from regimen.tasks.worlds.rated_answers import RatedAnswers
from regimen.tasks.worlds.toned_sums import MEASURES, OBJECTIVES, TonedSums
from regimen.update import Epochs, Update


@dataclass(frozen=True)
class Settings:
    """Numbers of the experiment, the same in every arm.

    Attributes:
        world: `"sums"` with a tone, or `"ratings"` of answers (UltraFeedback), whose model is taken as it is.
        sft_steps, sft_batch, sft_rate: of the common start, imitation of noisy answers.
        rounds: how often pairs are collected, always from the common start.
        prompts: asked in a round, twice each; pairs: kept of them for each objective.
        epochs, minibatches: gradient steps on a round's pairs are their product.
        beta, rate: of preference learning.
        evaluated: answers of an evaluation; of the heads with other weights, `controlled`.
        value_steps, value_batch, value_rate, value_discount: of the process reward model.
        set_apart: questions that it is not trained on, and is tried on; candidates: ways to go on that are tried.
        device: where the networks are.
        model, data, records, lora_rank, longest: of `RatedAnswers`, with as many `rounds` of `3 * pairs` pairs.
        micro_batch: pairs per backward pass, to save memory.
    """

    world: Literal["sums", "ratings"] = "sums"
    sft_steps: int = 600
    sft_batch: int = 128
    sft_rate: float = 2e-3
    rounds: int = 10
    prompts: int = 960
    pairs: int = 400
    epochs: int = 5
    minibatches: int = 6
    beta: float = 0.1
    rate: float = 1e-3
    evaluated: int = 2000
    controlled: int = 500
    value_steps: int = 40
    value_batch: int = 256
    value_rate: float = 1e-3
    value_discount: float = 0.9
    set_apart: int = 20
    candidates: int = 5
    device: str = "cpu"
    model: str = "meta-llama/Llama-3.1-8B-Instruct"
    data: str = "openbmb/UltraFeedback"
    records: int = 20_000
    lora_rank: int | None = None
    longest: int = 768
    micro_batch: int | None = None


JUDGES = [FunctionReward(measure, name) for name, measure in MEASURES.items()]
"""The vector reward, a rule for each objective."""


class Parts:
    """The world, and the stages and evaluations that the arms are made of."""

    def __init__(self, seed: int, settings: Settings) -> None:
        self.settings, s = settings, settings
        self.sums = TonedSums(seed)
        self.ratings = RatedAnswers(s.model, s.data, records=s.records, lora_rank=s.lora_rank, longest=s.longest)
        world: Any = self.sums if s.world == "sums" else self.ratings
        self.one_head = lambda: world.policy().to(s.device)
        self.many_heads = lambda: world.multi_head().to(s.device)

    def cast(self, aligned: TokenPolicy) -> Cast:
        """The common start, which stays, and what is trained from there."""
        cast = Cast(policy=self.one_head(), aligned=aligned)
        if self.settings.world == "sums":
            cast.start("aligned", of="policy")
        return cast

    def imitate(self, cast: Cast) -> Stage:
        """The common start."""
        s = self.settings
        task = self.sums.demonstrations(cast["policy"], s.sft_batch * s.sft_steps // 4)
        return Stage(
            "imitate", [task], s.sft_steps, s.sft_batch, updates=[Update(SFTObjective(), learning_rate=s.sft_rate)]
        )

    def prefer(self, cast: Cast, keys: Sequence[str] = OBJECTIVES) -> Stage:
        """Preference learning of `aligned` on the pairs of some objectives, with the common start as reference."""
        s = self.settings
        heads = DPOObjective(
            beta=s.beta,
            reference="policy",
            recorded="logprobs" if s.world == "sums" else None,
            group_by="objective",
            member="aligned",
        )
        update = Update(
            heads,
            ["aligned"],
            learning_rate=s.rate,
            batches=Epochs(s.epochs, s.minibatches),
            micro_batch=s.micro_batch,
        )
        if s.world == "ratings":
            tasks = self.ratings.training(cast["policy"])
            return Stage("prefer", tasks, s.rounds, len(tasks) * s.pairs, updates=[update])
        return Stage(
            "prefer",
            [self.sums.questions("pairs", group_size=2)],
            s.rounds,
            2 * s.prompts,
            reward=reduce(add, JUDGES),
            credit=PairsPerObjective(keys, at_most=s.pairs),
            updates=[update],
        )

    def answers(self, cast: Cast, member: str) -> Task:
        """What a member is worth as it is."""
        if self.settings.world == "ratings":
            return self.ratings.answers(cast["policy"], member)
        return self.sums.questions("answers", evaluated=member, answers=self.settings.evaluated)

    def control(self) -> list[Task]:
        """What it is worth under other weights of the heads."""
        if self.settings.world == "ratings":
            return []
        ask, answers = self.sums.questions, self.settings.controlled
        return [ask(name, evaluated="aligned", knobs=knobs, answers=answers) for name, knobs in SETTINGS.items()]


def weights(correct: float, warm: float, short: float) -> dict[str, float]:
    """Knobs of the heads."""
    return {f"head/{name}": value for name, value in zip(OBJECTIVES, (correct, warm, short), strict=True)}


SWEEP = 11
SETTINGS = {
    **{f"head_{name}": weights(*(float(name == other) for other in OBJECTIVES)) for name in OBJECTIVES},
    **{f"sweep_{i}": weights(0.5, 0.5 * (1 - i / (SWEEP - 1)), 0.5 * i / (SWEEP - 1)) for i in range(SWEEP)},
}
"""One head alone; and half the weight on `correct`, the other half moved from `warm` to `short`."""


# The arms


def start(seed: int, s: Settings) -> Regimen:
    """The common start."""
    parts = Parts(seed, s)
    cast = Cast(policy=parts.one_head())
    evaluations = [parts.answers(cast, "policy")]
    stages = [parts.imitate(cast)] if s.world == "sums" else [Stage("start", evaluations, 0)]
    return Regimen(cast, stages, evaluations=evaluations)


def one_head(keys: Sequence[str], seed: int, s: Settings) -> Regimen:
    """The baseline: one head, trained on the pairs of some objectives."""
    if s.world == "ratings" and keys != OBJECTIVES:
        raise ValueError(f"the pairs of {', '.join(keys)} are of the world 'sums'; leave the arms only_... out")
    parts = Parts(seed, s)
    cast = parts.cast(parts.one_head())
    return Regimen(cast, [parts.prefer(cast, keys)], evaluations=[parts.answers(cast, "aligned")])


def heads(seed: int, s: Settings) -> Regimen:
    """The method: a head for each objective, evaluated with equal weights and with others."""
    parts = Parts(seed, s)
    cast = parts.cast(parts.many_heads())
    return Regimen(cast, [parts.prefer(cast)], evaluations=[parts.answers(cast, "aligned"), *parts.control()])


def guided(seed: int, s: Settings) -> Regimen:
    """A process reward model of right answers, and what decoding by it adds on questions that it was not trained on."""
    if s.world == "ratings":
        raise ValueError("arm 'guided' needs answers that a rule calls right, and the world is 'ratings'; leave it out")
    parts = Parts(seed, s)
    policy, aligned = parts.one_head(), parts.many_heads()
    process = ProcessValue(policy.network).to(s.device)
    several = {"guided": 1, "best_of": 99}
    samplers = {
        f"{name}_{kind}": GuidedDecoding(member, process.last, candidates=s.candidates, chunk=chunk)
        for kind, chunk in several.items()
        for name, member in {"start": policy, "heads": aligned}.items()
    }
    cast = Cast(policy=policy, aligned=aligned, process=process, **samplers)
    known, new = parts.sums.rows()[s.set_apart :], parts.sums.rows()[: s.set_apart]
    stage = Stage(
        "values",
        [parts.sums.questions("known", known)],
        s.value_steps,
        s.value_batch,
        reward=JUDGES[0],
        credit=HindsightValues("correct", s.value_discount),
        updates=[
            Update(
                ValueObjective(member="process", target="step_value", aggregate="sequence"),
                ["process"],
                learning_rate=s.value_rate,
                batches=Epochs(4, 4),
            )
        ],
    )
    plain = {"start_plain": "policy", "heads_plain": "aligned"}
    members = plain | {name: name for name in samplers}
    ask = partial(parts.sums.questions, rows=new, answers=s.evaluated)
    return Regimen(cast, [stage], evaluations=[ask(name, evaluated=member) for name, member in members.items()])


# What is claimed


def outcomes(arm: str, seed: SeedResults, task: str = "answers") -> dict[str, float]:
    """An arm's objectives, at the end."""
    final = seed[arm].final
    return {name.partition("/")[2]: value for name, value in final.items() if name.partition("/")[0] == task}


def gain(arm: str, objective: str, seed: SeedResults, task: str = "answers") -> float:
    """By how much an arm is better than the start on an objective."""
    return outcomes(arm, seed, task)[objective] - outcomes("start", seed)[objective]


def worst_gain(arm: str, seed: SeedResults) -> float:
    """By how much it is better on the objective where it is worst."""
    return min(gain(arm, objective, seed) for objective in outcomes("start", seed))


def balance(arm: str, other: str, seed: SeedResults) -> float:
    """One arm's worst gain minus another's."""
    return worst_gain(arm, seed) - worst_gain(other, seed)


def own_head(objective: str, seed: SeedResults) -> float:
    """The objective under its own head alone, minus the best of the other heads."""
    found = {name: outcomes("heads", seed, f"head_{name}")[objective] for name in OBJECTIVES}
    return found.pop(objective) - max(found.values())


def monotone(seed: SeedResults) -> float:
    """The smaller rank correlation of the sweep with the two objectives that it moves between."""
    found = [outcomes("heads", seed, f"sweep_{i}") for i in range(SWEEP)]
    ranks = [
        spearmanr(range(SWEEP), [sign * one[name] for one in found])[0] for name, sign in (("short", 1), ("warm", -1))
    ]
    return float(min(ranks))


def decoding(one: str, other: str, seed: SeedResults) -> float:
    """Right answers to new questions, one way of decoding minus another."""
    return outcomes("guided", seed, one)["correct"] - outcomes("guided", seed, other)["correct"]


def shown(name: str, text: str, value: Callable[[SeedResults], float], arms: Sequence[str]) -> Claim:
    """A number that takes no part in the verdict."""
    return Claim(name, text, value, arms, judged=False)


PAPER = Paper(
    slug="mah-dpo",
    title="Simultaneous Multi-objective Alignment Across Verifiable and Non-verifiable Rewards",
    arxiv="2510.01167",
    verb="learn, collect",
    policy="token",
    claim="With a head for each objective, trained by head-specific DPO, the equal mixture of heads improves every "
    "objective over the common start, where one head trained on the same pairs gives one of them up.",
    arms=[
        Arm(
            "start",
            "common start (SFT)",
            start,
            cached=True,
            ignores=(
                *("rounds", "prompts", "pairs", "epochs", "minibatches", "beta", "rate", "micro_batch"),
                *("value_steps", "value_batch", "value_rate", "value_discount", "set_apart", "candidates"),
            ),
        ),
        Arm("mixed", "one head, all pairs", partial(one_head, OBJECTIVES), start="start"),
        Arm("heads", "a head for each (MAH-DPO), equal weights", heads, start="start"),
        *(
            Arm(
                f"only_{name}", f"one head, pairs of '{name}'", partial(one_head, (name,)), start="start", extended=True
            )
            for name in OBJECTIVES
        ),
        Arm("guided", "process reward model, guided decoding", guided, start="heads"),
    ],
    claims=[
        Claim(
            "balance",
            "Worst gain over the start of any objective: equal mixture of heads minus one head",
            partial(balance, "heads", "mixed"),
            ["heads", "mixed", "start"],
        ),
        Claim(
            "all_improve", "Worst gain of the equal mixture of heads", partial(worst_gain, "heads"), ["heads", "start"]
        ),
        shown("mixed_worst", "Worst gain of one head on all pairs", partial(worst_gain, "mixed"), ["mixed", "start"]),
        *(
            shown(f"{arm}_{name}", f"Gain on '{name}', {title}", partial(gain, arm, name), [arm, "start"])
            for arm, title in (("heads", "equal mixture of heads"), ("mixed", "one head on all pairs"))
            for name in OBJECTIVES
        ),
        *(
            shown(
                f"own_{name}", f"'{name}': its own head minus the best other head", partial(own_head, name), ["heads"]
            )
            for name in OBJECTIVES
        ),
        shown("monotone", "Rank correlation of the weights' sweep with both objectives", monotone, ["heads"]),
        *(
            shown(
                f"{policy}_{one}_{other}",
                f"Right answers to new questions, {policy}: {one.replace('_', ' ')} minus {other.replace('_', ' ')}",
                partial(decoding, f"{policy}_{one}", f"{policy}_{other}"),
                ["guided"],
            )
            for policy in ("start", "heads")
            for one, other in (("guided", "plain"), ("guided", "best_of"))
        ),
    ],
    metrics={f"answers/{name}": name for name in OBJECTIVES}
    | {f"head_{head}/{name}": f"{name}, head '{head}'" for head in OBJECTIVES for name in OBJECTIVES}
    | {
        f"{policy}_{kind}/correct": f"correct, new questions, {policy}, {kind.replace('_', ' ')}"
        for policy in ("start", "heads")
        for kind in ("plain", "guided", "best_of")
    },
    scales={
        "quick": Settings(
            sft_steps=40, rounds=2, prompts=120, pairs=50, epochs=1, evaluated=100, controlled=100, value_steps=3
        ),
        "default": Settings(),
        "full": Settings(
            world="ratings",
            device="cuda",
            rounds=500,
            pairs=10,
            epochs=1,
            minibatches=1,
            rate=5e-7,
            micro_batch=2,
        ),
    },
    requires={"full": "datasets"},
)
