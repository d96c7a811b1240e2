"""The scripted experts that come with Meta-World: one for each of its fifty tasks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from regimen.knobs import Knob
from regimen.policies.acting import Acted
from regimen.tasks.environments.metaworld import OBSERVED, tasks_of


class ScriptedExpert:
    """Acts by the package's script of the task that an observation tells (an `Actor`; it must be told the goal, too).

    What to imitate, and the ceiling beside which a policy's success stands. It is deterministic, and so gives no
    log-probabilities.
    """

    knobs: tuple[Knob, ...] = ()

    def __init__(self, among: Sequence[str]) -> None:
        """`among`: the tasks, as in `MetaWorld`; one alone need not be told. `ValueError` for one that there is not."""
        known = tasks_of("MT1")
        if not among or (absent := [name for name in among if name not in known]):
            raise ValueError(f"ScriptedExpert: there are no tasks {absent if among else 'given'}; there are: {known}")
        from metaworld.policies import ENV_POLICY_MAP

        self.among, self._scripts = tuple(among), [ENV_POLICY_MAP[name]() for name in among]

    def act(
        self,
        observations: Tensor,
        memory: Tensor | None,
        begins: Tensor,
        knobs: Mapping[str, float],
        rng: torch.Generator,
    ) -> Acted:
        """The scripts' actions `[N, 4]`, clipped to [-1, 1]."""
        seen = observations.numpy(force=True).astype(np.float64)
        which = seen[:, OBSERVED:].argmax(1) if seen.shape[1] > OBSERVED else np.zeros(len(seen), dtype=int)
        with warnings.catch_warnings():
            # They warn of actions beyond [-1, 1], which are clipped here.
            warnings.simplefilter("ignore", UserWarning)
            actions = [self._scripts[k].get_action(row[:OBSERVED]) for k, row in zip(which, seen, strict=True)]
        return Acted(torch.from_numpy(np.clip(np.stack(actions), -1, 1).astype(np.float32)).to(begins.device))
