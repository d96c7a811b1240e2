"""Progressive Pretext Task Learning for Human Trajectory Prediction, PPT (arXiv 2407.11588).

Claim: a transformer that learns the next position first, then destinations, then the way to them, with what it has
learned before as its teachers, forecasts better than one that learns the last of these from scratch in as many updates.
No reinforcement: four supervised stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from regimen.cast import Cast, ReferenceRefresh
from regimen.lab.experiment import Arm, Claim, Paper, SeedResults
from regimen.memory import Memory
from regimen.models.trajectory import DestinationNetwork, NextPositionNetwork, TrackTransformer, TrajectoryNetwork
from regimen.objectives import (
    DestinationObjective,
    DiversityObjective,
    FeatureDistillation,
    Objective,
    RegressionObjective,
)
from regimen.policies.forecast import DestinationForecaster, NextPositionForecaster, TrajectoryForecaster
from regimen.regimen import Regimen, Stage
from regimen.tasks.base import Task
from regimen.tasks.worlds.tracks import FOLDS, TracksWorld, eth_ucy, pedestrians
from regimen.update import Update


@dataclass(frozen=True)
class Settings:
    """Numbers of the experiment.

    Attributes:
        world: `"pedestrians"`, made up by seed, or `"recordings"` of ETH and UCY, in the folder `data`; there the seed
            chooses the fold that is tested: eth, hotel, univ, zara1, zara2, eth, ...
        data: see above.
        train, test: made-up tracks.
        width, layers, heads, hidden: of the networks; `hidden` of the heads with several layers.
        count: futures per sample, `K`.
        batch_size: tracks per update.
        short_steps, warm_steps, long_steps, way_steps: updates of the stages; every arm takes their sum.
        short_rate, warm_rate, long_rate, way_rate, destination_rate: learning rates of the stages, and of the
            destinations in the last.
        scratch_rate: learning rate without stages.
        diversity, scale: weight of the destinations' repulsion, and its scale in square metres.
        destination, distill_short, distill_long: weights in the last stage.
        evaluate_every: updates between evaluations.
        device: where the networks are trained.
    """

    world: Literal["pedestrians", "recordings"] = "pedestrians"
    data: str = "eth_ucy"
    train: int = 4000
    test: int = 1000
    width: int = 48
    layers: int = 2
    heads: int = 4
    hidden: tuple[int, ...] = (128, 128, 128)
    count: int = 6
    batch_size: int = 128
    short_steps: int = 400
    warm_steps: int = 150
    long_steps: int = 300
    way_steps: int = 500
    short_rate: float = 4e-3
    warm_rate: float = 4e-3
    long_rate: float = 1.2e-3
    way_rate: float = 4e-3
    destination_rate: float = 1e-3
    scratch_rate: float = 2e-3
    diversity: float = 1.0
    scale: float = 4.0
    destination: float = 1.0
    distill_short: float = 5.0
    distill_long: float = 0.5
    evaluate_every: int = 150
    device: str = "cpu"


def tracks(seed: int, s: Settings) -> TracksWorld:
    """Who is watched."""
    if s.world == "recordings":
        return eth_ucy(s.data, list(FOLDS)[seed % len(FOLDS)])
    return pedestrians(seed, s.train, s.test)


def forecaster(seed: int, s: Settings) -> Cast:
    """The networks, which are the same in every arm."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, second = (TrackTransformer(s.width, s.heads, s.layers) for _ in range(2))
        destinations = DestinationNetwork(first, s.count, hidden=s.hidden)
        trajectory = TrajectoryNetwork(second, hidden=s.hidden)
        members = {
            "policy": TrajectoryForecaster(destinations, trajectory),
            "next_position": NextPositionForecaster(NextPositionNetwork(first)),
            "destinations": DestinationForecaster(destinations),
            "destination_head": destinations.head,
            "trajectory": trajectory,
            "short_term_projection": nn.Linear(s.width, s.width),
            "long_term_projection": nn.Linear(s.width, s.width),
        }
    return Cast(**{name: member.to(s.device) for name, member in members.items()})


# The stages

WAY = RegressionObjective("norm", aggregate="sequence", name="way")
"""Mean distance of the way to the destination that is nearest to the truth."""


def spread(member: str, s: Settings) -> Objective:
    """The nearest destination is drawn to the truth, and all keep apart."""
    return DestinationObjective(member) + s.diversity * DiversityObjective(s.scale, member)


def taught(teacher: str, student: str, name: str) -> FeatureDistillation:
    """Hidden states, projected, are drawn to those of a frozen teacher."""
    return FeatureDistillation(teacher, student, f"{teacher}_projection", reads="hidden", name=name)


class Stages:
    """The stages of one forecaster in one world."""

    def __init__(self, seed: int, settings: Settings) -> None:
        self.settings = settings
        self.world, self.cast = tracks(seed, settings), forecaster(seed, settings)

    def regimen(self, *stages: Stage) -> Regimen:
        """Stages, one after the other, and how their forecasts are measured."""
        return Regimen(self.cast, stages, evaluations=[self.world.forecasts()])

    def stage(self, name: str, task: Task, steps: int, *updates: Update, **options: Any) -> Stage:
        """One stage of supervised training."""
        size, every = self.settings.batch_size, self.settings.evaluate_every
        return Stage(name, [task], steps, size, updates=updates, evaluate_every=every, **options)

    def short_term(self) -> Stage:
        """Stage 1: the next position."""
        s = self.settings
        learn = update(RegressionObjective("mse", "next_position"), s.short_rate, "next_position")
        return self.stage("short", self.world.positions(), s.short_steps, learn)

    def warm_up(self) -> Stage:
        """Stage 2a: destinations, by a head on what stage 1 has learned, which is now a teacher."""
        s = self.settings
        learn = update(spread("destinations", s), s.warm_rate, "destination_head")
        teacher = ReferenceRefresh("short_term", of="next_position")
        return self.stage("warm", self.world.futures(), s.warm_steps, learn, rules=[teacher])

    def long_term(self, steps: int) -> Stage:
        """Stage 2b: destinations, by all of it."""
        learn = update(spread("destinations", self.settings), self.settings.long_rate, "destinations")
        return self.stage("long", self.world.futures(), steps, learn)

    def whole(self, short: float, long: float) -> Stage:
        """Stage 3: the way to every destination; with the weights of what earlier stages teach."""
        s = self.settings
        way = WAY + short * taught("short_term", "policy", "distill_short")
        ends = s.destination * DestinationObjective("destinations")
        ends = ends + long * taught("long_term", "destinations", "distill_long")
        learn = [
            update(way, s.way_rate, "trajectory", "short_term_projection"),
            update(ends, s.destination_rate, "destinations", "long_term_projection"),
        ]
        teacher = ReferenceRefresh("long_term", of="destinations")
        return self.stage("whole", self.world.futures(), s.way_steps, *learn, rules=[teacher], prepare=[inherit])

    def scratch(self) -> Stage:
        """The last task alone, all networks at one learning rate, for as many updates."""
        s = self.settings
        learn = update(WAY + spread("policy", s), s.scratch_rate, "policy")
        steps = s.short_steps + s.warm_steps + s.long_steps + s.way_steps
        return self.stage("scratch", self.world.futures(), steps, learn)


def update(objective: Objective, rate: float, *members: str) -> Update:
    """Adam, and gradients of norm 1 at most."""
    return Update(objective, members, learning_rate=rate, optimizer=torch.optim.Adam)


def inherit(cast: Cast, tasks: Sequence[Task], memory: Memory) -> None:
    """Stage 3 begins with the transformer of stage 2."""
    cast["trajectory"].inherit(cast["policy"].destinations)


# The arms


def ppt(seed: int, s: Settings) -> Regimen:
    """The method."""
    stages = Stages(seed, s)
    return stages.regimen(
        stages.short_term(),
        stages.warm_up(),
        stages.long_term(s.long_steps),
        stages.whole(s.distill_short, s.distill_long),
    )


def no_distillation(seed: int, s: Settings) -> Regimen:
    """The stages, and nothing that earlier ones teach."""
    stages = Stages(seed, s)
    return stages.regimen(stages.short_term(), stages.warm_up(), stages.long_term(s.long_steps), stages.whole(0.0, 0.0))


def no_short(seed: int, s: Settings) -> Regimen:
    """No next positions: their updates go to the destinations, and only these teach."""
    stages = Stages(seed, s)
    return stages.regimen(
        stages.warm_up(), stages.long_term(s.long_steps + s.short_steps), stages.whole(0.0, s.distill_long)
    )


def scratch(seed: int, s: Settings) -> Regimen:
    """The baseline."""
    stages = Stages(seed, s)
    return stages.regimen(stages.scratch())


# What is claimed


def gain(metric: str, other: str, seed: SeedResults) -> float:
    """By how much PPT's displacement is smaller than another arm's, in metres."""
    return seed[other].final[f"forecasts/{metric}"] - seed["ppt"].final[f"forecasts/{metric}"]


def over_line(metric: str, line: str, seed: SeedResults) -> float:
    """By how much PPT's displacement is smaller than that of going straight on, in metres."""
    final = seed["ppt"].final
    return final[f"forecasts/{line}_{metric}"] - final[f"forecasts/{metric}"]


def claim(name: str, text: str, metric: str, other: str = "scratch", judged: bool = False) -> Claim:
    """PPT is better than another arm."""
    return Claim(name, text, partial(gain, metric, other), ["ppt", other], judged=judged)


PAPER = Paper(
    slug="ppt",
    title="Progressive Pretext Task Learning for Human Trajectory Prediction",
    arxiv="2407.11588",
    verb="learn",
    policy="forecaster",
    claim="Training a transformer in stages (the next position, the destination, the whole trajectory), with "
    "distillation from the earlier ones, gives a lower best-of-K displacement than training the same networks on the "
    "final task from scratch for as many updates.",
    arms=[
        Arm("scratch", "from scratch", scratch),
        Arm("no_distillation", "stages, no distillation", no_distillation),
        Arm("ppt", "PPT", ppt),
        Arm("no_short", "PPT without stage 1", no_short, extended=True),
    ],
    claims=[
        claim("ade", "minADE from scratch minus PPT's (m)", "ade", judged=True),
        claim("fde", "minFDE from scratch minus PPT's (m)", "fde", judged=True),
        claim("distillation_ade", "minADE without distillation minus PPT's (m)", "ade", "no_distillation"),
        claim("short_ade", "minADE without stage 1 minus PPT's (m)", "ade", "no_short"),
        claim("central_ade", "ADE of the most central forecast, scratch minus PPT's (m)", "central_ade"),
        claim("central_fde", "FDE of the most central forecast, scratch minus PPT's (m)", "central_fde"),
        *(
            Claim(
                f"{line}_{metric}",
                f"{metric.upper()} of {title} minus PPT's min{metric.upper()} (m)",
                partial(over_line, metric, line),
                ["ppt"],
                judged=False,
            )
            for line, title in (("velocity", "constant velocity"), ("line", "a fitted line"))
            for metric in ("ade", "fde")
        ),
    ],
    metrics={
        "forecasts/ade": "minADE (m)",
        "forecasts/fde": "minFDE (m)",
        "forecasts/central_ade": "ADE, most central (m)",
        "forecasts/central_fde": "FDE, most central (m)",
        "forecasts/destination_fde": "best destination (m)",
    },
    scales={
        "quick": Settings(
            train=400,
            test=100,
            width=16,
            hidden=(32,),
            short_steps=10,
            warm_steps=10,
            long_steps=10,
            way_steps=20,
            evaluate_every=20,
        ),
        "default": Settings(),
        "full": Settings(
            world="recordings",
            width=128,
            layers=3,
            hidden=(512, 512, 512),
            count=20,
            batch_size=256,
            short_steps=1200,
            warm_steps=450,
            long_steps=900,
            way_steps=1500,
            short_rate=1e-3,
            warm_rate=1e-3,
            long_rate=3e-4,
            way_rate=1e-3,
            destination_rate=1e-5,
            scratch_rate=1e-3,
            evaluate_every=1350,
            device="cuda",
        ),
    },
)
