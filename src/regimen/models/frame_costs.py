"""How far the frames of samples are from those of demonstrations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from regimen.functions.transport import cosine_cost, euclidean_cost
from regimen.rollout import Rollout

Distance = Literal["cosine", "euclidean"]
Frames = Callable[[Rollout], Tensor]
"""Features `[B, T, D]` of what is seen at every step."""


def observed(rollout: Rollout) -> Tensor:
    """What was observed before each step, flattened, `[B, T, D]`."""
    observations: Tensor = rollout.observations
    return observations.flatten(2)


class FrameCosts:
    """Costs between each frame of a sample and each frame of `N` demonstrations, all of the same length `H`.

    The frames of a sample are those of the steps that are learned from: environment steps, a text's own tokens,
    denoising steps. Demonstrations need no actions.

    Attributes:
        demonstrations: `[N, H, D]`; horizon: `H`.
    """

    def __init__(
        self, demonstrations: Sequence[Tensor] | Tensor, distance: Distance = "cosine", frames: Frames = observed
    ) -> None:
        """Make them.

        Args:
            demonstrations: features `[H, D]` of each, as `frames` makes them of a sample.
            distance: `"cosine"` for the features of an encoder, `"euclidean"` for states.
            frames: a rollout to features; an encoder of images is asked here.

        Raises:
            ValueError: there are no demonstrations, or of different shapes, or the distance is unknown.
        """
        if distance not in get_args(Distance):
            raise ValueError(f"FrameCosts: distance '{distance}' is not one of {', '.join(get_args(Distance))}")
        shapes = {tuple(one.shape) for one in demonstrations}
        if len(shapes) != 1 or len(next(iter(shapes))) != 2:
            raise ValueError(
                f"FrameCosts was given {len(demonstrations)} demonstrations of the shapes {sorted(shapes)}; expected "
                "at least one, and all of one shape [H, D]; cut them to a common length"
            )
        self.demonstrations = torch.stack(list(demonstrations)).float()
        self.horizon = self.demonstrations.shape[1]
        self.distance, self.frames = distance, frames

    @torch.no_grad()
    def of(self, rollout: Rollout) -> Tensor:
        """`[B, N, H, H]`: from frame `i` of a sample to frame `j` of a demonstration.

        Raises:
            ValueError: a sample is longer or shorter than the demonstrations.
        """
        lengths = rollout.loss_mask.sum(1)
        if bool((lengths != self.horizon).any()):
            other = int(lengths[lengths != self.horizon][0])
            raise ValueError(
                f"FrameCosts: a sample of task {'/'.join(rollout.task_names)} has {other} steps and the demonstrations "
                f"have {self.horizon}; transport compares equal lengths: collect whole episodes of that length, or cut "
                "the demonstrations"
            )
        features = self.frames(rollout)
        mine = features[rollout.loss_mask].float().view(len(rollout), 1, self.horizon, -1)
        return self._between(mine, self.demonstrations.to(mine.device))

    @torch.no_grad()
    def of_demonstrations(self) -> Tensor:
        """`[N, N, H, H]`: from frame `i` of one demonstration to frame `j` of another, or of itself."""
        return self._between(self.demonstrations[:, None], self.demonstrations)

    def _between(self, mine: Tensor, theirs: Tensor) -> Tensor:
        return cosine_cost(mine, theirs) if self.distance == "cosine" else euclidean_cost(mine, theirs)
