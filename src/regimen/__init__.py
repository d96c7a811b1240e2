"""Regimen: multi-task reinforcement learning and reward-driven post-training on one loop.

Collect, judge, credit, learn, adapt: on language, image and control policies alike. The names below are the
everyday ones; the parts live in `regimen.tasks`, `regimen.rewards`, `regimen.credit`, `regimen.objectives`,
`regimen.controllers` and `regimen.policies`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regimen.cast import Cast, ReferenceRefresh
    from regimen.checkers import check
    from regimen.knobs import Knob, Knobs
    from regimen.loop import Interrupted, Outcome, train
    from regimen.memory import NewestRollout, ReplayMemory
    from regimen.progress import Event, ProgressBar
    from regimen.regimen import Regimen, Stage
    from regimen.rollout import Rollout
    from regimen.runs import RunError
    from regimen.storage import StorageError
    from regimen.update import Draws, Epochs, Update

__version__ = "0.1.0"

_HOME = {
    "Cast": "cast",
    "Draws": "update",
    "Epochs": "update",
    "Event": "progress",
    "Interrupted": "loop",
    "Knob": "knobs",
    "Knobs": "knobs",
    "NewestRollout": "memory",
    "Outcome": "loop",
    "ProgressBar": "progress",
    "ReferenceRefresh": "cast",
    "Regimen": "regimen",
    "ReplayMemory": "memory",
    "Rollout": "rollout",
    "RunError": "runs",
    "Stage": "regimen",
    "StorageError": "storage",
    "Update": "update",
    "check": "checkers",
    "train": "loop",
}

__all__ = [
    "Cast",
    "Draws",
    "Epochs",
    "Event",
    "Interrupted",
    "Knob",
    "Knobs",
    "NewestRollout",
    "Outcome",
    "ProgressBar",
    "ReferenceRefresh",
    "Regimen",
    "ReplayMemory",
    "Rollout",
    "RunError",
    "Stage",
    "StorageError",
    "Update",
    "__version__",
    "check",
    "train",
]


def __getattr__(name: str) -> Any:
    # Names are fetched when first used, so that `regimen --help` does not wait for torch.
    if name in _HOME:
        return getattr(importlib.import_module(f"regimen.{_HOME[name]}"), name)
    raise AttributeError(f"module 'regimen' has no attribute '{name}'")
