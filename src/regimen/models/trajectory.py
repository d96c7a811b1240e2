"""Transformers on trajectories (PPT, Lin et al. 2024): the next position, several destinations, the way to each.

A track is positions `[B, N, 2]` in order; places in it count from 1. All three networks are made of the same
`TrackTransformer`, so that one can begin where another ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from regimen.models.layers import TransformerBlock


class TrackTransformer(nn.Module):
    """Pre-norm transformer on tokens `[B, N, width]`, positions of a track among them.

    Attributes:
        width: of tokens and states.
        places: the most that a track may have.
    """

    def __init__(self, width: int = 128, heads: int = 4, layers: int = 3, places: int = 20) -> None:
        super().__init__()
        self.width, self.places = width, places
        self.embed = nn.Linear(2, width)
        self.place = nn.Embedding(places, width)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, 4 * width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, places: Tensor, causal: bool) -> Tensor:
        """States `[B, N, width]`; `places` int64 `[N]` from 1, `causal` hides later tokens."""
        count = tokens.shape[1]
        seen = torch.ones(count, count, dtype=torch.bool, device=tokens.device).tril() if causal else None
        x = tokens + self.place(places - 1)
        for block in self.blocks:
            x = block(x, seen)
        states: Tensor = self.norm(x)
        return states


class NextPositionNetwork(nn.Module):
    """The next position after every position of a track, causally (stage 1)."""

    def __init__(self, transformer: TrackTransformer) -> None:
        super().__init__()
        self.transformer = transformer
        self.out = nn.Linear(transformer.width, 2)

    def forward(self, track: Tensor) -> tuple[Tensor, Tensor]:
        """Next positions `[B, N, 2]` and states `[B, N, width]` for a track `[B, N, 2]`."""
        places = torch.arange(1, track.shape[1] + 1, device=track.device)
        states = self.transformer(self.transformer.embed(track), places, causal=True)
        return self.out(states), states


class DestinationHead(nn.Module):
    """What a transformer needs to name destinations: a token that asks, and layers that read the answer."""

    def __init__(self, width: int, count: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.rand(1, 1, width))
        self.project = nn.Linear(width, width)
        self.out = perceptron(width, hidden, 2 * count)


class DestinationNetwork(nn.Module):
    """Several destinations of a track's past (stage 2).

    Attributes:
        count: destinations, `K`; future: steps to them.
    """

    def __init__(
        self, transformer: TrackTransformer, count: int = 20, future: int = 12, hidden: Sequence[int] = (512, 512, 512)
    ) -> None:
        """`hidden` are the widths of the head's layers; `ValueError` for fewer than one destination."""
        super().__init__()
        if count < 1 or future < 1:
            raise ValueError(f"DestinationNetwork: {count} destinations in {future} steps; expected at least 1 of each")
        self.transformer, self.count, self.future = transformer, count, future
        self.head = DestinationHead(transformer.width, count, hidden)

    def forward(self, past: Tensor) -> tuple[Tensor, Tensor]:
        """Destinations `[B, K, 2]` and the state `[B, width]` that they come from, for a past `[B, P, 2]`."""
        batch, seen = past.shape[:2]
        query = self.head.project(self.head.query).expand(batch, -1, -1)
        # The query stands just before the last position.
        places = torch.cat([torch.arange(1, seen + 1), torch.tensor([seen + self.future - 1])]).to(past.device)
        tokens = torch.cat([self.transformer.embed(past), query], 1)
        state = self.transformer(tokens, places, causal=True)[:, -1]
        return self.head.out(state).view(batch, self.count, 2), state


class TrajectoryNetwork(nn.Module):
    """The positions on the way to a destination, all at once (stage 3)."""

    def __init__(
        self, transformer: TrackTransformer, future: int = 12, hidden: Sequence[int] = (512, 512, 512)
    ) -> None:
        """`hidden` are the widths of the last position's layers; `ValueError` for fewer than 3 steps."""
        super().__init__()
        if future < 3:
            raise ValueError(
                f"TrajectoryNetwork: future is {future}, expected at least 3: a first, a last, and between"
            )
        width = transformer.width
        self.transformer, self.future = transformer, future
        self.prompts = nn.Parameter(torch.rand(1, 1, width).repeat(1, future - 1, 1))
        self.project = nn.Linear(width, width)
        self.first, self.between = nn.Linear(width, 2), nn.Linear(width, 2)
        self.last = perceptron(width, hidden, 2)

    @torch.no_grad()
    def inherit(self, source: DestinationNetwork) -> None:
        """Begin with another network's transformer; every prompt is a copy of its query."""
        self.transformer.load_state_dict(source.transformer.state_dict())
        self.project.load_state_dict(source.head.project.state_dict())
        self.prompts.copy_(source.head.query.expand_as(self.prompts))

    def forward(self, past: Tensor, destination: Tensor) -> tuple[Tensor, Tensor]:
        """The way `[B, T, 2]`, and the state `[B, T, width]` that each step of it comes from.

        Args:
            past: `[B, P, 2]`.
            destination: `[B, 2]`; the last step is said as a difference from it.
        """
        batch, seen = past.shape[:2]
        prompts = self.project(self.prompts).expand(batch, -1, -1)
        aim = self.transformer.embed(destination[:, None])
        tokens = torch.cat([self.transformer.embed(past), prompts, aim], 1)
        places = torch.arange(1, seen + self.future + 1, device=past.device)
        states = self.transformer(tokens, places, causal=False)[:, seen - 1 : -1]
        way = [
            self.first(states[:, :1]),
            self.between(states[:, 1:-1]),
            self.last(states[:, -1:]) + destination[:, None],
        ]
        return torch.cat(way, 1), states


def perceptron(inputs: int, hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """Fully connected layers with ReLU between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise([inputs, *hidden]):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear([inputs, *hidden][-1], outputs))
