"""A small run with every kind of state in it, started as its own process by `test_resume`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from regimen.cast import Cast, ReferenceRefresh
from regimen.controllers import Linear, Schedule
from regimen.credit import GroupRelativeAdvantage
from regimen.knobs import Knob
from regimen.loop import Event, train
from regimen.memory import ReplayMemory
from regimen.models import MLPDenoiser
from regimen.objectives import ClippedSurrogateObjective, FlowMatchingObjective, ReferenceKL
from regimen.policies import FlowPolicy
from regimen.regimen import Regimen, Stage
from regimen.rewards import EditReward, Reward, Scene
from regimen.rollout import Rollout
from regimen.tasks.worlds.digits import CONDITIONS, SHAPE, DigitsWorld, edit_target
from regimen.update import Draws, Epochs, Update


class Darkness(Reward):
    """Mean ink against a running mean: a reward with state."""

    name = "darkness"
    stateful = True

    def __init__(self) -> None:
        self.mean = 0.0

    def score(self, rollout: Rollout, scene: Scene) -> torch.Tensor:
        ink = rollout["image"].flatten(1).mean(1)
        self.mean = 0.9 * self.mean + 0.1 * float(ink.mean())
        # numpy's and torch's own generators must be restored too.
        return self.mean - ink + 1e-3 * torch.rand(())

    def save_state(self) -> dict[str, float]:
        return {"mean": self.mean}

    def load_state(self, state: dict[str, float]) -> None:
        self.mean = state["mean"]


def build() -> Regimen:
    """Supervised, then reinforcement on two tasks, then learning from replay."""
    torch.manual_seed(0)
    world = DigitsWorld(100, held_out=40)
    policy = FlowPolicy(MLPDenoiser(SHAPE, CONDITIONS, width=32, blocks=1), SHAPE, sampling_steps=3, evaluation_steps=4)
    edit, generate = world.editing(4), world.generation(4)
    objective = ClippedSurrogateObjective(clip=1e-2) + Knob("kl_weight", 0.1) * ReferenceKL("exact")
    reward = EditReward(edit_target).on("edit") + 0.1 * Darkness()
    reinforce = Stage(
        "reinforce", [edit, generate], 25, 32, reward=reward, credit=GroupRelativeAdvantage(std="batch"),
        updates=[Update(objective, batches=Epochs(2, 2), learning_rate=Knob("learning_rate", 1e-3))],
        rules=[ReferenceRefresh(), ReferenceRefresh(member="average", mode="ema", decay=0.9)],
        controllers=[Schedule("learning_rate", Linear(1e-3, 1e-4, 25)), Schedule("mixture/edit", Linear(1, 3, 25))],
        evaluate_every=7,
    )  # fmt: skip
    replay = Stage(
        "replay", [world.supervised("pairs", 0.1)], 25, 8, memory=lambda: ReplayMemory(64),
        updates=[Update(FlowMatchingObjective(), batches=Draws(2, 16))],
    )  # fmt: skip
    pretrain = Stage(
        "pretrain",
        [world.supervised("first", 0.1)],
        25,
        32,
        updates=[Update(FlowMatchingObjective())],
        evaluate_every=10,
    )
    return Regimen(Cast(policy=policy), [pretrain, reinforce, replay], evaluations=[edit, generate])


def main(out: Path, resume: bool, pause: float) -> None:
    """Train with a checkpoint every three iterations; `pause` slows each, so that a kill has something to hit."""

    def wait(event: Event) -> None:
        if event.kind == "step" and pause:
            time.sleep(pause)

    torch.set_num_threads(1)
    train(build(), seed=3, out=out, resume=resume, checkpoint_every=3, listener=wait)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "resume", float(sys.argv[3]))
