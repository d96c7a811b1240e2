"""Curves of returns beside Stable-Baselines3's, at equal steps of the environment and with equal settings.

`python -m benchmarks.returns [--tasks NAME ...] [--seeds 5] [--side ours|theirs|both] [--save FILE] [--plot FILE]`

Every (task, side, seed) is a run; those that stand in the results file are not done again, so that the whole may be
stopped and continued. Stable-Baselines3 is needed for its side alone.

Settings are those that Stable-Baselines3 documents (its defaults) or that rl-zoo has tuned, as each task says. Both
sides have the same networks, starts of weights, optimisers, learning rates, batches, epochs, discounts, weights of
entropy, random steps at the start and averages of the target. Neither normalises observations or rewards. What still
differs is how each library works:

- PPO: advantages are standardised over the whole rollout here and over each minibatch there (in `cartpole` a minibatch
  is the whole rollout). rl-zoo also lowers the clip range of CartPole; it is constant on both sides.
- SAC: one gradient step moves critics, actor and temperature together here; there the temperature moves first, then
  the critics, and the actor follows critics that have just moved. The random steps at the start are cut off from the
  episode that follows here, and are its beginning there.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import gymnasium
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.harness import machine
from regimen import Cast, Draws, Epochs, Event, Knob, ReferenceRefresh, Regimen, ReplayMemory, Stage, Update, train
from regimen.controllers import Linear, Schedule
from regimen.credit import GAE
from regimen.lab.statistics import Interval, interval, intervals
from regimen.models import MLPTorso, QNetwork, Temperature, ValueNetwork
from regimen.models.q_network import ParallelLinear
from regimen.objectives import ppo, sac
from regimen.policies import ActionPolicy, GaussianHead, UniformPolicy
from regimen.policies.distributions import SquashedGaussian
from regimen.rewards import EnvironmentReward
from regimen.tasks import EnvTask, Gymnasium

Side = Literal["ours", "theirs"]
SIDES: tuple[Side, ...] = get_args(Side)
NAMES = {"ours": "Regimen", "theirs": "Stable-Baselines3"}
COLOURS = {"ours": "#D55E00", "theirs": "#0072B2"}
EVALUATION_SEED = 1_000_000
LAST_SHARE = 0.25
"""A run's final return is the mean over this last share of its evaluations."""

Act = Callable[[Any], Any]
"""Observations `[N, ...]` to actions `[N, ...]`, the likeliest ones, as arrays."""
Watch = Callable[[int, Act], None]
"""Told after every so many steps of the environment how the policy acts now."""


@dataclass(frozen=True)
class PPO:
    """Settings of PPO; networks are tanh of 64 and 64 for the policy and for the critic, as is the default there.

    Attributes:
        environment: its gymnasium name.
        copies, steps: of the environment, and of each in an iteration.
        iterations: collecting and learning.
        every: iterations between evaluations.
        minibatch: steps in one; epochs: passes over a rollout.
        learning_rate: at the start; lowered: whether it falls to 0 in a line.
        discount, lam: of generalised advantages.
    """

    environment: str
    copies: int
    steps: int
    iterations: int
    every: int
    minibatch: int
    epochs: int
    learning_rate: float
    lowered: bool
    discount: float
    lam: float

    @property
    def taken(self) -> int:
        """Steps of the environment in an iteration."""
        return self.copies * self.steps

    def ours(self, seed: int, watch: Watch) -> None:
        """Train with Regimen."""
        torch.manual_seed(seed)
        task = EnvTask(
            "task", Gymnasium(self.environment), copies=self.copies, steps=self.steps, discount=self.discount
        )
        seen, actions = task.spaces
        policy = ActionPolicy.for_spaces(seen, actions, widths=(64, 64))
        cast = Cast(policy=policy, critic=ValueNetwork(MLPTorso(seen.shape[0], (64, 64))))
        # The last iteration's rate is 0, as it is there.
        last = self.iterations - 1
        fall = Linear(self.learning_rate * last / self.iterations, 0.0, last)
        update = Update(
            ppo(),
            ["policy", "critic"],
            learning_rate=Knob("learning_rate", self.learning_rate),
            optimizer=torch.optim.Adam,
            options={"eps": 1e-5},
            batches=Epochs(self.epochs, self.taken // self.minibatch, "step"),
            max_grad_norm=0.5,
        )
        stage = Stage(
            "ppo",
            [task],
            self.iterations,
            batch_size=self.copies,
            reward=EnvironmentReward(),
            credit=GAE(self.lam),
            updates=[update],
            controllers=[Schedule("learning_rate", fall)] if self.lowered else [],
        )

        def listen(event: Event) -> None:
            if event.kind == "step" and event.step % self.every == 0:
                watch(event.step * self.taken, partial(greedy, policy))

        train(Regimen(cast, [stage], evaluations=[]), seed=seed, listener=listen)

    def theirs(self, seed: int, watch: Watch) -> None:
        """Train with Stable-Baselines3; what is not said is its default, and is what `ours` says."""
        import stable_baselines3
        from stable_baselines3.common.env_util import make_vec_env

        def rate(left: float) -> float:
            return self.learning_rate * (left if self.lowered else 1)

        model = stable_baselines3.PPO(
            "MlpPolicy",
            make_vec_env(self.environment, self.copies, seed=seed),
            learning_rate=rate,
            n_steps=self.steps,
            batch_size=self.minibatch,
            n_epochs=self.epochs,
            gamma=self.discount,
            gae_lambda=self.lam,
            seed=seed,
            device="cpu",
        )
        model.learn(self.iterations * self.taken, callback=watching(self.every * self.taken, watch))


@dataclass(frozen=True)
class SAC:
    """Settings of SAC; networks are ReLU of 256 and 256, one gradient step of 256 transitions after every step.

    Attributes:
        environment: its gymnasium name.
        steps: of it.
        every: steps between evaluations.
        learning_rate: of critics, actor and temperature.
        random: steps at the start that are taken at random, and not followed by a gradient step.
    """

    environment: str
    steps: int
    every: int
    learning_rate: float
    random: int = 100

    def ours(self, seed: int, watch: Watch) -> None:
        """Train with Regimen: a stage that fills the memory at random, and one that learns."""
        torch.manual_seed(seed)
        start = EnvTask("start", Gymnasium(self.environment), copies=1, steps=self.random, member="random")
        task = EnvTask("task", Gymnasium(self.environment), copies=1, steps=1)
        seen, box = task.spaces
        head = WideGaussianHead(256, box.shape[0], learned_std=True, box=(box.low, box.high))
        policy = ActionPolicy(MLPTorso(seen.shape[0], (256, 256), nn.ReLU), head)
        critic = QNetwork.for_spaces(seen, box)
        start_as_pytorch_does(policy)
        start_as_pytorch_does(critic)
        cast = Cast(policy=policy, critic=critic, temperature=Temperature(), random=UniformPolicy(box))
        memory = ReplayMemory(1_000_000, "transition")
        update = Update(
            sac(),
            ["policy", "critic", "temperature"],
            learning_rate=self.learning_rate,
            optimizer=torch.optim.Adam,
            batches=Draws(1, 256),
            max_grad_norm=None,
        )
        common: dict[str, Any] = {"batch_size": 1, "reward": EnvironmentReward(), "memory": memory}
        follow = ReferenceRefresh("critic_target", of="critic", mode="ema", decay=0.995)
        stages = [
            Stage("start", [start], 1, **common),
            Stage("sac", [task], self.steps - self.random, updates=[update], rules=[follow], **common),
        ]

        def listen(event: Event) -> None:
            taken = self.random + event.step
            if event.kind == "step" and event.stage == "sac" and taken % self.every == 0:
                watch(taken, partial(greedy, policy))

        train(Regimen(cast, stages, evaluations=[]), seed=seed, listener=listen)

    def theirs(self, seed: int, watch: Watch) -> None:
        """Train with Stable-Baselines3; what is not said is its default, and is what `ours` says."""
        import stable_baselines3
        from stable_baselines3.common.env_util import make_vec_env

        model = stable_baselines3.SAC(
            "MlpPolicy",
            make_vec_env(self.environment, 1, seed=seed),
            learning_rate=self.learning_rate,
            learning_starts=self.random,
            seed=seed,
            device="cpu",
        )
        model.learn(self.steps, callback=watching(self.every, watch))


@dataclass(frozen=True)
class Comparison:
    """One task for both sides.

    Attributes:
        label: of its panel and row.
        settings: whose methods `ours` and `theirs` train.
        episodes: in an evaluation.
    """

    label: str
    settings: PPO | SAC
    episodes: int


COMPARISONS = {
    # rl-zoo's settings, but for the clip range.
    "cartpole": Comparison("CartPole-v1, PPO", PPO("CartPole-v1", 8, 32, 391, 17, 256, 20, 1e-3, True, 0.98, 0.8), 10),
    # rl-zoo's: the defaults and a higher learning rate.
    "pendulum": Comparison("Pendulum-v1, SAC", SAC("Pendulum-v1", 8_000, 400, 1e-3), 10),
    # The defaults, with the rollout's 2048 steps from 8 copies; rl-zoo's need normalised observations and 1e6 steps.
    "halfcheetah": Comparison(
        "HalfCheetah-v5, PPO", PPO("HalfCheetah-v5", 8, 256, 98, 7, 64, 10, 3e-4, False, 0.99, 0.95), 5
    ),
    # The defaults.
    "halfcheetah-sac": Comparison("HalfCheetah-v5, SAC", SAC("HalfCheetah-v5", 10_000, 500, 3e-4), 5),
}


class WideGaussianHead(GaussianHead):
    """The head with the limits of the log deviation that Stable-Baselines3's SAC has, [-20, 2] instead of [-5, 2]."""

    def forward(self, features: Tensor, temperature: Tensor | float = 1.0) -> SquashedGaussian:
        """As that of the class above."""
        assert self.scale is not None, "the deviation depends on the features"
        std = self.scale(features).clamp(-20, 2).exp() * temperature
        return SquashedGaussian(self.mean(features), std, self.low, self.high)


def start_as_pytorch_does(module: nn.Module) -> None:
    """Weights and biases of linear layers anew, uniform within 1 / sqrt(inputs): PyTorch's default."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
        elif isinstance(layer, ParallelLinear):
            bound = layer.weight.shape[1] ** -0.5
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.uniform_(layer.bias, -bound, bound)


def greedy(policy: ActionPolicy, observations: Any) -> Any:
    """An `Act` of ours."""
    begins = torch.ones(len(observations), dtype=torch.bool)
    acted = policy.act(torch.from_numpy(observations), None, begins, {"temperature": 0.0}, torch.Generator())
    return acted.actions.numpy()


def watching(every: int, watch: Watch) -> Any:
    """A callback for Stable-Baselines3: watch when so many steps have been taken, and learned from."""
    from stable_baselines3.common.callbacks import BaseCallback

    class Watching(BaseCallback):
        def _on_rollout_start(self) -> None:
            if self.num_timesteps and self.num_timesteps % every == 0:
                watch(self.num_timesteps, lambda seen: self.model.predict(seen, deterministic=True)[0])

        def _on_training_end(self) -> None:
            self._on_rollout_start()

        def _on_step(self) -> bool:
            return True

    return Watching()


def mean_return(environment: str, act: Act, episodes: int) -> float:
    """Mean return of whole episodes, each from a seed of its own that is always the same, whoever acts."""
    envs = [gymnasium.make(environment) for _ in range(episodes)]
    seen = {i: env.reset(seed=EVALUATION_SEED + i)[0] for i, env in enumerate(envs)}
    total = 0.0
    while seen:
        actions = act(np.stack(list(seen.values())).astype(np.float32))
        for i, action in zip(list(seen), actions, strict=True):
            space = envs[i].action_space
            if isinstance(space, gymnasium.spaces.Box):
                action = np.clip(action, space.low, space.high)
            seen[i], reward, terminated, truncated, _ = envs[i].step(action)
            total += float(reward)
            if terminated or truncated:
                del seen[i]
    for env in envs:
        env.close()
    return total / episodes


@dataclass(frozen=True)
class Curve:
    """What a run was worth after so many steps of the environment."""

    steps: Sequence[int]
    returns: Sequence[float]

    @property
    def final(self) -> float:
        """Mean over the last quarter of the evaluations, rounded up to whole ones."""
        return float(np.mean(self.returns[-math.ceil(LAST_SHARE * len(self.returns)) :]))

    @property
    def throughout(self) -> float:
        """Mean over all evaluations: who learns faster has more."""
        return float(np.mean(self.returns))


def run(comparison: Comparison, side: Side, seed: int) -> Curve:
    """One run, evaluated as it goes on."""
    steps: list[int] = []
    returns: list[float] = []

    def watch(taken: int, act: Act) -> None:
        steps.append(taken)
        returns.append(mean_return(comparison.settings.environment, act, comparison.episodes))

    getattr(comparison.settings, side)(seed, watch)
    return Curve(steps, returns)


class Results:
    """The curves that there are, in a file that is written anew after each run."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        kept = json.loads(path.read_text())["runs"] if path and path.exists() else {}
        self._runs: dict[str, Curve] = {name: Curve(**curve) for name, curve in kept.items()}

    def missing(self, tasks: Sequence[str], sides: Sequence[Side], seeds: Sequence[int]) -> list[tuple[str, Side, int]]:
        """The runs that are asked for and not done, sides in turn."""
        wanted = [(task, side, seed) for task in tasks for seed in seeds for side in sides]
        return [asked for asked in wanted if _key(*asked) not in self._runs]

    def add(self, task: str, side: Side, seed: int, curve: Curve) -> None:
        """Keep a run, in the file too."""
        self._runs[_key(task, side, seed)] = curve
        if self._path is not None:
            written = {"machine": machine(), "runs": {name: asdict(found) for name, found in self._runs.items()}}
            self._path.write_text(json.dumps(written, indent=1, sort_keys=True) + "\n")

    def curves(self, task: str, seeds: Sequence[int]) -> dict[Side, list[Curve]]:
        """Of the seeds for which both sides are done."""
        done = [seed for seed in seeds if all(_key(task, side, seed) in self._runs for side in SIDES)]
        return {side: [self._runs[_key(task, side, seed)] for seed in done] for side in SIDES}


def _key(task: str, side: Side, seed: int) -> str:
    return f"{task}/{side}/{seed}"


@dataclass(frozen=True)
class Verdict:
    """How ours compares: means over seeds with their 95 % bootstrap intervals.

    Attributes:
        ours, theirs: final returns.
        difference: of the final returns, ours minus theirs, seed by seed.
        throughout: difference of the means over all evaluations.
    """

    ours: Interval
    theirs: Interval
    difference: Interval
    throughout: Interval

    @classmethod
    def of(cls, curves: Mapping[Side, Sequence[Curve]]) -> Verdict:
        """Judge curves of the same seeds in the same order."""
        pairs = list(zip(curves["ours"], curves["theirs"], strict=True))
        return cls(
            interval([a.final for a, _ in pairs]),
            interval([b.final for _, b in pairs]),
            interval([a.final - b.final for a, b in pairs]),
            interval([a.throughout - b.throughout for a, b in pairs]),
        )

    @property
    def below(self) -> bool:
        """Whether ours is below by more than the interval: all of it lies below 0."""
        return self.difference.high < 0


def table(verdicts: Mapping[str, Verdict]) -> Table:
    """One line for each task."""
    result = Table()
    for column in ("task", NAMES["ours"], NAMES["theirs"], "difference", "difference throughout", "verdict"):
        result.add_column(column)
    for name, verdict in verdicts.items():
        found = (verdict.ours, verdict.theirs, verdict.difference, verdict.throughout)
        said = "below" if verdict.below else "not below"
        result.add_row(COMPARISONS[name].label, *(f"{x.mean:.4g} [{x.low:.4g}, {x.high:.4g}]" for x in found), said)
    return result


def figure(results: Results, tasks: Sequence[str], seeds: Sequence[int]) -> Figure:
    """A panel for each task: mean return of both sides and its 95 % interval over steps of the environment."""
    drawn = Figure(figsize=(4.2 * len(tasks), 3.6), layout="constrained", dpi=150)
    FigureCanvasAgg(drawn)
    for axes, task in zip(drawn.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for side, curves in results.curves(task, seeds).items():
            steps, band = curves[0].steps, intervals([curve.returns for curve in curves])
            axes.plot(steps, [x.mean for x in band], color=COLOURS[side], label=NAMES[side], linewidth=1.8)
            axes.fill_between(
                steps, [x.low for x in band], [x.high for x in band], color=COLOURS[side], alpha=0.2, linewidth=0
            )
        axes.set_title(COMPARISONS[task].label, fontsize=10)
        axes.set_xlabel("environment steps")
        axes.set_ylabel("mean return of greedy episodes")
        axes.spines[["right", "top"]].set_visible(False)
        axes.grid(color="#E5E5E5", linewidth=0.7)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(EngFormatter())
    drawn.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return drawn


def main() -> None:
    """Run what is missing, print the verdicts, draw the curves."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.returns", description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=COMPARISONS, default=list(COMPARISONS))
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them; develop from 100 on")
    parser.add_argument("--side", choices=[*SIDES, "both"], default="both")
    parser.add_argument("--save", type=Path, help="results file; runs that it holds are not done again")
    parser.add_argument("--plot", type=Path, help="where the figure goes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results, seeds = Results(options.save), range(options.first, options.first + options.seeds)
    sides = SIDES if options.side == "both" else (options.side,)
    for task, side, seed in results.missing(options.tasks, sides, seeds):
        started = time.perf_counter()
        curve = run(COMPARISONS[task], side, seed)
        results.add(task, side, seed, curve)
        print(f"{task} {side} {seed}: {curve.final:.4g} after {time.perf_counter() - started:.0f} s", flush=True)
    complete = [task for task in options.tasks if results.curves(task, seeds)["ours"]]
    Console(width=160).print(table({task: Verdict.of(results.curves(task, seeds)) for task in complete}))
    if options.plot and complete:
        figure(results, complete, seeds).savefig(options.plot)


if __name__ == "__main__":
    main()
