"""PPO in whole runs, collection and learning: steps of the environment per second.

Both sides: CleanRL's settings of `ppo.py` and `ppo_continuous_action.py` (without their wrappers that rescale
observations and rewards), separate policy and value networks of 64-64 with tanh, orthogonal weights, the same numbers
of copies, steps, epochs and minibatches, a linearly annealed learning rate, advantages standardised within each
minibatch, Adam with epsilon 1e-5 (the peer's clipped value loss is that of the clipped value alone; ours, as CleanRL's,
is the larger of two); metrics of every iteration, no checkpoints, no logs on disk. The return is that of
the likeliest actions after training, outside the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks.harness import Job, Measurement
from regimen import Cast, Epochs, Knob, Regimen, Stage, Update, train
from regimen.controllers import Linear, Schedule
from regimen.credit import GAE
from regimen.models import ValueNetwork, torso_for
from regimen.objectives import ClippedSurrogateObjective, EntropyBonus, ValueObjective
from regimen.policies import ActionPolicy
from regimen.rewards import EnvironmentReward
from regimen.tasks import EnvTask, Gymnasium

EVALUATED = 16


@dataclass(frozen=True)
class Setting:
    """What differs between the jobs; `iterations` are those of a measurement."""

    env: str
    copies: int
    steps: int
    epochs: int
    minibatches: int
    rate: float
    entropy: float
    value_clip: float
    iterations: int

    @property
    def batch(self) -> int:
        """Steps of an iteration."""
        return self.copies * self.steps


CARTPOLE = Setting("CartPole-v1", 4, 128, 4, 4, 2.5e-4, 0.01, 0.2, 196)
CHEETAH = Setting("HalfCheetah-v5", 1, 2048, 10, 32, 3e-4, 0.0, 0.2, 10)


def measured(setting: Setting, run: Callable[[], object], score: Callable[[], float]) -> Measurement:
    """Steps per second of a run, and the return after it."""
    wall, processor = time.perf_counter(), time.process_time()
    run()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    parts = {"processor": processor, "wall": wall}
    return Measurement(setting.iterations * setting.batch / wall, {"return": score()}, parts)


def regimen(setting: Setting) -> tuple[Regimen, EnvTask]:
    """The regimen, without evaluations."""
    task = EnvTask(
        "task", Gymnasium(setting.env), copies=setting.copies, steps=setting.steps, evaluation_episodes=EVALUATED
    )
    cast = Cast(policy=ActionPolicy.for_spaces(*task.spaces), critic=ValueNetwork(torso_for(task.spaces[0])))
    objective = ClippedSurrogateObjective(0.2, aggregate="token", standardize=True) + 0.5 * ValueObjective(
        setting.value_clip
    )
    if setting.entropy:
        objective = objective - setting.entropy * EntropyBonus()
    update = Update(
        objective,
        ["policy", "critic"],
        Knob("learning_rate", setting.rate, 0.0),
        torch.optim.Adam,
        {"eps": 1e-5},
        Epochs(setting.epochs, setting.minibatches, "step"),
        max_grad_norm=0.5,
    )
    stage = Stage(
        "control",
        [task],
        setting.iterations,
        setting.copies,
        EnvironmentReward(),
        GAE(0.95, normalize=None),
        [update],
        [Schedule("learning_rate", Linear(setting.rate, 0.0, setting.iterations))],
    )
    return Regimen(cast, [stage], evaluations=[]), task


def ours(setting: Setting, seed: int) -> Measurement:
    """Through `train`."""
    train(regimen(replace(setting, iterations=2))[0])
    built, task = regimen(setting)
    knobs = built.stages[0].board(built.cast, {}).for_evaluation()

    def score() -> float:
        return task.evaluate(built.cast, knobs, torch.Generator().manual_seed(seed)).metrics["return"]

    return measured(setting, lambda: train(built, seed=seed), score)


def peer(setting: Setting, seed: int) -> Any:
    """Stable-Baselines3's PPO, with its own vector environment in the same process and its monitor."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    return PPO(
        "MlpPolicy",
        make_vec_env(setting.env, setting.copies, seed),
        learning_rate=lambda left: setting.rate * left,
        n_steps=setting.steps,
        batch_size=setting.batch // setting.minibatches,
        n_epochs=setting.epochs,
        gamma=0.99,
        gae_lambda=0.95,
        clip_range=0.2,
        clip_range_vf=setting.value_clip,
        ent_coef=setting.entropy,
        vf_coef=0.5,
        max_grad_norm=0.5,
        seed=seed,
        device="cpu",
    )


def theirs(setting: Setting, seed: int) -> Measurement:
    """Through `learn`."""
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    peer(setting, seed).learn(2 * setting.batch)
    model = peer(setting, seed)

    def score() -> float:
        environment = make_vec_env(setting.env, EVALUATED, seed + 1)
        return float(evaluate_policy(model, environment, EVALUATED)[0])

    return measured(setting, lambda: model.learn(setting.iterations * setting.batch), score)


def job(name: str, setting: Setting, target: float, bound: str = "") -> Job:
    """A setting's job."""
    both = partial(ours, setting), partial(theirs, setting)
    return Job(name, "steps/s", *both, peer="Stable-Baselines3 PPO", target=target, bound=bound)


JOBS = [
    job(
        "ppo-cartpole",
        CARTPOLE,
        2.0,
        "The price of calls on small arrays. A step of four copies takes some 70 us at best: gymnasium's part is 19 "
        "us, acting 19 us, and a new start, in one step of six, 21 us. A gradient step is 243 operations, 103 of them "
        "of the backward pass: the products and tanh of two networks are 0.35 ms, Adam is 0.06 ms, nearly all of it a "
        "wrapper.",
    ),
    job(
        "ppo-halfcheetah",
        CHEETAH,
        1.5,
        "Gradient steps, as there, of 64 rows; of a step MuJoCo takes 33 us.",
    ),
]
