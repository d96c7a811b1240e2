"""A paper whose arms train in a moment: a line fitted to numbers, which worker processes can import."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from regimen import Cast, Knob, Regimen, Stage, Update
from regimen.controllers import Linear, Schedule
from regimen.lab.experiment import Arm, Claim, Paper, SeedResults
from regimen.objectives import Objective
from regimen.objectives.base import Batch
from regimen.tasks import DatasetTask, Evaluation


@dataclass(frozen=True)
class Settings:
    """Numbers of the experiment; `killed` names a file whose absence makes the "target" arm's process die."""

    steps: int = 12
    rate: float = 0.05
    pause: float = 0.0
    killed: str = ""


class Numbers(DatasetTask):
    """Points on a line, evaluated by the distance of the fitted slope from the true one."""

    def __init__(self, seed: int, s: Settings, slope: float) -> None:
        x = torch.randn(64, 1, generator=torch.Generator().manual_seed(seed))
        super().__init__("numbers", TensorDict({"x": x, "y": slope * x}, batch_size=[64]))
        self._pause, self._target = s.pause, slope

    def collect(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator, size: int) -> Any:
        time.sleep(self._pause)
        return super().collect(cast, knobs, rng, size)

    def evaluate(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator) -> Evaluation:
        slope = float(cast["policy"].weight)
        return Evaluation({"closeness": -abs(2.0 - slope), "slope": slope}, {"words": [f"y = {slope:.3f} x"]})


class SquaredError(Objective):
    """Mean squared error, times a knob."""

    name = "squared_error"

    @property
    def knobs(self) -> tuple[Knob, ...]:
        return (Knob("emphasis", 1.0, low=0.0),)

    def loss(self, batch: Batch) -> Tensor:
        noise = 0.1 * torch.randn(len(batch.rollout), 1, generator=batch.rng)
        error = batch.cast["policy"](batch.rollout["x"]) - batch.rollout["y"] + noise
        return batch.knobs["emphasis"] * error.square().mean()


def stage(name: str, seed: int, s: Settings, slope: float = 2.0, **more: Any) -> Stage:
    update = Update(SquaredError(), learning_rate=s.rate)
    return Stage(name, [Numbers(seed, s, slope)], s.steps, 16, updates=[update], evaluate_every=4, **more)


def cast(seed: int) -> Cast:
    return Cast(policy=nn.Linear(1, 1))  # Drawn from torch's generator, which is the job's to seed.


def start(seed: int, s: Settings) -> Regimen:
    return Regimen(cast(seed), [stage("warm-up", seed, s, slope=0.5)])


def target(seed: int, s: Settings) -> Regimen:
    if s.killed:
        Killer(Path(s.killed)).strike()
    moving = [Schedule("emphasis", Linear(1.0, 2.0, s.steps))]
    return Regimen(cast(seed), [stage("first", seed, s), stage("second", seed, s, controllers=moving)])


def astray(seed: int, s: Settings) -> Regimen:
    return Regimen(cast(seed), [stage("astray", seed, s, slope=-2.0)])


def broken(seed: int, s: Settings) -> Regimen:
    raise ValueError("this arm is broken; mend it")


class Killer:
    """Kills its own process, as the system does when memory is short, until a file has three letters."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def strike(self) -> None:
        times = len(self._path.read_text()) if self._path.exists() else 0
        if times < 3:
            self._path.write_text("x" * (times + 1))
            os.kill(os.getpid(), signal.SIGKILL)


def gain(seed: SeedResults) -> float:
    return seed["target"].final["numbers/closeness"] - seed["astray"].final["numbers/closeness"]


PAPER = Paper(
    slug="tiny",
    title="Lines",
    arxiv="0000.00000",
    verb="learn",
    policy="line",
    claim="Training towards the target is better than training away from it.",
    arms=[
        Arm("start", "the common start", start),
        Arm("astray", "away from the target", astray, start="start"),
        Arm("target", "towards the target", target, start="start"),
        Arm("broken", "broken", broken, extended=True),
        Arm("after_broken", "from the broken one", astray, start="broken", extended=True),
    ],
    claims=[
        Claim("better", "Target above astray", gain, ["target", "astray"]),
        Claim("worse", "Astray above target", lambda seed: -gain(seed), ["target", "astray"], judged=False),
    ],
    metrics={"numbers/closeness": "closeness", "numbers/slope": "slope", "numbers/absent": "absent"},
    scales={"quick": Settings(steps=4), "default": Settings(), "missing": Settings()},
    requires={"missing": "no-such-extra"},
)


def load(slug: str = "tiny") -> Paper:
    """The paper, as worker processes find it; `regimen.papers.load` for tests."""
    return PAPER


def load_cached() -> Paper:
    """The paper with its start kept between experiments; `killed` concerns the target alone."""
    kept = dataclasses.replace(PAPER.arms[0], cached=True, ignores=["killed"])
    return dataclasses.replace(PAPER, arms=[kept, *PAPER.arms[1:]])
