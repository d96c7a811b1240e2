"""The robot arm of Meta-World: fifty tasks, their goals, and what the arm is told (Yu et al. 2019).

A step moves the hand and the gripper by four numbers in [-1, 1]. An observation is 39 numbers: the hand, the gripper
and two objects now (18), the same a step before (18), and the goal (3), zeros where it is hidden. The reward is dense,
in [0, 10] in its version "v2". Numbers of different releases of the package, or of different versions of the reward,
cannot be compared.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import gymnasium
import gymnasium.spaces as spaces
import numpy as np

from regimen.tasks.environments.gymnasium import GymnasiumVector

Benchmark = Literal["MT1", "MT10", "MT25", "MT50", "ML1", "ML10", "ML25", "ML45"]
Split = Literal["train", "test"]
GOALS = 50
LONGEST = 500
OBSERVED = 39
"""Numbers in an observation, before the tasks'."""


@dataclass(frozen=True)
class MetaWorld:
    """Makes copies of one task of Meta-World: the `make` of an `EnvTask`.

    The benchmarks of names with MT tell the goal, those with ML hide it. An episode's seed draws its goal, uniformly;
    nothing else in an episode is random. Episodes do not end at success while a policy learns; they do when it is
    evaluated (`stops=True`), so that an episode's last step tells whether it ever succeeded.

    Attributes:
        task: such as `"reach-v3"`.
        benchmark: whose goals these are. MT1 and ML1 are of a single task, any of the fifty.
        seed: of the benchmark's goals.
        split: `"train"`, or `"test"` for the tasks (of ML1, the goals) that a benchmark holds out.
        goals: the first and the number after the last of the benchmark's fifty that episodes draw from.
        among: names of tasks of which each has one more number in the observation, 1 for `task` and 0 for the others.
        horizon: steps of an episode, at most 500.
        stops: whether an episode ends at success.
        reward_version: `"v2"`, or `"v1"` for the older one.
        tells: numbers of the environment's `info` that become columns (`success`, `near_object`, `grasp_success`,
            `grasp_reward`, `in_place_reward`, `obj_to_target`, `unscaled_reward`).
    """

    task: str
    benchmark: Benchmark = "MT1"
    seed: int = 0
    split: Split = "train"
    goals: tuple[int, int] = (0, GOALS)
    among: Sequence[str] = ()
    horizon: int = LONGEST
    stops: bool = False
    reward_version: Literal["v1", "v2"] = "v2"
    tells: Sequence[str] = ("success",)

    def __post_init__(self) -> None:
        if not 1 <= self.horizon <= LONGEST:
            raise ValueError(
                f"MetaWorld('{self.task}'): horizon is {self.horizon}; expected 1 to {LONGEST}, the length of an "
                "episode of the package"
            )
        if not 0 <= self.goals[0] < self.goals[1] <= GOALS:
            raise ValueError(
                f"MetaWorld('{self.task}'): goals is {self.goals}; expected (first, after the last) within 0 and "
                f"{GOALS}, such as (0, 40) to hold out ten"
            )
        if self.among and self.task not in self.among:
            raise ValueError(
                f"MetaWorld('{self.task}'): among names {', '.join(self.among)}; expected the task itself, too"
            )

    def __call__(self, count: int) -> GymnasiumVector:
        """`count` copies.

        Raises:
            ImportError: the package is not installed.
            ValueError: there is no such task in the benchmark.
        """
        return GymnasiumVector([self.one] * count, tells=self.tells)

    def one(self) -> Arm:
        """One copy."""
        return Arm(self)


class Arm(gymnasium.Env[Any, Any]):
    """One copy of a task of Meta-World, as a `MetaWorld` describes it."""

    def __init__(self, settings: MetaWorld) -> None:
        self.settings = settings
        known = tasks_of(settings.benchmark, settings.split)
        if settings.task not in known:
            near = difflib.get_close_matches(settings.task, known, n=3, cutoff=0.4)
            raise ValueError(
                f"there is no task '{settings.task}' in {settings.benchmark}, split '{settings.split}'"
                f"{'; did you mean ' + ' or '.join(near) + '?' if near else '.'} There are: {', '.join(known)}"
            )
        single = settings.task if settings.benchmark in ("MT1", "ML1") else None
        self._maker, goals = _goals(settings.benchmark, settings.seed, settings.split, single)[settings.task]
        self._goals = goals[slice(*settings.goals)]
        self._robot: Any = self._made()
        self._told = np.array([name == settings.task for name in settings.among], dtype=np.float64)
        self.action_space = self._robot.action_space
        seen = self._robot.sawyer_observation_space
        low, high = np.zeros(len(self._told)), np.ones(len(self._told))
        self.observation_space = spaces.Box(np.append(seen.low, low), np.append(seen.high, high), dtype=np.float64)

    def _made(self) -> Any:
        idle = _IDLE[self._maker, self.settings.reward_version]
        robot = idle.pop() if idle else self._maker(reward_function_version=self.settings.reward_version)
        robot.set_task(self._goals[0])
        return robot

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode with the goal that the seed draws."""
        super().reset(seed=seed)
        self._robot.set_task(self._goals[int(self.np_random.integers(len(self._goals)))])
        seen, _ = self._robot.reset()
        self._taken = 0
        return np.append(seen, self._told), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, Mapping[str, Any]]:
        """A step; terminated at success where episodes stop there, truncated at the horizon."""
        seen, reward, _, _, info = self._robot.step(action)
        self._taken += 1
        done = self.settings.stops and bool(info["success"])
        over = not done and self._taken >= self.settings.horizon
        return np.append(seen, self._told), float(reward), done, over, info

    def close(self) -> None:
        """Keep the arm for whoever needs one of its kind next: to load one takes as long as five hundred steps."""
        if self._robot is not None:
            _IDLE[self._maker, self.settings.reward_version].append(self._robot)
            self._robot = None


_IDLE: defaultdict[tuple[Any, str], list[Any]] = defaultdict(list)


@lru_cache(maxsize=32)
def _goals(benchmark: str, seed: int, split: str, single: str | None) -> dict[str, tuple[Any, list[Any]]]:
    """Of every task its class, and what the package calls its tasks: the goals. Drawing them takes 0.4 s for each."""
    make = getattr(_package(), benchmark)
    made = make(seed=seed) if single is None else make(single, seed=seed)
    classes, goals = getattr(made, f"{split}_classes"), getattr(made, f"{split}_tasks")
    return {name: (kind, [goal for goal in goals if goal.env_name == name]) for name, kind in classes.items()}


def tasks_of(benchmark: Benchmark, split: Split = "train") -> tuple[str, ...]:
    """Names of the tasks of a benchmark, in its order; of MT1 and ML1, all of which one may be chosen.

    Raises:
        ImportError: the package is not installed.
        ValueError: there is no such benchmark or split; benchmarks of names with MT hold no tasks out.
    """
    if benchmark not in get_args(Benchmark) or split not in get_args(Split):
        raise ValueError(
            f"Meta-World has no benchmark '{benchmark}' with split '{split}'; expected one of "
            f"{', '.join(get_args(Benchmark))}, and {' or '.join(get_args(Split))}"
        )
    if benchmark.startswith("MT") and split == "test":
        raise ValueError(
            f"benchmark {benchmark} holds no tasks out; use split 'train', and hold goals out (goals=(0, 40))"
        )
    _package()
    from metaworld import env_dict

    if benchmark in ("MT1", "ML1"):
        return tuple(env_dict.ALL_V3_ENVIRONMENTS)
    found = getattr(env_dict, f"{benchmark}_V3")
    return tuple(found if benchmark.startswith("MT") else found[split])


def _package() -> Any:
    try:
        import metaworld
    except ImportError as error:
        raise ImportError("the tasks of Meta-World need metaworld: pip install 'regimen-rl[metaworld]'") from error
    return metaworld
