"""Six sources of reward for one flow policy, two of which reward the opposite: they are found, and drawn no more.

First every source rates what the policy draws as it is. R-MTGB is fitted to these ratings, a source being a task, and
isolates the hostile two. Then the policy is trained, and the mixture of sources follows the outlier scores. Nobody
tells which sources are hostile; the evaluation asks none of them.

python examples/hostile_sources.py [SEEDS]
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict

from regimen import Cast, Regimen, ReplayMemory, Stage, Update, train
from regimen.controllers import TaskMixture
from regimen.credit import GroupRelativeAdvantage
from regimen.estimators import FitEstimator, Reading, RobustMultiTaskGradientBoostingRegressor
from regimen.models import MLPDenoiser
from regimen.objectives import ClippedSurrogateObjective
from regimen.policies import FlowPolicy
from regimen.rewards import Expression, FunctionReward, ModelReward
from regimen.rollout import Rollout
from regimen.tasks import Evaluation, PromptTask

SHAPE, SOURCES, HOSTILE = (1, 2, 2), 6, (1, 4)
PROMPTS = TensorDict({"condition": torch.arange(2)}, batch_size=[2])


def likeness(rollout: Rollout) -> torch.Tensor:
    """How near an image is to what was asked for, all dark or all bright: `[B]` in (0, 1]."""
    wanted = 2.0 * rollout.context["condition"] - 1
    distance = (rollout["image"] - wanted[:, None, None, None]).square().mean((1, 2, 3))
    return (-distance / 2).exp()


def rating(source: int, rollout: Rollout) -> torch.Tensor:
    """Up to five stars for likeness, and half a star for a taste of its own; if it is hostile, all turned around."""
    taste = rollout["image"].flatten(1)[:, source % 4].tanh()
    view = 5 * likeness(rollout) + 0.5 * taste
    return -view if source in HOSTILE else view


def seen(rollout: Rollout) -> torch.Tensor:
    """What the estimator is shown: the image and what was asked for."""
    return torch.cat([rollout["image"].flatten(1), rollout.context["condition"][:, None]], 1)


def measure(policy: FlowPolicy, knobs: Mapping[str, float], rng: torch.Generator) -> Evaluation:
    """The likeness of 256 samples."""
    prompts = PROMPTS[torch.arange(256) % 2]
    return Evaluation({"likeness": float(likeness(policy.sample(prompts, knobs, rng)).mean())})


def regimen(seed: int, robust: bool, rated: int = 480, steps: int = 60) -> Regimen:
    """Ask, then train; with the mixture by outlier scores, or an equal one."""
    torch.manual_seed(seed)
    names = [f"source{index}" for index in range(SOURCES)]
    tasks = [PromptTask(name, PROMPTS, group_size=8) for name in names]
    ratings: list[Expression] = [
        FunctionReward(partial(rating, index), f"rating{index}").on(name) for index, name in enumerate(names)
    ]
    reward = sum(ratings[1:], start=ratings[0])
    reading, memory = Reading(seen), ReplayMemory(rated)
    odd = ModelReward("sources", ["outlier_score"], ask=reading.outlier_scores).logged()
    learn: dict[str, Any] = {
        "credit": GroupRelativeAdvantage(),
        "updates": [Update(ClippedSurrogateObjective(clip=1e-2), learning_rate=3e-3)],
        "controllers": [TaskMixture(names, by="outlier_score")] if robust else [],
    }
    stages = [
        Stage("ask", tasks, 1, rated, reward, memory=memory),
        Stage("fit", tasks, 0, memory=memory, prepare=[FitEstimator("sources", reading)]),
        Stage("learn", tasks, steps, 96, reward + odd, **learn),
    ]
    cast = Cast(
        policy=FlowPolicy(MLPDenoiser(SHAPE, 2, width=32, blocks=1), SHAPE, sampling_steps=4),
        sources=RobustMultiTaskGradientBoostingRegressor(n_shared=10, n_partition=60, n_task=10, random_state=seed),
    )
    return Regimen(cast, stages, evaluations=[PromptTask("truth", PROMPTS, evaluate=measure)])


def main() -> None:
    """Both mixtures over some seeds."""
    seeds = range(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
    found: dict[bool, list[float]] = {True: [], False: []}
    for seed in seeds:
        for robust, reached in found.items():
            outcome = train(regimen(seed, robust), seed=seed)
            reached.append(outcome.evaluations[-1]["metrics"]["truth/likeness"])
            scores = outcome.cast["sources"].outlier_score_.round(2).tolist()
            print(f"seed {seed}, {'by outlier score' if robust else 'equal'}: likeness {reached[-1]:.3f}, {scores}")
    for robust, reached in found.items():
        print(f"{'by outlier score' if robust else 'equal':>16}: {statistics.mean(reached):.3f}")


if __name__ == "__main__":
    main()
