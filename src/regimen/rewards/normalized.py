"""A reward divided by its running deviation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from regimen.rewards.base import Expression, Judgement, Scene, Score
from regimen.rewards.expression import Composition, Remembering
from regimen.rollout import Rollout

MomentKind = Literal["cumulative", "ema"]
_LEAST = 1e-8


@dataclass
class RunningMoments:
    """Mean and population variance of a stream of numbers that comes in batches.

    Attributes:
        count: numbers so far; mean, variance: of the stream.
    """

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def update(self, values: Tensor, decay: float | None = None) -> None:
        """Take in a batch, of any shape; an empty one changes nothing.

        With `decay` the mean and the mean square are exponential averages over batches, of which the first counts
        whole; without, those of all numbers.
        """
        if not values.numel():
            return
        self.count += values.numel()
        first = self.count == values.numel()
        share = values.numel() / self.count if decay is None or first else 1 - decay
        batch = values.double()
        apart = float(batch.mean()) - self.mean
        spread = share * float(batch.var(correction=0)) + share * (1 - share) * apart**2
        self.mean, self.variance = self.mean + share * apart, (1 - share) * self.variance + spread

    @property
    def scale(self) -> float:
        """The deviation; 1 until the numbers have varied, for dividing by next to nothing would ruin them."""
        deviation = self.variance**0.5
        return deviation if deviation > _LEAST else 1.0


class NormalizedReward(Composition):
    """A reward divided by its running standard deviation; the components below it are logged raw.

    Moments are of the values of samples that scored and steps that exist, and take in a batch before it is divided,
    so that the first one is scaled too (Henaff et al. 2023, for bonuses; per task, for rewards of different sizes).
    """

    def __init__(
        self,
        reward: Expression,
        moments: MomentKind = "cumulative",
        center: bool = False,
        per: Literal["task"] | None = None,
        decay: float = 0.99,
        name: str = "normalized",
    ) -> None:
        """Normalise a reward.

        Args:
            reward: a component or an expression.
            moments: over all of training, or an exponential average that forgets. As a bonus vanishes, the latter
                blows up what is left of it.
            center: take off the running mean as well.
            per: `"task"` for moments of each task.
            decay: of the exponential average, per batch.
            name: of this term in the knob `weight/<name>`, and of its state.

        Raises:
            ValueError: an unknown setting, a decay outside (0, 1), or a reward that is only logged.
        """
        if moments not in get_args(MomentKind) or per not in (None, "task") or not 0 < decay < 1:
            raise ValueError(
                f"NormalizedReward: moments '{moments}', per '{per}', decay {decay}; expected one of "
                f"{', '.join(get_args(MomentKind))}, 'task' or None, and a decay between 0 and 1"
            )
        self.moments, self.center, self.per, self.name = moments, center, per, name
        self.decay = decay if moments == "ema" else None
        self._moments: dict[str, RunningMoments] = {}
        super().__init__(reward)
        self._must_train(reward)

    @property
    def term_name(self) -> str:
        """Its own name."""
        return self.name

    @property
    def undifferentiable(self) -> list[str]:
        """Itself: it must not take in one rollout twice."""
        return [self.name]

    def remembering(self) -> Iterator[Remembering]:
        """What it is made of, and itself."""
        yield from super().remembering()
        yield self

    def judge(self, rollout: Rollout, scene: Scene) -> Judgement:
        """Score the reward, take its values into the moments, and divide by their deviation."""
        judged = self.parts[0].judge(rollout, scene)
        assert judged.total is not None, "a reward without a total was refused"
        raw = judged.total
        return Judgement(judged.components, scene.once(rollout, id(self), lambda: self._normalized(raw, rollout)))

    def _normalized(self, raw: Score, rollout: Rollout) -> Score:
        scored = raw.scored & rollout.mask if raw.value.ndim == 2 else raw.scored
        value = raw.value.clone()
        for name, rows in self._streams(rollout):
            where = scored & (rows[:, None] if scored.ndim == 2 else rows)
            moments, values = self._moments.setdefault(name, RunningMoments()), raw.value[where]
            moments.update(values, self.decay)
            value[where] = (values - (moments.mean if self.center else 0.0)) / moments.scale
        return Score(value, raw.status, raw.errors)

    def _streams(self, rollout: Rollout) -> Iterator[tuple[str, Tensor]]:
        """(name, rows as bool `[B]`) of what has moments of its own."""
        if self.per is None:
            yield "all", torch.ones_like(rollout.task, dtype=torch.bool)
            return
        for index, name in enumerate(rollout.task_names):
            yield name, rollout.task == index

    def save_state(self) -> dict[str, Any]:
        """The moments, by task."""
        return {"moments": {name: asdict(moments) for name, moments in self._moments.items()}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from them."""
        self._moments = {name: RunningMoments(**moments) for name, moments in state["moments"].items()}
