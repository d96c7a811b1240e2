"""The elliptical episodic bonus of E3B: novelty in the space of learned features, within the episode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from regimen.rewards.base import Reward, Scene
from regimen.rewards.states import Stretch, Visits, features_of, stretches
from regimen.rollout import Rollout


def elliptical_step(inverse: Tensor, features: Tensor) -> Tensor:
    """One visit of each of `N` copies: `b = phi^T C^-1 phi`, then `C <- C + phi phi^T` (Henaff et al. 2022, section 3).

    The inverse is updated in place, because copies of it would take most of the time, by Sherman and Morrison's
    formula, in `O(D^2)`. Features of 0 change nothing.

    Args:
        inverse: `C^-1`, `[N, D, D]`; changed.
        features: `phi`, `[N, D]`.

    Returns:
        The bonus `[N]`.
    """
    image = torch.bmm(inverse, features[:, :, None])
    bonus = (image[:, :, 0] * features).sum(1)
    root = image / (1 + bonus).sqrt()[:, None, None]  # Both factors alike, so that it stays symmetric to the bit.
    inverse.addcmul_(root, root.transpose(1, 2), value=-1)
    return bonus


class EllipticalBonus(Reward):
    """`phi(s)^T C^-1 phi(s)` of the state that each step led to, `[B, T]` (E3B, Henaff et al. 2022, section 3).

    `C` is `ridge I` plus the sum of `phi phi^T` over the states of the episode so far, its first one included. With
    features that are unit vectors it is `1 / (visits before + ridge)`. The encoder is asked without a gradient;
    train it with an `InverseDynamicsObjective`. What an episode under way has gathered goes on into the next
    rollout, features of an older encoder included.

    It keeps a `[D, D]` matrix per copy of the environment, in float64: in float32, features of large norm would be
    lost in the update. Reads `observations` and the columns `next_observations`, `start` and `copy` of an `EnvTask`.
    """

    stateful = True

    def __init__(self, encoder: str = "bonus_encoder", ridge: float = 0.1, name: str = "elliptical") -> None:
        """Make the bonus.

        Args:
            encoder: member of the cast, states `[R, ...]` to features `[R, D]`.
            ridge: the weight of the identity; an episode's first bonus is `|phi|^2 / ridge`.
            name: of the component.

        Raises:
            ValueError: a ridge that is not above 0.
        """
        if not ridge > 0:
            raise ValueError(f"EllipticalBonus: ridge is {ridge}, expected above 0; without it C has no inverse")
        self.encoder, self.ridge, self.name = encoder, ridge, name
        self._inverse: dict[str, Tensor] = {}

    def score(self, rollout: Rollout, scene: Scene) -> Tensor:
        """The bonus of every step.

        Raises:
            ValueError: features that are not finite, or of another width than before.
        """
        visits = Visits.of(rollout)
        features = features_of(scene.cast, self.encoder, visits.states, f"EllipticalBonus '{self.name}'")
        self._check_width(features.shape[1])
        slots, values = visits.spread(features), torch.zeros(rollout.mask.shape, device=features.device)
        memory = dict(self._inverse)
        for stretch in stretches(rollout):
            known = self._matrices(memory.get(stretch.task), stretch, features)
            inverse = known[stretch.copies]
            bonus = self._follow(inverse, visits.starts[stretch.rows], slots[stretch.rows])
            values[stretch.rows] = bonus.to(values.dtype)
            memory[stretch.task] = known.index_copy(0, stretch.copies, inverse)
        self._inverse = memory
        return values

    def _follow(self, inverse: Tensor, starts: Tensor, slots: Tensor) -> Tensor:
        """The bonuses `[N, T]` of `N` copies, whose matrices are changed in place."""
        bonuses = []
        for step, begins in enumerate(starts.any(0).tolist()):
            if begins:
                inverse[starts[:, step]] = self._fresh(inverse)
                elliptical_step(inverse, slots[:, step, 0].double())
            bonuses.append(elliptical_step(inverse, slots[:, step, 1].double()))
        return torch.stack(bonuses, 1)

    def _fresh(self, like: Tensor) -> Tensor:
        """The matrix of an episode without visits, `[D, D]`."""
        width = like.shape[-1]
        return torch.eye(width, dtype=torch.float64, device=like.device) / self.ridge

    def _matrices(self, known: Tensor | None, stretch: Stretch, features: Tensor) -> Tensor:
        """Those of a task's copies, by number, `[copies, D, D]`: what is known, and fresh ones."""
        fresh = self._fresh(features)
        known = fresh.expand(0, -1, -1) if known is None else known.to(fresh.device)
        missing = max(int(stretch.copies.max()) + 1 - len(known), 0)
        return torch.cat([known, fresh.expand(missing, -1, -1)])

    def _check_width(self, width: int) -> None:
        for known in self._inverse.values():
            if known.shape[-1] != width:
                raise ValueError(
                    f"EllipticalBonus '{self.name}': member '{self.encoder}' gave features of width {width}, and of "
                    f"width {known.shape[-1]} before; keep one encoder, or make a new bonus for the new one"
                )

    def save_state(self) -> dict[str, Any]:
        """The inverse matrix of every copy's episode under way, by task."""
        return {"inverse": dict(self._inverse)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on with those episodes."""
        self._inverse = dict(state["inverse"])
