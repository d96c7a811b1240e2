"""Collecting from Meta-World's ten tasks at once with a shared policy, beside the bare steps of the same arms.

Both sides: one process, the tasks of MT10 with their goals, four arms of each, actions of a Gaussian of deviation 1
around 0, clipped; episodes of 200 steps, each with a goal of its own; starts of episodes count. Ours draws the actions
from a policy of two layers of 64 that is told the task, and makes the rollout; the peer's are drawn beforehand, and
nothing is kept.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Job, Measurement
from regimen import Cast
from regimen.policies import ActionPolicy
from regimen.tasks import EnvTask, Suite
from regimen.tasks.environments.metaworld import MetaWorld, tasks_of

ARMS, HORIZON, SEGMENT, ROUNDS = 4, 200, 100, 4


def ours(seed: int) -> Measurement:
    """A suite of tasks and a policy."""
    names = tasks_of("MT10")
    make = [MetaWorld(name, "MT10", seed, among=names, horizon=HORIZON) for name in names]
    suite = Suite("mt10", [EnvTask(each.task, each, copies=ARMS, steps=SEGMENT) for each in make])
    cast = Cast(policy=ActionPolicy.for_spaces(*suite.tasks[0].spaces))
    knobs = {knob.name: knob.default for knob in (*cast["policy"].knobs, *suite.knobs)}
    rng, done = torch.Generator().manual_seed(seed), 0
    suite.collect(cast, knobs, rng, suite.group_size)
    start = time.perf_counter()
    for _ in range(ROUNDS):
        done += int(suite.collect(cast, knobs, rng, suite.group_size).mask.sum())
    return Measurement(done / (time.perf_counter() - start), {"steps": done})


def bare(seed: int) -> Measurement:
    """The package's own environments, one after the other."""
    import metaworld

    made, rng = metaworld.MT10(seed=seed), np.random.default_rng(seed)
    goals = {name: [goal for goal in made.train_tasks if goal.env_name == name] for name in made.train_classes}
    arms = [(kind(), goals[name]) for name, kind in made.train_classes.items() for _ in range(ARMS)]
    actions = np.clip(rng.normal(size=(SEGMENT * (ROUNDS + 1), len(arms), 4)), -1, 1)
    stepped(arms, actions[:SEGMENT], 0, rng)
    start = time.perf_counter()
    done = stepped(arms, actions[SEGMENT:], SEGMENT, rng)
    return Measurement(done / (time.perf_counter() - start), {"steps": done})


def stepped(arms: Any, actions: Any, begun: int, rng: Any) -> int:
    """Take actions `[T, N, 4]`, with a new goal every so many steps; how many were taken."""
    for step, row in enumerate(actions, begun):
        for (arm, goals), action in zip(arms, row, strict=True):
            if step % HORIZON == 0:
                arm.set_task(goals[rng.integers(len(goals))])
                arm.reset()
            arm.step(action)
    return actions.shape[0] * actions.shape[1]


JOBS = [
    Job(
        name="collecting-metaworld",
        unit="steps/s",
        ours=ours,
        theirs=bare,
        peer="bare steps",
        target=0.7,
        bound="The peer's are the steps of the physics and nothing else, so 1 at best. The rest is the policy, a call "
        "for the four arms of a task, and what is recorded.",
    ),
]
