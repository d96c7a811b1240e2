"""A track that must be followed from its start, and a shortcut that looks better to whoever stumbles."""

from __future__ import annotations

from collections.abc import Mapping

import gymnasium.spaces as spaces
import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from regimen.knobs import Knob
from regimen.tasks.environments.base import Observations
from regimen.tasks.environments.tensor.base import TensorEnv

_ON, _DROPPED, _SHORT = 0, 1, 2


class ProgressChain(TensorEnv):
    """A track of `length` steps, on which each step has one right action; what comes late depends on what came before.

    Whoever takes the last action leaves the track on a shortcut, and any other wrong one drops off it; either lasts to
    the end of the episode. What is seen is a table: `place`, for the policy, the step and whether it is on the track;
    and `frame [2 length + 1]`, what a judge compares with `expert_frames`. Two frames of the expert are 1 apart, and so
    is a dropped frame from all of them. A shortcut taken at step `f` is `shortcut` apart from the expert's frames from
    `f` on. So, by the nearest frame of the expert, a step on the track costs 0, a dropped one 1 and one on the shortcut
    something between: late costs mislead who cannot follow the track yet (Liu et al. 2024, progress dependency). No
    reward is paid. A step tells `success` (still on the track), `correct` (right steps so far) and `on_shortcut`; an
    episode is over for good after `length` steps.
    """

    knobs: tuple[Knob, ...] = ()

    def __init__(
        self,
        count: int,
        *,
        length: int = 20,
        actions: int = 5,
        shortcut: float = 0.7,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        """Make the copies.

        Args:
            count: how many.
            length: of the track.
            actions: at least 3; the last one is the shortcut.
            shortcut: how far it is from the expert, below 1; no frame is nearer to `m` of them than
                `sqrt((1 - 1 / m) / 2)`.
            seed: of the right actions.
            device: where.

        Raises:
            ValueError: a number that is out of range.
        """
        if length < 1 or actions < 3 or not _nearest(max(length, 1)) <= shortcut < 1:
            raise ValueError(
                f"ProgressChain: length={length}, actions={actions}, shortcut={shortcut}; expected at least 1, at "
                f"least 3, and from {_nearest(max(length, 1)):.4g} to below 1"
            )
        super().__init__(count, limit=length, limit_terminates=True, device=device)
        self.length = length
        generator = torch.Generator().manual_seed(seed)
        self.right = torch.randint(actions - 1, (length,), generator=generator).to(self.device)
        self.last = actions - 1
        self._frames = _frames(length, shortcut).to(self.device)
        size = self._frames.shape[1]
        self.observation_space = spaces.Dict(
            {"place": spaces.Discrete(2 * length + 1), "frame": spaces.Box(-1.0, 1.0, (size,), np.float32)}
        )
        self.action_space = spaces.Discrete(actions)

    @property
    def expert_frames(self) -> Tensor:
        """`[length, D]`, what is seen after each right step."""
        return self._frames[: self.length]

    def start(self, seeds: Tensor, knobs: Mapping[str, float]) -> dict[str, Tensor]:
        """Before the first step, on the track; the frame is that of having dropped."""
        none = torch.zeros_like(seeds)
        return {"status": none, "correct": none, "frame": torch.full_like(seeds, self.length)}

    def move(self, actions: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor, dict[str, Tensor]]:
        """A step along the track, or off it."""
        on, correct = self.state["status"] == _ON, self.state["correct"]
        right = on & (actions == self.right[correct.clamp(max=self.length - 1)])
        left = torch.where(actions == self.last, _SHORT, _DROPPED)
        status = torch.where(on & ~right, left, self.state["status"])
        frame = torch.where(status == _ON, correct, self.length)
        frame = torch.where(status == _SHORT, self.length + 1 + correct, frame)
        correct = correct + right
        told = {
            "success": (status == _ON).float(),
            "correct": correct.float(),
            "on_shortcut": (status == _SHORT).float(),
        }
        nothing = torch.zeros(self.count, device=self.device)
        return {"status": status, "correct": correct, "frame": frame}, nothing, torch.zeros_like(right), told

    def observe(self) -> Observations:
        """The place and the frame."""
        place = torch.where(self.state["status"] == _ON, self.state["correct"], self.length + self.time)
        seen = {"place": place, "frame": self._frames[self.state["frame"]]}
        return TensorDict(seen, [self.count], device=self.device)


def _nearest(length: int) -> float:
    """How near a frame can be to all of the expert's: as their centroid."""
    return (0.5 - 0.5 / length) ** 0.5


def _frames(length: int, shortcut: float) -> Tensor:
    """`[2 length + 1, D]`: the expert's frames, the dropped one, and that of a shortcut taken at each step."""
    codes = torch.eye(2 * length + 1, dtype=torch.float64) / 2**0.5
    frames = codes.clone()
    for step in range(length):
        ahead = codes[step:length]
        # As far as the shortcut is from the centroid of the frames ahead, given how far these are from it.
        beside = shortcut**2 - _nearest(len(ahead)) ** 2
        frames[length + 1 + step] = ahead.mean(0) + beside**0.5 * codes[length + 1 + step] * 2**0.5
    return frames.float()
