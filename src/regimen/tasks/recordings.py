"""Recorded experience as rows of single steps, which a `DatasetTask` reads: offline learning starts here."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from regimen.rollout import Rollout
from regimen.tasks.environments.base import MakeEnv, Observations
from regimen.tasks.environments.gymnasium import GymnasiumVector


def transitions(rollout: Rollout) -> TensorDict:
    """Every step of a rollout that an `EnvTask` collected, as a row `[N]` of one step.

    A row holds `observations`, `actions` and `discount [N, 1, ...]`, and under `step_columns` `next_observations` and
    `env_reward`. After a time limit the discount is what it was, since the value goes on; it is 0 only where an episode
    terminated. Let the task record terminations only (`EnvTask(discount=None)`) where an objective multiplies by a
    discount of its own.

    Raises:
        ValueError: the rollout has no observations.
    """
    if rollout.observations is None:
        raise ValueError(
            f"transitions: the rollout of task {'/'.join(rollout.task_names)} holds no observations; expected one that "
            "an EnvTask collected"
        )
    where = rollout.mask
    columns = {name: rollout[name][where] for name in ("next_observations", "env_reward")}
    return transition_rows(rollout.observations[where], rollout.actions[where], rollout.discount[where], **columns)


def transition_rows(
    observations: Observations,
    actions: Tensor,
    discount: Tensor,
    next_observations: Observations,
    env_reward: Tensor | None = None,
) -> TensorDict:
    """Rows of a `DatasetTask`, as `transitions` describes them, of columns `[N, ...]`; rewards may be left out."""
    after = {"next_observations": next_observations, "env_reward": env_reward}
    steps = {name: value.unsqueeze(1) for name, value in after.items() if value is not None}
    fields = {"observations": observations, "actions": actions, "discount": discount}
    table = {name: value.unsqueeze(1) for name, value in fields.items()}
    table["step_columns"] = TensorDict(steps, [len(actions), 1])
    return TensorDict(table, batch_size=[len(actions)])


def minari_transitions(name: str) -> TensorDict:
    """The steps of a Minari data set on this machine, by its name such as `"mujoco/hopper/medium-v0"`.

    Rows are those of `transitions`, with a discount of 1, and 0 where an episode terminated. Observations that are
    dictionaries become tables; numbers in double precision single.

    Raises:
        ImportError: `minari` is not installed.
        FileNotFoundError: there is no such data set under Minari's folder (`MINARI_DATASETS_PATH`).
    """
    episodes = [_columns(episode) for episode in _minari_data(name).iterate_episodes()]
    joined: dict[str, Any] = {key: torch.cat([columns[key] for columns in episodes]) for key in episodes[0]}
    return transition_rows(**joined)


def minari_environment(name: str) -> MakeEnv:
    """The environment that a Minari data set evaluates on: the `make` of an `EnvTask`.

    Raises:
        ImportError, FileNotFoundError: as for `minari_transitions`.
    """
    data = _minari_data(name)

    def make(count: int) -> GymnasiumVector:
        return GymnasiumVector([lambda: data.recover_environment(eval_env=True)] * count)

    return make


def _minari_data(name: str) -> Any:
    try:
        minari: Any = importlib.import_module("minari")
    except ImportError as error:
        raise ImportError(f"data set '{name}' needs minari: pip install 'regimen-rl[minari]'") from error
    try:
        return minari.load_dataset(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"Minari has no data set '{name}' on this machine ({error}); get it with 'minari download {name}', or "
            "point MINARI_DATASETS_PATH at the folder that holds it"
        ) from error


def _columns(episode: Any) -> dict[str, Any]:
    """The steps of one episode, `[T, ...]`; of `T + 1` observations the last came after the last step."""
    seen, steps = _tensors(episode.observations), len(episode.rewards)
    over = torch.from_numpy(np.asarray(episode.terminations, dtype=bool))
    return {
        "observations": seen[:steps],
        "actions": _tensors(episode.actions),
        "discount": 1 - over.float(),
        "next_observations": seen[1 : steps + 1],
        "env_reward": torch.from_numpy(np.asarray(episode.rewards, dtype=np.float32)),
    }


def _tensors(value: Any) -> Any:
    if isinstance(value, Mapping):
        entries = {key: _tensors(entry) for key, entry in value.items()}
        return TensorDict(entries, [len(next(iter(entries.values())))])
    array = np.asarray(value)
    return torch.from_numpy(array.astype(np.float32) if array.dtype == np.float64 else array)
