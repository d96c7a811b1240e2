"""Users in a square who each want to be near one of three goals, and do not say which."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.nn.functional import one_hot

from regimen.tasks.preferences import preference_rows

GOALS = ((1.0, 1.0), (-1.0, 1.0), (0.0, -1.0))
SIDE = 1.5
"""The square goes from minus this to this."""
REACH = 0.15
"""How far a step goes in either direction."""


@dataclass(frozen=True)
class UserGoals:
    """What users want; a user's kind is the number of the goal.

    Attributes:
        tells: whether a state tells the user's kind (one-hot), so that nothing is hidden.
        scales: by how much users' rewards are multiplied, drawn per user; their labels are then drawn with the odds of
            their rewards. By default labels are free of noise.
    """

    tells: bool = False
    scales: tuple[float, ...] = ()

    @property
    def states(self) -> int:
        """Numbers in a state as it is shown."""
        return 2 + len(GOALS) * self.tells

    def shown(self, places: Tensor, user: Tensor) -> Tensor:
        """States `[B, ..., S]` at places `[B, ..., 2]` of users of kinds int64 `[B]`."""
        if not self.tells:
            return places
        kind = one_hot(user, len(GOALS)).to(places.dtype).view(len(user), *[1] * (places.ndim - 2), len(GOALS))
        return torch.cat([places, kind.expand(*places.shape[:-1], len(GOALS))], -1)

    def label(self, first: Tensor, second: Tensor, user: Tensor, chance: Tensor) -> Tensor:
        """What users say of pairs `[B, N, L, 2]`, float `[B, N]`; `chance [B, N + 1]`, uniform, for scale and noise."""
        difference = (distance(second, user) - distance(first, user)).sum(-1)
        if not self.scales:
            return (difference > 0).to(first.dtype)
        drawn = (chance[:, :1] * len(self.scales)).long()
        odds = torch.sigmoid(torch.tensor(self.scales, device=first.device)[drawn] * difference)
        return (chance[:, 1:] < odds).to(first.dtype)

    def answers(self, rows: TensorDict, first: Tensor, second: Tensor) -> Tensor:
        """What the users in rows with a column `user` say of pairs `[B, N, L, 2]`, without noise (an `Answer`)."""
        difference = (distance(second, rows["user"]) - distance(first, rows["user"])).sum(-1)
        return (difference > 0).to(first.dtype)

    def sets(self, count: int, pairs: int, rng: torch.Generator) -> TensorDict:
        """Rows of `preference_rows`: users, each asked about pairs of places, uniform in the square."""
        user = torch.randint(len(GOALS), (count,), generator=rng)
        first, second = (uniform((count, pairs, 1), rng) for _ in range(2))
        label = self.label(first, second, user, torch.rand(count, pairs + 1, generator=rng))
        return preference_rows(self.shown(first, user), self.shown(second, user), label, user=user)

    def walks(self, count: int, steps: int, rng: torch.Generator) -> TensorDict:
        """Random walks as single steps, rows of a `DatasetTask`; a direction is kept for three steps in the mean."""
        place, move, rows = uniform((count,), rng), _moves(count, rng), []
        user = torch.randint(len(GOALS), (count,), generator=rng)
        for _ in range(steps):
            turns = torch.rand(count, 1, generator=rng) < 0.3
            move = torch.where(turns, _moves(count, rng), move)
            rows.append((place, move, moved(place, move)))
            place = rows[-1][2]
        before, action, after = (torch.cat(parts) for parts in zip(*rows, strict=True))
        wide = user.repeat(steps)
        table = {
            "observations": self.shown(before, wide)[:, None],
            "actions": action[:, None],
            "step_columns": TensorDict({"next_observations": self.shown(after, wide)[:, None]}, [len(before), 1]),
        }
        return TensorDict(table, batch_size=[len(before)])


def distance(places: Tensor, user: Tensor) -> Tensor:
    """`[B, ...]`, of places `[B, ..., 2]` from the goals of users of kinds int64 `[B]`."""
    goal = torch.tensor(GOALS, device=places.device)[user].view(len(user), *[1] * (places.ndim - 2), 2)
    return (places - goal).norm(dim=-1)


def moved(places: Tensor, moves: Tensor) -> Tensor:
    """Where moves `[N, 2]` lead from places `[N, 2]`; the border holds."""
    return (places + moves.clamp(-REACH, REACH)).clamp(-SIDE, SIDE)


def uniform(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Places `[*shape, 2]` in the square."""
    return (2 * torch.rand(*shape, 2, generator=rng) - 1) * SIDE


def _moves(count: int, rng: torch.Generator) -> Tensor:
    return (2 * torch.rand(count, 2, generator=rng) - 1) * REACH
