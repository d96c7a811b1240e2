"""SPA's learned progress (arXiv 2505.20732) credits tokens, while a budget of tokens shrinks (arXiv 2508.08940)."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from regimen import Cast, Regimen, Stage, Update
from regimen.controllers import Constant, Schedule
from regimen.credit import GAE, RewardRedistribution
from regimen.estimators import FitEstimator, LinearProgress, MeasureMisfit, Reading
from regimen.functions.answers import exact_match
from regimen.functions.returns import on_last_step
from regimen.lab.experiment import Arm, Claim, Paper, SeedResults
from regimen.memory import HoldOut, ReplayMemory
from regimen.models.value_head import ValueHead
from regimen.objectives import ppo
from regimen.papers.train_long_think_short import CORRECT, LENGTH, Parts, base, shrinking
from regimen.papers.train_long_think_short import Settings as Chains
from regimen.policies.token import TokenPolicy
from regimen.rewards.answers import AnswerReward
from regimen.rollout import Rollout
from regimen.update import Epochs


def reinforced(progress: str, shrinks: bool, seed: int, s: Settings) -> Regimen:
    """The composition: being right is paid token by token, length at the end under the budget in force."""
    parts, steps = Parts(seed, s.chains), s.steps + (0 if progress else s.explored)
    at_the_end = GAE(lam=1.0, reads="policy")
    by_progress = RewardRedistribution(
        progress, alpha=CORRECT, inner=GAE(s.lam, reads="policy"), final="correct", gate=s.gate, fallback=at_the_end
    )
    budget = s.chains.final_budget
    curve = shrinking(replace(s.chains, steps=steps), budget) if shrinks else Constant(budget)
    stage = Stage(
        "reinforce",
        [parts.world.questions(8, budget)],
        steps,
        s.batch_size,
        reward=parts.judged(CORRECT, LENGTH, "triangular"),
        credit=by_progress if progress else at_the_end,
        updates=[Update(ppo(reads="policy"), ["policy", "critic"], s.learning_rate, batches=Epochs(1, 2))],
        controllers=[Schedule("token_budget", curve)],
    )
    return regimen(parts, seed, s, [stage])


@dataclass(frozen=True)
class Settings:
    """Numbers of the experiment, the same in every arm; the chains, the start and the budgets are the paper's."""

    chains: Chains = field(
        default_factory=lambda: Chains(
            digits=3, restate=3, layers=1, fact_steps=100, trace_steps=500, start_budget=32, final_budget=20,
            max_new_tokens=40, held_out=100,
        )
    )  # fmt: skip
    explored: int = 12
    ridge: float = 10.0
    steps: int = 60
    batch_size: int = 64
    learning_rate: float = 1e-3
    lam: float = 0.95
    gate: float = 0.9


class WithTheRest:
    """An estimator's contributions, and on the last step what they lack of the reward: in sum they are exact."""

    def __init__(self, estimator: LinearProgress) -> None:
        self.estimator = estimator

    @property
    def misfit(self) -> Tensor:
        """That of the estimator, for the gate."""
        return self.estimator.misfit

    def __call__(self, rollout: Rollout) -> Tensor:
        """`[B, T]`."""
        said = self.estimator(rollout)
        return said + on_last_step(rollout.rewards["correct"] - said.sum(1), rollout.mask)


def read_after(reader: TokenPolicy, rollout: Rollout) -> Tensor:
    """`[B, T, D]`, hidden states that have read the token of their step; the last one, which ends the text, has not."""
    states = reader.distribution(rollout, rollout.mask).hidden
    return torch.cat([states[:, 1:], states[:, -1:]], 1)


def regimen(parts: Parts, seed: int, s: Settings, stages: list[Stage]) -> Regimen:
    """Policy, critic and estimator, evaluated as the paper does."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = parts.cast["policy"]
        width, reader = policy.network.config.hidden_size, copy.deepcopy(policy)
        estimator = LinearProgress(partial(read_after, reader), s.ridge)
        both = {"estimator": estimator, "exact": WithTheRest(estimator)}
        cast = Cast(policy=policy, critic=ValueHead(width), reader=reader, **both)
    cast.start("reader", of="policy")  # It reads as the policy does where it was trained by another arm.
    return Regimen(cast, stages, [parts.world.questions(1, parts.settings.final_budget)])


def start(seed: int, s: Settings) -> Regimen:
    """Facts, then verbose traces."""
    return base(seed, s.chains)


def fitted(seed: int, s: Settings) -> Regimen:
    """The start answers, without learning, and an estimator is fitted to which answers were right."""
    parts, samples = Parts(seed, s.chains), s.explored * s.batch_size
    memory, task = HoldOut(ReplayMemory(samples), ReplayMemory(samples)), parts.world.questions(8, 32)
    stage = partial(Stage, tasks=[task], batch_size=s.batch_size, memory=memory)
    explore = stage("explore", steps=s.explored, reward=AnswerReward(exact_match, tag="answer"))
    made = regimen(parts, seed, s, [explore])
    fit = [FitEstimator("estimator", Reading(made.cast["estimator"].summed)), MeasureMisfit()]
    return replace(made, stages=[explore, stage("fit", steps=0, prepare=fit)])


def lead(metric: str, other: str, seed: SeedResults) -> float:
    """The combination minus another arm, at the end."""
    return seed["combined"].final[f"questions/{metric}"] - seed[other].final[f"questions/{metric}"]


PARTS = {
    "progress": ("exact progress, fixed budget", "exact", False),
    "shrinking": ("reward at the end, shrinking budget", "", True),
    "neither": ("reward at the end, fixed budget", "", False),
    "inexact": ("progress as it is, shrinking budget", "estimator", True),
}
SMALL = Chains(digits=3, layers=1, fact_steps=5, trace_steps=5, held_out=20, max_new_tokens=30)
PAPER = Paper(
    slug="progress-under-a-budget",
    title="Learned progress credits tokens while their budget shrinks",
    claim="Credit by learned progress and a shrinking budget give more right answers than either alone.",
    policy="token",
    arms=[
        Arm("start", "start", start),
        Arm("fitted", "explored and fitted", fitted, start="start"),
        Arm("combined", "exact progress, shrinking budget", partial(reinforced, "exact", True), start="fitted"),
        *(
            Arm(name, title, partial(reinforced, progress, shrinks), start="fitted" if progress else "start")
            for name, (title, progress, shrinks) in PARTS.items()
        ),
    ],
    claims=[
        Claim(f"{m}_{n}", f"{m}: combined minus {title}", partial(lead, m, n), ["combined", n], judged=m == "accuracy")
        for m in ("accuracy", "tokens")
        for n, (title, *_) in PARTS.items()
    ],
    metrics={"questions/accuracy": "right", "questions/tokens": "tokens"},
    scales={"quick": Settings(SMALL, explored=2, steps=3), "default": Settings()},
)
