"""Stand-ins for what a part needs when it is checked alone: a small rollout, and a policy that fits it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from regimen.knobs import Knob
from regimen.rollout import Rollout

STEPS, OBSERVED, ACTED = 4, 3, 2


@dataclass(frozen=True)
class StandInSteps:
    """The Gaussian over every recorded action of a `StandInPolicy`."""

    actions: Tensor
    normal: Normal
    where: Tensor

    @property
    def logprob(self) -> Tensor:
        """`[B, T]`."""
        return self._at(self.normal.log_prob(self.actions))

    def entropy(self) -> Tensor:
        """`[B, T]`."""
        return self._at(self.normal.entropy())

    def kl(self, other: StandInSteps, estimator: str = "exact") -> Tensor:
        """`[B, T]`; only `"exact"` is known."""
        if estimator != "exact":
            raise ValueError(f"KL estimator '{estimator}' is not known to the stand-in policy; expected exact")
        return self._at(kl_divergence(self.normal, other.normal))

    def _at(self, per_dimension: Tensor) -> Tensor:
        return torch.where(self.where, per_dimension.sum(-1), 0)


class StandInPolicy(nn.Module):
    """A linear Gaussian policy that acts for a few steps on random observations."""

    knobs: tuple[Knob, ...] = ()

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(OBSERVED, ACTED, generator=rng))
        self.log_std = nn.Parameter(torch.zeros(ACTED))
        self.version = 0

    @torch.no_grad()
    def sample(self, contexts: TensorDict, knobs: Mapping[str, float], rng: torch.Generator) -> Rollout:
        """One sample of `STEPS` steps or fewer per context, with an `image` column."""
        batch, device = len(contexts), rng.device
        observations = torch.randn(batch, STEPS, OBSERVED, generator=rng, device=device)
        noise = torch.randn(batch, STEPS, ACTED, generator=rng, device=device)
        lengths = torch.randint(2, STEPS + 1, (batch,), generator=rng, device=device)
        rollout = Rollout.create(
            task="policy",
            group=torch.arange(batch, device=device),
            mask=torch.arange(STEPS, device=device) < lengths[:, None],
            context=contexts,
            knobs=knobs,
            columns={"image": torch.rand(batch, 1, 4, 4, generator=rng, device=device) * 2 - 1},
            version=torch.full((batch,), self.version, device=device),
            observations=observations,
            actions=observations @ self.weight + noise * self.log_std.exp(),
        )
        return rollout.replace(logprobs=self.distribution(rollout).logprob)

    def distribution(self, rollout: Rollout, where: Tensor | None = None) -> StandInSteps:
        """The Gaussian of each step."""
        normal = Normal(rollout.observations @ self.weight, self.log_std.exp(), validate_args=False)
        return StandInSteps(rollout.actions, normal, rollout.mask if where is None else where)


def stand_in_rollout() -> Rollout:
    """Six samples of up to four steps: two groups of two of task "alpha", one of task "beta".

    Contexts are `condition` (0 or 1) and `prompt` (texts), the only column is `image [6, 1, 4, 4]`. Lengths differ,
    and one existing step is not learned from.
    """
    rng, parts = torch.Generator().manual_seed(0), []
    for task, rows in (("alpha", 4), ("beta", 2)):
        group = torch.arange(rows) // 2
        context = TensorDict({"condition": group % 2}, batch_size=[rows])
        sampled = StandInPolicy().sample(context, {}, rng).replace(group=group)
        prompts: list[Any] = [f"{task} {int(number)}" for number in group]
        parts.append(Rollout(sampled.data, (task,)).replace(context={"condition": group % 2, "prompt": prompts}))
    rollout = Rollout.cat(parts)
    learned = rollout.mask.clone()
    learned[0, 0] = False
    return rollout.replace(loss_mask=learned)


def judged(rollout: Rollout) -> Rollout:
    """A rollout with a total reward, drawn if it has none."""
    if rollout.reward is not None:
        return rollout
    drawn = torch.randn(len(rollout), generator=torch.Generator().manual_seed(1))
    return rollout.replace(reward=drawn.to(rollout.mask.device))


def credited(rollout: Rollout) -> Rollout:
    """A rollout with advantages, drawn if it has none."""
    if rollout.advantages is not None:
        return rollout
    drawn = torch.randn(rollout.mask.shape, generator=torch.Generator().manual_seed(2)).to(rollout.mask.device)
    return judged(rollout).replace(advantages=drawn * rollout.loss_mask)
