"""AMFT's learned balance (arXiv 2508.06944) on control: cloning of a flawed wall follower beside PPO in mazes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from regimen import Cast, Knob, Regimen, Stage, Update
from regimen.controllers import Controller, Linear, MetaGradientWeight, Probe, Schedule
from regimen.credit import GAE
from regimen.lab.experiment import Arm, Claim, Paper, SeedResults
from regimen.models import ValueNetwork
from regimen.models.torsos import torso_for
from regimen.objectives import ClippedSurrogateObjective, EntropyBonus, ReinforceObjective, SFTObjective, ValueObjective
from regimen.policies import ActionPolicy
from regimen.policies.heads import CategoricalHead
from regimen.rewards import EnvironmentReward
from regimen.rollout import Rollout
from regimen.tasks import DatasetTask, EnvTask
from regimen.tasks.environments.tensor import Mazes
from regimen.update import Epochs


def balanced(controller: Controller, weight: float, seed: int, s: Settings) -> Regimen:
    """The composition: one loss for a controller and its teacher's episodes, whose balance a controller moves."""
    mazes = maze_task("mazes", seed, s)
    mu = Knob("cloning", weight, 0.0, 1.0)
    ppo = ClippedSurrogateObjective(0.2, aggregate="token") - s.entropy * EntropyBonus()
    loss = (1 - mu) * ppo.on("mazes") + mu * SFTObjective().on("lessons")
    stage = Stage(
        "learn",
        [mazes, Lessons(mazes, seed, s)],
        s.steps,
        s.episodes + s.lessons,
        reward=EnvironmentReward(),
        credit=GAE(lam=1.0, normalize="task"),
        updates=[
            Update(loss, ["policy"], learning_rate=s.learning_rate, batches=Epochs(2, 1)),
            Update(ValueObjective().on("mazes"), ["critic"], learning_rate=s.learning_rate, name="value"),
        ],
        controllers=[controller],
        knobs={"mixture/mazes": s.episodes, "mixture/lessons": s.lessons},
    )
    return Regimen(members(mazes), [stage], [maze_task("mazes", seed, s, pool=None)])


@dataclass(frozen=True)
class Settings:
    """Numbers of the experiment; the teacher `errs` in that share of its steps, and `probe` episodes are held out."""

    errs: float = 0.3
    recorded: int = 64
    lessons: int = 32
    episodes: int = 32
    steps: int = 200
    probe: int = 32
    every: int = 5
    start: float = 0.5
    meta_lr: float = 0.2
    learning_rate: float = 0.02
    entropy: float = 0.002


def maze_task(name: str, seed: int, s: Settings, pool: int | None = 200) -> EnvTask:
    """Episodes of a pool of mazes, or of fresh ones."""
    make = partial(Mazes, pool=pool, seed=seed)
    sizes: dict[str, Any] = {"copies": s.episodes, "steps": 60, "evaluation_episodes": 300, "evaluation_steps": 60}
    return EnvTask(name, make, episodes=True, **sizes)


def members(task: EnvTask) -> Cast:
    """A table of logits and a table of values."""
    torso, critic = torso_for(task.spaces[0]), ValueNetwork(torso_for(task.spaces[0]))
    policy = ActionPolicy(torso, CategoricalHead(torso.width, 4, gain=0.0))
    policy.knobs = (Knob("temperature", 1.0, 0.0, evaluation=1.0),)  # It is evaluated as it acts.
    return Cast(policy=policy, critic=critic)


class Lessons(DatasetTask):
    """A teacher's recorded episodes, laid out as the task lays out a policy's own."""

    def __init__(self, task: EnvTask, seed: int, s: Settings) -> None:
        teacher, rng = members(task)["policy"], torch.Generator().manual_seed(seed)
        teacher.head.logits.weight.data = wall_follower(s.errs).log().T.contiguous()
        recorded = task.collect({"policy": teacher}, {"discount": 0.99, "temperature": 1.0}, rng, s.recorded)
        super().__init__("lessons", recorded.data)

    def collect(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator, size: int) -> Rollout:
        """Some of them, under the knobs in force."""
        rows = self.rows[torch.randint(len(self.rows), (size,), generator=rng)]
        in_force = {name: torch.full((size,), float(value)) for name, value in knobs.items()}
        return Rollout(rows, (self.name,)).replace(knobs=in_force)


def wall_follower(errs: float) -> Tensor:
    """`[80, 4]`, of every sight the chances of up, right, down and left: the wall at the right hand, but for errors."""
    table = torch.full((80, 4), errs / 4)
    for sight in range(80):
        walls, last = divmod(sight, 5)
        ahead = max(last - 1, 0)
        turns = [(ahead + turn) % 4 for turn in (1, 0, 3, 2)]  # Right, straight on, left, back.
        free = [move for move in turns if not walls & (8 >> move)]
        table[sight, free[0] if free else turns[0]] += 1 - errs
    return table


def given(first: float, last: float, seed: int, s: Settings) -> Regimen:
    """A weight that stays, or falls in a line; with as many iterations more as the probes would have cost."""
    steps = s.steps + math.ceil(s.steps / s.every) * s.probe // s.episodes
    return balanced(Schedule("cloning", Linear(first, last, steps)), first, seed, replace(s, steps=steps))


def learned(seed: int, s: Settings) -> Regimen:
    """The balance follows the gradient of the return in mazes that training never meets."""
    held_out = maze_task("held_out", seed, s, pool=None)
    credit, gain = GAE(lam=1.0, normalize=None), ReinforceObjective("constant", 1)
    probe = Probe(held_out, s.probe, EnvironmentReward(), credit, gain)
    controller = MetaGradientWeight(
        "cloning", probe, low=0.0, high=1.0, meta_lr=s.meta_lr, entropy_lr=0.0, every=s.every
    )
    return balanced(controller, s.start, seed, s)


def lead(other: str, seed: SeedResults) -> float:
    """Success of the combination minus that of a part."""
    return seed["learned"].final["mazes/success"] - seed[other].final["mazes/success"]


PARTS = {
    "ppo": ("PPO alone", 0.0, 0.0),
    "cloning": ("cloning alone", 1.0, 1.0),
    "half": ("half of each", 0.5, 0.5),
    "falling": ("a weight that falls from 1 to 0", 1.0, 0.0),
}
PAPER = Paper(
    slug="learned-balance-in-mazes",
    title="A learned balance of cloning and PPO",
    claim="A weight of cloning that follows the gradient of held-out return beats either alone and a fixed half.",
    policy="action",
    arms=[
        Arm("learned", "learned balance", learned),
        *(Arm(name, title, partial(given, first, last)) for name, (title, first, last) in PARTS.items()),
    ],
    claims=[
        Claim(name, f"Success: learned balance minus {title}", partial(lead, name), ["learned", name])
        for name, (title, *_) in PARTS.items()
    ],
    metrics={"mazes/success": "success in new mazes"},
    scales={"quick": Settings(steps=6, every=2), "default": Settings()},
)
