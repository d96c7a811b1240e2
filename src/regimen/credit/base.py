"""What credit is: a judged rollout in, a rollout with advantages (or a selection, or pairs) out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from regimen.knobs import Knob
from regimen.rollout import Rollout


@runtime_checkable
class Credit(Protocol):
    """Says which steps deserve how much of the reward."""

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The knobs that it reads."""
        ...

    def __call__(self, rollout: Rollout, knobs: Mapping[str, float], cast: Mapping[str, Any]) -> Rollout:
        """The rollout with `advantages [B, T]`, 0 at steps that are not learned from; or a selection; or pairs.

        `cast` is for credit that asks a critic or an estimator.
        """
        ...
