"""Offline control on HalfCheetah's sizes: IQL and f-DVL, updates per second of value, policy and critics together.

Both sides: networks of 256-256 with ReLU, twin critics, Adam at 3e-4, batches of 256 from 100,000 recorded steps (17
numbers seen, 6 in an action; what they are does not matter to the time), a Gaussian policy with one deviation for all
states, discount 0.99, a target average of 0.995 in every update. Metrics of every update in memory, no evaluation, no
checkpoints. d3rlpy writes its log once, at the end; `fit` is what its documentation trains with.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import nn

from benchmarks.harness import Job, Measurement
from regimen import Cast, ReferenceRefresh, Regimen, Stage, Update, train
from regimen.models import MLPTorso, QNetwork, ValueNetwork
from regimen.objectives import ChiSquare, Expectile, Maximiser, iql
from regimen.policies import ActionPolicy, GaussianHead
from regimen.rewards import EnvironmentReward
from regimen.tasks import DatasetTask, transition_rows

ROWS, SEEN, ACTIONS, LENGTH = 100_000, 17, 6, 1000
WIDTHS, RATE, BATCH = (256, 256), 3e-4, 256
WARM_UP, UPDATES = 20, 800


def recorded(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Observations, actions and rewards of steps."""
    rng = np.random.default_rng(seed)
    seen, actions = rng.standard_normal((ROWS + 1, SEEN)), rng.uniform(-1, 1, (ROWS, ACTIONS))
    return seen.astype(np.float32), actions.astype(np.float32), rng.standard_normal(ROWS).astype(np.float32)


def measured(run: Callable[[], object]) -> Measurement:
    """Updates per second."""
    wall, processor = time.perf_counter(), time.process_time()
    run()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return Measurement(UPDATES / wall, {}, {"processor": processor, "wall": wall})


def ours(f: Maximiser, seed: int) -> Measurement:
    """Through `train`, all members in one update."""
    seen, actions, rewards = map(torch.from_numpy, recorded(seed))
    rows = transition_rows(seen[:-1], actions, torch.ones(ROWS), seen[1:], rewards)
    cast = Cast(
        policy=ActionPolicy(MLPTorso(SEEN, WIDTHS, nn.ReLU), GaussianHead(WIDTHS[-1], ACTIONS)),
        critic=QNetwork(MLPTorso(SEEN, ()), ACTIONS, widths=WIDTHS),
        value=ValueNetwork(MLPTorso(SEEN, WIDTHS, nn.ReLU)),
    )
    task = DatasetTask("data", rows, order="random")

    def learn(steps: int) -> Regimen:
        update = Update(
            iql(f=f, discount=0.99), ["value", "policy", "critic"], RATE, torch.optim.Adam, max_grad_norm=None
        )
        target = ReferenceRefresh("critic_target", of="critic", mode="ema", decay=0.995)
        stage = Stage("offline", [task], steps, BATCH, EnvironmentReward(), updates=[update], rules=[target])
        return Regimen(cast, [stage], evaluations=[])

    train(learn(WARM_UP), seed=seed)
    return measured(partial(train, learn(UPDATES), seed=seed))


def theirs(seed: int) -> Measurement:
    """Through `fit`."""
    import d3rlpy

    seen, actions, rewards = recorded(seed)
    cuts = np.arange(1, ROWS + 1) % LENGTH == 0
    data = d3rlpy.dataset.MDPDataset(seen[:-1], actions, rewards, np.zeros(ROWS), cuts.astype(np.float32))
    algorithm = d3rlpy.algos.IQLConfig(
        actor_learning_rate=RATE, critic_learning_rate=RATE, batch_size=BATCH, expectile=0.9
    ).create(device=False)
    quiet = {"logger_adapter": d3rlpy.logging.NoopAdapterFactory(), "show_progress": False, "save_interval": 10**6}
    algorithm.fit(data, n_steps=WARM_UP, n_steps_per_epoch=WARM_UP, **quiet)
    return measured(partial(algorithm.fit, data, n_steps=UPDATES, n_steps_per_epoch=UPDATES, **quiet))


JOBS = [
    Job(
        f"offline-{name}",
        "updates/s",
        partial(ours, f),
        theirs,
        peer="d3rlpy IQL",
        target=1.5,
        bound="Nineteen products of 256 x 256 x 256, at 0.18 ms by oneDNN, are a third of an update's processor time. "
        "Small operations of losses, gradients and their norm are most of the rest; reading rows takes 9 %, the judge "
        "9 %, health and the target's average 4 % each. The peer takes two backward passes, ours one.",
    )
    for name, f in (("iql", Expectile(0.9)), ("f-dvl", ChiSquare(0.7)))
]
