"""What an iteration of the loop costs when its parts do nothing: one job, without a peer.

The stage has all that a run has: a task that hands out one rollout, a reward, a credit, an update of one parameter, a
schedule; and a folder, into which metrics, TensorBoard events and checkpoints go as in any run. What is timed is the
loop's own work: the judge's counts, the metrics, health, the optimiser's step, and what is written.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Job, Measurement
from regimen import Cast, Knob, Regimen, Rollout, Stage, Update, train
from regimen.controllers import Linear, Schedule
from regimen.objectives import Objective
from regimen.objectives.base import Batch
from regimen.progress import Event
from regimen.rewards import FunctionReward
from regimen.tasks.base import Evaluation

SAMPLES, STEPS, GROUP, ITERATIONS, WARM_UP = 64, 10, 8, 4000, 200


class Idle:
    """A task that hands out the same rollout every time."""

    name, group_size, generates, knobs = "idle", GROUP, True, (Knob("temperature", 1.0),)

    def __init__(self) -> None:
        self.rollout = Rollout.create(
            task=self.name,
            group=torch.arange(SAMPLES) // GROUP,
            mask=torch.ones(SAMPLES, STEPS, dtype=torch.bool),
            knobs={"temperature": 1.0},
            observations=torch.zeros(SAMPLES, STEPS, 4),
            actions=torch.zeros(SAMPLES, STEPS, dtype=torch.int64),
            logprobs=torch.zeros(SAMPLES, STEPS),
        )

    def collect(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator, size: int) -> Rollout:
        """The rollout."""
        return self.rollout

    def evaluate(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator) -> Evaluation:
        """Nothing."""
        return Evaluation({})

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing."""


class Given:
    """A credit that hands out the same advantages every time."""

    knobs = ()
    advantages = torch.ones(SAMPLES, STEPS)

    def __call__(self, rollout: Rollout, knobs: Mapping[str, float], cast: Mapping[str, Any]) -> Rollout:
        """The rollout with the advantages."""
        return rollout.replace(advantages=self.advantages)


class OneParameter(Objective):
    """The policy's one parameter, as a loss."""

    name = "nothing"

    def loss(self, batch: Batch) -> Tensor:
        """It."""
        return batch.member("policy").weight.sum()


def regimen(iterations: int) -> Regimen:
    """A stage with every verb, of parts that do nothing."""
    policy = nn.Linear(1, 1, bias=False)
    values = torch.linspace(0, 1, SAMPLES)
    stage = Stage(
        "idle",
        [Idle()],
        iterations,
        SAMPLES,
        reward=FunctionReward(lambda _: values, "given"),
        credit=Given(),
        updates=[Update(OneParameter())],
        controllers=[Schedule("temperature", Linear(1.0, 0.5, iterations))],
    )
    return Regimen(Cast(policy=policy), [stage])


class Clock:
    """A listener that notes when the warm-up was over and when the last iteration was."""

    def __init__(self) -> None:
        self.wall, self.processor = [0.0, 0.0], [0.0, 0.0]

    def __call__(self, event: Event) -> None:
        """Note it."""
        if event.kind == "step" and event.step in (WARM_UP, WARM_UP + ITERATIONS):
            end = event.step != WARM_UP
            self.wall[end], self.processor[end] = time.perf_counter(), time.process_time()


def ours(seed: int) -> Measurement:
    """Milliseconds per iteration; the parts are this process's share of the processor, and the disk's and others'."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        train(regimen(WARM_UP + ITERATIONS), seed=seed, out=f"{folder}/run", listener=clock)
    wall, processor = (end - start for start, end in (clock.wall, clock.processor))
    parts = {"processor": processor, "waiting": max(wall - processor, 0.0)}
    return Measurement(1e3 * wall / ITERATIONS, {"iterations": ITERATIONS}, parts)


JOBS = [
    Job(
        "loop-cost",
        "ms per iteration",
        ours,
        None,
        "",
        target=1.0,
        wanted="at most",
        bound="Dispatching some hundred small tensor operations. Of the processor time the judge and its counts take "
        "29 %, the gradient step 26 %, health 18 %, and the line and the event that are written 14 %.",
    )
]
