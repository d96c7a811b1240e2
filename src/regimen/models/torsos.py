"""Networks from observations to features: vectors, images, dictionaries, numbers of states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeAlias, cast

import gymnasium.spaces as spaces
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from regimen.models.dense import Dense

Observations: TypeAlias = Tensor | TensorDict
"""`[R, ...]`, or a table `[R]` of tensors where observations are dictionaries."""


class MLPTorso(nn.Module):
    """Fully connected layers on vectors `[R, ...]`, flattened; weights orthogonal, biases 0.

    Attributes:
        width: of the features, `[R, width]`.
    """

    def __init__(self, inputs: int, widths: Sequence[int] = (64, 64), activation: type[nn.Module] = nn.Tanh) -> None:
        super().__init__()
        self.width = widths[-1] if widths else inputs
        layers: list[nn.Module] = []
        for before, after in pairwise([inputs, *widths]):
            layers += [orthogonal(Dense(before, after), 2**0.5), activation()]
        self.layers = nn.Sequential(*layers)

    def forward(self, observations: Tensor) -> Tensor:
        """Features `[R, width]`."""
        features: Tensor = self.layers(observations.flatten(1).to(_precision(self.layers)))
        return features


ATARI_LAYERS = ((32, 8, 4), (64, 4, 2), (64, 3, 1))
"""(Channels, kernel, stride) of the convolutions of Mnih et al. (2015), for images of 84 x 84."""
SMALL_LAYERS = ((16, 2, 1), (32, 2, 1), (64, 2, 1))
"""For small images, such as the 7 x 7 cells that are seen in MiniGrid."""


class ConvTorso(nn.Module):
    """Convolutions on images `[R, C, H, W]` (or `[R, H, W, C]` if channels come last), bytes as parts of 255."""

    def __init__(
        self,
        shape: Sequence[int],
        *,
        channels_last: bool = False,
        layers: Sequence[tuple[int, int, int]] | None = None,
        width: int = 512,
    ) -> None:
        """Make the network.

        Args:
            shape: of one image.
            channels_last: whether its channels come last.
            layers: (channels, kernel, stride) of each convolution; by default `ATARI_LAYERS` if the image is large
                enough for them, else `SMALL_LAYERS`.
            width: of the features.

        Raises:
            ValueError: the image is too small for the layers.
        """
        super().__init__()
        self.width, self.channels_last = width, channels_last
        size = (shape[2], shape[0], shape[1]) if channels_last else tuple(shape)
        side = min(size[1:])
        if layers is None:
            layers = ATARI_LAYERS if _side_after(side, ATARI_LAYERS) > 0 else SMALL_LAYERS
        if _side_after(side, layers) < 1:
            raise ValueError(
                f"ConvTorso: images of shape {list(shape)} are too small for convolutions (channels, kernel, stride) "
                f"{list(layers)}; give smaller ones as layers=..., or flatten the image for an MLPTorso"
            )
        stack: list[nn.Module] = []
        inputs = size[0]
        for channels, kernel, stride in layers:
            stack += [orthogonal(nn.Conv2d(inputs, channels, kernel, stride), 2**0.5), nn.ReLU()]
            inputs = channels
        self.convolutions = nn.Sequential(*stack, nn.Flatten())
        with torch.no_grad():
            flat = self.convolutions(torch.zeros(1, *size)).shape[1]
        self.out = nn.Sequential(orthogonal(nn.Linear(flat, width), 2**0.5), nn.ReLU())

    def forward(self, observations: Tensor) -> Tensor:
        """Features `[R, width]`."""
        image = observations.movedim(-1, -3) if self.channels_last else observations
        scaled = image.to(_precision(self.out)) / (255 if observations.dtype == torch.uint8 else 1)
        features: Tensor = self.out(self.convolutions(scaled))
        return features


def _side_after(side: int, layers: Sequence[tuple[int, int, int]]) -> int:
    for _, kernel, stride in layers:
        side = (side - kernel) // stride + 1
    return side


class OneHotTorso(nn.Module):
    """Numbers of states int64 `[R]` as unit vectors `[R, states]`: with a linear head, a table."""

    def __init__(self, states: int) -> None:
        super().__init__()
        self.width = states

    def forward(self, observations: Tensor) -> Tensor:
        """Features `[R, states]`."""
        return nn.functional.one_hot(observations.long().flatten(), self.width).to(torch.get_default_dtype())


class DictTorso(nn.Module):
    """A torso for each entry of a table of observations; their features side by side, and perhaps layers on these."""

    def __init__(
        self,
        torsos: Mapping[str, nn.Module],
        widths: Sequence[int] = (),
        activation: type[nn.Module] = nn.Tanh,
    ) -> None:
        """`widths` and `activation` are those of the layers on all features together."""
        super().__init__()
        self.torsos = nn.ModuleDict(dict(torsos))
        inputs = sum(cast(int, torso.width) for torso in torsos.values())
        self.together = MLPTorso(inputs, widths, activation) if widths else nn.Identity()
        self.width = widths[-1] if widths else inputs

    def forward(self, observations: TensorDict) -> Tensor:
        """Features `[R, width]`."""
        apart = torch.cat([torso(observations[name]) for name, torso in self.torsos.items()], -1)
        features: Tensor = self.together(apart)
        return features


def torso_for(
    space: spaces.Space[Any], widths: Sequence[int] = (64, 64), reads: Sequence[str] | None = None
) -> nn.Module:
    """The torso that fits a gymnasium space: images of bytes, vectors, numbers of states, dictionaries of these.

    Args:
        space: of the observations.
        widths: of fully connected layers.
        reads: the entries of a dictionary that are read; all by default.

    Raises:
        ValueError: a space of another kind, or an entry that it does not have.
    """
    if reads is not None and not (isinstance(space, spaces.Dict) and set(reads) <= set(space.spaces)):
        raise ValueError(f"torso_for: reads={list(reads)} names entries that the observations {space} do not have")
    if isinstance(space, spaces.Dict):
        entries = space.spaces if reads is None else {name: space.spaces[name] for name in reads}
        return DictTorso({name: torso_for(part, widths) for name, part in entries.items()})
    if isinstance(space, spaces.Discrete) and space.start == 0:
        return OneHotTorso(int(space.n))
    if isinstance(space, spaces.Box) and len(space.shape) == 3 and space.dtype.name == "uint8":
        return ConvTorso(space.shape, channels_last=space.shape[2] in (1, 3, 4))
    if isinstance(space, spaces.Box):
        return MLPTorso(int(torch.Size(space.shape).numel()), widths)
    raise ValueError(
        f"torso_for: no torso for the observations {space}; expected a Box, Discrete(n) from 0, or a Dict of these; "
        "wrap the environment, or give a network of your own"
    )


def _precision(layers: nn.Sequential) -> torch.dtype:
    """That of the first layer's weights."""
    first: Any = next(iter(layers), None)
    return torch.get_default_dtype() if first is None else first.weight.dtype


def orthogonal(layer: Any, gain: float) -> Any:
    """A layer with orthogonal weights and no bias (Saxe et al. 2014); returns it."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer
