"""Networks from observations to features: vectors, images, dictionaries, numbers of states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

import gymnasium.spaces as spaces
import torch
from tensordict import TensorDict
from torch import Tensor, nn

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
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in zip([inputs, *widths[:-1]], widths, strict=True):
            layers += [orthogonal(nn.Linear(before, after), 2**0.5), activation()]
        self.layers = nn.Sequential(*layers)

    def forward(self, observations: Tensor) -> Tensor:
        """Features `[R, width]`."""
        features: Tensor = self.layers(observations.float())
        return features


class ConvTorso(nn.Module):
    """Convolutions on images `[R, C, H, W]` (or `[R, H, W, C]` if channels come last), bytes as parts of 255."""

    def __init__(
        self,
        shape: Sequence[int],
        *,
        channels_last: bool = False,
        layers: Sequence[tuple[int, int, int]] = ((32, 8, 4), (64, 4, 2), (64, 3, 1)),
        width: int = 512,
    ) -> None:
        """Make the network.

        Args:
            shape: of one image.
            channels_last: whether its channels come last.
            layers: (channels, kernel, stride) of each convolution; by default those of Mnih et al. (2015).
            width: of the features.
        """
        super().__init__()
        self.width, self.channels_last = width, channels_last
        size = (shape[2], shape[0], shape[1]) if channels_last else tuple(shape)
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
        scaled = image.float() / 255 if observations.dtype == torch.uint8 else image.float()
        features: Tensor = self.out(self.convolutions(scaled))
        return features


class OneHotTorso(nn.Module):
    """Numbers of states int64 `[R]` as unit vectors `[R, states]`: with a linear head, a table."""

    def __init__(self, states: int) -> None:
        super().__init__()
        self.width = states

    def forward(self, observations: Tensor) -> Tensor:
        """Features `[R, states]`."""
        return nn.functional.one_hot(observations.long().flatten(), self.width).float()


class DictTorso(nn.Module):
    """A torso for each entry of a table of observations; their features side by side."""

    def __init__(self, torsos: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.torsos = nn.ModuleDict(dict(torsos))
        self.width = sum(cast(int, torso.width) for torso in torsos.values())

    def forward(self, observations: TensorDict) -> Tensor:
        """Features `[R, width]`."""
        return torch.cat([torso(observations[name]) for name, torso in self.torsos.items()], -1)


def torso_for(space: spaces.Space[Any], widths: Sequence[int] = (64, 64)) -> nn.Module:
    """The torso that fits a gymnasium space: images of bytes, vectors, numbers of states, dictionaries of these.

    Raises:
        ValueError: a space of another kind.
    """
    if isinstance(space, spaces.Dict):
        return DictTorso({name: torso_for(part, widths) for name, part in space.spaces.items()})
    if isinstance(space, spaces.Discrete):
        return OneHotTorso(int(space.n))
    if isinstance(space, spaces.Box) and len(space.shape) == 3 and space.dtype.name == "uint8":
        return ConvTorso(space.shape, channels_last=space.shape[2] in (1, 3, 4))
    if isinstance(space, spaces.Box):
        return MLPTorso(int(torch.Size(space.shape).numel()), widths)
    raise ValueError(
        f"torso_for: no torso for observations of kind {type(space).__name__} ({space}); give ActionPolicy a network "
        "of your own"
    )


def orthogonal(layer: Any, gain: float) -> Any:
    """A layer with orthogonal weights and no bias (Saxe et al. 2014); returns it."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer
