"""A model as a judge: a member of the cast that is asked about the rollout, one component for each of its outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regimen.knobs import Weight
from regimen.rewards.base import Reward, Scene
from regimen.rewards.expression import SumReward
from regimen.rollout import Rollout

Ask = Callable[[Any, Rollout], Tensor]
"""A model and a rollout to what the model says of each sample, `[B]` or `[B, K]`."""


def call(model: Any, rollout: Rollout) -> Tensor:
    """`model(rollout)`."""
    said: Tensor = model(rollout)
    return said


class ModelReward(SumReward):
    """What a member of the cast says of each sample: a component `[B]` for each of its outputs, and their sum.

    The member is asked once per rollout, without a gradient. It may be a network, or an estimator that an
    `estimators.Reading` asks: `ModelReward("annotators", ask=Reading("features", source="user"))`.
    """

    def __init__(self, member: str = "reward_model", names: Sequence[str] = ("model",), ask: Ask = call) -> None:
        """Make the reward.

        Args:
            member: name in the cast.
            names: of the components, one for each output.
            ask: how it is asked; by default it is called with the rollout.

        Raises:
            ValueError: there are no names.
        """
        if isinstance(names, str) or not names:
            raise ValueError(f"ModelReward: names is {names!r}; expected a list with a name for each output")
        outputs = [_Output(member, index, len(names), name, ask) for index, name in enumerate(names)]
        super().__init__([(Weight.of(1.0, output.name), output) for output in outputs])


class _Output(Reward):
    """One output of a model."""

    def __init__(self, member: str, index: int, outputs: int, name: str, ask: Ask) -> None:
        self.member, self.index, self.outputs, self.name, self.ask = member, index, outputs, name, ask

    def score(self, rollout: Rollout, scene: Scene) -> Tensor:
        """The model's answers in this place."""
        said: Tensor = scene.once(rollout, (self.member, self.ask), lambda: self._asked(rollout, scene))
        return said[:, self.index]

    @torch.no_grad()
    def _asked(self, rollout: Rollout, scene: Scene) -> Tensor:
        """`[B, K]`."""
        if self.member not in scene.cast:
            raise ValueError(
                f"ModelReward '{self.name}' needs the member '{self.member}', which the cast lacks (it has: "
                f"{', '.join(scene.cast)}); add it, or name another"
            )
        model = scene.cast[self.member]
        was_training = isinstance(model, nn.Module) and model.training
        if was_training:
            model.eval()
        said = self.ask(model, rollout)
        if was_training:
            model.train()
        said = said[:, None] if said.ndim == 1 else said
        if list(said.shape) != [len(rollout), self.outputs]:
            raise ValueError(
                f"member '{self.member}' gave outputs of shape {list(said.shape)} for {len(rollout)} samples, and "
                f"ModelReward has {self.outputs} names; expected [{len(rollout)}, {self.outputs}]"
            )
        return said
