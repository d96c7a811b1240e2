"""Meta-World: A Benchmark and Evaluation for Multi-Task and Meta Reinforcement Learning (arXiv 1910.10897).

Claim: with as many environment steps for every task, one policy that is told the task succeeds less often, in the mean
over tasks, than a policy of its own for each; a policy with a head for each task makes up for a part of that. The arms
differ in what tasks share: nothing (towers of a `MultiHead`), a trunk below their heads, or all of a network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from regimen.cast import Cast
from regimen.credit import GAE
from regimen.functions.gradients import pcgrad
from regimen.lab.experiment import Arm, Claim, Paper, SeedResults
from regimen.models import MLPTorso, MultiHead, Tower, ValueNetwork, WithTasks
from regimen.models.torsos import orthogonal
from regimen.objectives import SFTObjective, ppo
from regimen.policies.action import ActionPolicy
from regimen.policies.heads import GaussianHead
from regimen.regimen import Regimen, Stage
from regimen.rewards import EnvironmentReward, NormalizedReward, SuccessReward
from regimen.tasks import EnvTask, ParallelTask, Suite
from regimen.tasks.base import Task
from regimen.tasks.environments.metaworld import GOALS, LONGEST, OBSERVED, Benchmark, MetaWorld, tasks_of
from regimen.tasks.environments.metaworld_experts import ScriptedExpert
from regimen.update import Combine, Epochs, Update

Sharing = Literal["nothing", "trunk", "all"]


@dataclass(frozen=True)
class Settings:
    """Numbers of the experiment, the same in every arm.

    Attributes:
        benchmark: whose goals these are; MT1's if each task has its own.
        tasks: that are learned at once; all of the benchmark if none are named.
        known: goals (of fifty) that are learned from; the others are tried at the end, or the same if there are none.
        horizon: steps of an episode, in training and at the end.
        steps, copies, segment: of PPO: iterations; and in each, for every task, copies and their steps.
        widths: of the layers below the heads; wide: of the control, with as many weights as all policies for each.
        log_std: the logarithm of the actions' deviation, at first.
        learning_rate, epochs, minibatches, discount, lam, entropy: of PPO.
        episodes: of each task, at the end.
        imitated: tasks of the supervised companion, MT10's if none are named; demonstrations: of each;
            imitation_epochs: passes over these.
        workers: processes that collect; 0 for none beside this one.
    """

    benchmark: Benchmark = "MT1"
    tasks: tuple[str, ...] = ("drawer-close-v3", "door-close-v3", "handle-press-v3")
    known: int = 40
    horizon: int = 150
    steps: int = 18
    copies: int = 4
    segment: int = 256
    widths: tuple[int, ...] = (64, 64)
    wide: tuple[int, ...] = (124, 124)
    log_std: float = -0.5
    learning_rate: float = 1e-3
    epochs: int = 10
    minibatches: int = 4
    discount: float = 0.99
    lam: float = 0.95
    entropy: float = 0.0
    episodes: int = 10
    imitated: tuple[str, ...] = ()
    demonstrations: int = 10
    imitation_epochs: int = 60
    workers: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tasks."""
        return self.tasks or tasks_of(self.benchmark)


# Where it is learned and tried


def known(name: str, among: Sequence[str], seed: int, s: Settings, **settings: Any) -> EnvTask:
    """A task with the goals that are learned from; episodes go on after success."""
    make = MetaWorld(name, s.benchmark, seed, goals=(0, s.known), among=among, horizon=s.horizon)
    return EnvTask(name, make, discount=s.discount, **settings)


def training(seed: int, s: Settings, worker: int = 0) -> Suite:
    """As many steps of every task."""
    tasks = [known(name, s.names, seed, s, copies=s.copies, steps=s.segment) for name in s.names]
    return Suite("training", tasks)


def trial(among: Sequence[str], seed: int, s: Settings) -> Suite:
    """Goals that were not learned from; an episode ends at success, so that it counts at whatever step."""
    first = s.known if s.known < GOALS else 0
    make = partial(MetaWorld, seed=seed, goals=(first, GOALS), among=among, horizon=s.horizon, stops=True)
    few: dict[str, Any] = {"copies": 1, "evaluation_episodes": s.episodes, "evaluation_steps": s.horizon}
    return Suite("trial", [EnvTask(name, make(name, s.benchmark), **few) for name in among])


# What tasks share


def network(
    sharing: Sharing, head: Callable[[int], nn.Module], tasks: int, widths: Sequence[int]
) -> tuple[nn.Module, nn.Module]:
    """A torso and what stands on it; all are told the task, and what is not shared is there once for each."""
    seen = OBSERVED + tasks
    if sharing == "all":
        return MLPTorso(seen, widths), head(widths[-1])
    if sharing == "trunk":
        return WithTasks(MLPTorso(seen, widths), tasks), MultiHead([head(widths[-1]) for _ in range(tasks)])
    towers = [Tower(MLPTorso(seen, widths), head(widths[-1])) for _ in range(tasks)]
    return WithTasks(MLPTorso(seen, ()), tasks), MultiHead(towers)


def members(sharing: Sharing, tasks: int, widths: Sequence[int], seed: int, s: Settings) -> tuple[Any, Any]:
    """A policy, and a critic with a network of its own of the same form."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = ActionPolicy(*network(sharing, lambda width: GaussianHead(width, 4, log_std=s.log_std), tasks, widths))
        critic = ValueNetwork(*network(sharing, lambda width: orthogonal(nn.Linear(width, 1), 1.0), tasks, widths))
    return policy, critic


# The arms


def reinforced(
    sharing: Sharing, seed: int, s: Settings, *, wide: bool = False, gradients: Combine | None = None
) -> Regimen:
    """PPO on all tasks at once, with rewards and advantages normalised within each."""
    policy, critic = members(sharing, len(s.names), s.wide if wide else s.widths, seed, s)
    task: Task = training(seed, s)
    if s.workers:
        task = ParallelTask(partial(training, seed, s), s.workers)
    update = Update(
        ppo(entropy_weight=s.entropy),
        ["policy", "critic"],
        learning_rate=s.learning_rate,
        optimizer=torch.optim.Adam,
        batches=Epochs(s.epochs, s.minibatches, "step"),
        max_grad_norm=None,  # The norm is of all tasks together, and would join what should be apart.
        gradients=gradients,
    )
    stage = Stage(
        "reinforcement",
        [task],
        s.steps,
        len(s.names) * s.copies * max(s.workers, 1),
        reward=NormalizedReward(EnvironmentReward(), center=True, per="task") + SuccessReward().logged(),
        credit=GAE(s.lam, normalize="task"),
        updates=[update],
        evaluate_every=max(s.steps // 3, 1),
    )
    return Regimen(Cast(policy=policy, critic=critic), [stage], evaluations=[trial(s.names, seed, s)])


def imitated(sharing: Sharing, seed: int, s: Settings) -> Regimen:
    """The supervised companion: a few episodes of the scripted experts, and nothing else."""
    names = s.imitated or tasks_of("MT10")
    policy, _ = members(sharing, len(names), s.widths, seed, s)
    episodes: dict[str, Any] = {"copies": 1, "steps": s.horizon, "episodes": True, "member": "expert"}
    stage = Stage(
        "imitation",
        [known(name, names, seed, s, **episodes) for name in names],
        1,
        len(names) * s.demonstrations,
        updates=[Update(SFTObjective(), learning_rate=s.learning_rate, batches=Epochs(s.imitation_epochs, 32, "step"))],
    )
    return Regimen(Cast(policy=policy, expert=ScriptedExpert(names)), [stage], evaluations=[trial(names, seed, s)])


SHARED: dict[Sharing, str] = {"nothing": "a policy for each", "trunk": "a head for each", "all": "one policy"}


# What is claimed


def gain(arm: str, other: str, seed: SeedResults) -> float:
    """The success rate of an arm minus that of another, in the mean over tasks, at the end."""
    return seed[arm].final["trial/success"] - seed[other].final["trial/success"]


def lead(arm: str, other: str, text: str, judged: bool = False) -> Claim:
    """An arm succeeds more often than another."""
    return Claim(f"{arm}_{other}", text, partial(gain, arm, other), [arm, other], judged=judged)


TASKS = Settings().tasks

PAPER = Paper(
    slug="meta-world",
    title="Meta-World: A Benchmark and Evaluation for Multi-Task and Meta Reinforcement Learning",
    arxiv="1910.10897",
    verb="collect, learn",
    policy="action",
    claim="With as many steps for every task, one policy that is told the task succeeds less often than a policy for "
    "each, and a policy with a head for each task makes up for a part of that.",
    arms=[
        *(Arm(sharing, title, partial(reinforced, sharing)) for sharing, title in SHARED.items()),
        Arm("wide", "one policy, as many weights", partial(reinforced, "all", wide=True), extended=True),
        Arm("projected", "one policy, PCGrad", partial(reinforced, "all", gradients=pcgrad), extended=True),
        *(
            Arm(f"imitation_{sharing}", f"imitation, {title}", partial(imitated, sharing), extended=True)
            for sharing, title in SHARED.items()
        ),
    ],
    claims=[
        lead("nothing", "all", "Success: a policy for each minus one policy", judged=True),
        lead("trunk", "all", "Success: a head for each minus one policy", judged=True),
        lead("nothing", "trunk", "Success: a policy for each minus a head for each"),
        lead("nothing", "wide", "Success: a policy for each minus one policy of as many weights"),
        lead("projected", "all", "Success: one policy with PCGrad minus without"),
        lead("imitation_nothing", "imitation_all", "Success in imitation: a policy for each minus one policy"),
        lead("imitation_trunk", "imitation_all", "Success in imitation: a head for each minus one policy"),
    ],
    metrics={
        "trial/success": "success, mean over tasks",
        **{f"trial/{name}/success": f"success, {name}" for name in TASKS},
        "trial/return": "return until success, mean over tasks",
    },
    scales={
        "quick": Settings(tasks=TASKS[:2], horizon=60, steps=2, copies=2, segment=250, episodes=2, epochs=2),
        "default": Settings(),
        "full": Settings(
            benchmark="MT10",
            tasks=(),
            known=GOALS,
            horizon=LONGEST,
            steps=1250,
            copies=1,
            segment=100,
            widths=(400, 400, 400),
            wide=(1300, 1300, 1300),
            learning_rate=3e-4,
            episodes=20,
            workers=16,
        ),
    },
    requires={"quick": "metaworld", "default": "metaworld", "full": "metaworld"},
)
