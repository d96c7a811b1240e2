"""What a part is checked with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from regimen.checkers.stand_ins import StandInPolicy, credited, judged, stand_in_rollout
from regimen.rollout import Rollout


@dataclass(frozen=True)
class Setting:
    """The rollout, cast, knob values and metrics that a part is given.

    Attributes:
        given: the rollout that the user passed; a stand-in is used where there is none.
        cast: the members; stand-in policies if the user passed none.
        values: knob values that replace the declared defaults.
        metrics: what a controller sees.
        exact: the rollout given is what the part will get when it is used, so nothing that it lacks is drawn.
    """

    given: Rollout | None = None
    cast: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    exact: bool = False

    @classmethod
    def of(
        cls,
        rollout: Rollout | None,
        cast: Mapping[str, Any] | None,
        values: Mapping[str, float] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> Setting:
        """A setting with stand-ins for what is `None`."""
        members = {"policy": StandInPolicy(0), "reference": StandInPolicy(1)} if cast is None else cast
        return cls(rollout, members, values or {}, metrics or {})

    @property
    def rollout(self) -> Rollout:
        """The rollout as it was collected: not judged."""
        rollout = stand_in_rollout() if self.given is None else self.given
        judged = [name for name in ("rewards", "status", "reward", "advantages") if getattr(rollout, name) is not None]
        return Rollout(rollout.data.exclude(*judged), rollout.task_names) if judged else rollout

    @property
    def judged(self) -> Rollout:
        """The rollout as credit gets it: with a total reward, drawn if it has none."""
        if self.given is not None and (self.exact or self.given.reward is not None):
            return self.given
        return judged(self.rollout)

    @property
    def credited(self) -> Rollout:
        """The rollout as an objective gets it: with advantages, drawn if it has none."""
        if self.given is not None and self.exact:
            return self.given
        return credited(self.rollout if self.given is None else self.given)

    @property
    def device(self) -> torch.device:
        """Where the rollout is."""
        device: torch.device = self.rollout.mask.device
        return device

    @property
    def hint(self) -> str:
        """What to do if the part needs what the stand-ins lack."""
        if self.given is None:
            return " (tried on a stand-in rollout; if that lacks what it reads, pass rollout= and cast= of your own)"
        return ""
