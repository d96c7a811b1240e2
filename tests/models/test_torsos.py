"""Torsos: the shapes they take, what they start from, what they refuse."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import gymnasium.spaces as spaces
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from regimen.models import ConvTorso, DictTorso, MLPTorso, OneHotTorso, ValueNetwork, torso_for

VECTOR = spaces.Box(-1, 1, (2, 3), np.float64)


def test_vectors_of_any_shape_are_flattened() -> None:
    torso = torso_for(VECTOR, (5, 4))
    assert isinstance(torso, MLPTorso)
    assert torso.width == 4
    seen = torch.randn(7, 2, 3)
    assert torch.equal(torso(seen), torso(seen.flatten(1)))
    assert torso(seen.double()).shape == (7, 4)
    assert torch.equal(MLPTorso(6, ())(seen), seen.flatten(1))


def test_layers_begin_orthogonal_with_the_gain_of_their_activation() -> None:
    for layer in MLPTorso(8, (8, 8)).layers[::2]:
        assert torch.allclose(layer.weight @ layer.weight.T, 2 * torch.eye(8), atol=1e-5)
        assert not layer.bias.any()


def test_a_number_of_a_state_is_a_unit_vector() -> None:
    torso = torso_for(spaces.Discrete(4))
    assert isinstance(torso, OneHotTorso)
    assert torso(torch.tensor([2, 0])).tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize(("shape", "last", "kernel"), [
    ((84, 84, 3), True, 8), ((4, 84, 84), False, 8), ((36, 40, 1), True, 8), ((7, 7, 3), True, 2),
    ((3, 4, 5), False, 2),
])  # fmt: skip
def test_images_have_their_channels_first_or_last_and_convolutions_that_fit(
    shape: tuple[int, ...], last: bool, kernel: int
) -> None:
    torso = torso_for(spaces.Box(0, 255, shape, np.uint8))
    assert isinstance(torso, ConvTorso)
    assert torso.channels_last == last
    assert torso.convolutions[0].kernel_size == (kernel, kernel)
    assert torso(torch.randint(256, (2, *shape), dtype=torch.uint8)).shape == (2, 512)


def test_bytes_are_parts_of_255() -> None:
    torso = ConvTorso((3, 4, 4), width=8)
    image = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    assert torch.allclose(torso(image), torso(image.float() / 255))
    last = ConvTorso((4, 4, 3), channels_last=True, width=8)
    last.load_state_dict(torso.state_dict())
    assert torch.equal(last(image.movedim(1, -1)), torso(image))


def test_a_table_has_a_torso_for_each_entry() -> None:
    space = spaces.Dict({"vector": VECTOR, "more": spaces.Dict({"state": spaces.Discrete(3)})})
    torso = torso_for(space, (4,))
    assert isinstance(torso, DictTorso)
    assert torso.width == 7
    seen = TensorDict({"vector": torch.randn(5, 2, 3), "more": {"state": torch.arange(5) % 3}}, [5])
    features = torso(seen)
    state = nn.functional.one_hot(seen["more", "state"], 3).float()
    assert torch.equal(features, torch.cat([state, torso.torsos["vector"](seen["vector"])], 1))


def test_a_table_may_have_layers_on_all_its_entries_together() -> None:
    torch.manual_seed(0)
    torso = DictTorso({"a": MLPTorso(2, ()), "b": MLPTorso(1, ())}, (8,))
    assert torso.width == 8
    a, b = torch.randn(5, 2), torch.randn(5, 1)
    features = torso(TensorDict({"a": a, "b": b}, [5]))
    assert torch.equal(features, torso.together(torch.cat([a, b], 1)))
    apart = torso(TensorDict({"a": a, "b": 0 * b}, [5])) + torso(TensorDict({"a": 0 * a, "b": b}, [5]))
    assert not torch.allclose(features, apart, atol=1e-3)


@pytest.mark.parametrize("space", [spaces.MultiBinary(3), spaces.Discrete(3, start=1), spaces.Text(4)])
def test_other_spaces_are_refused_by_name(space: Any) -> None:
    with pytest.raises(ValueError, match="no torso for the observations .*; expected a Box, Discrete.n. from 0"):
        torso_for(space)


def test_images_too_small_for_their_convolutions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images of shape \[3, 3, 3\] are too small for convolutions .* layers=..."):
        ConvTorso((3, 3, 3))
    with pytest.raises(ValueError, match=r"too small for convolutions .* \[\(8, 9, 1\)\]"):
        ConvTorso((3, 8, 8), layers=[(8, 9, 1)])


@pytest.mark.parametrize("wide", [False, True])
def test_a_value_network_gives_one_value_per_step(wide: bool) -> None:
    space = spaces.Dict({"a": VECTOR}) if wide else VECTOR
    critic = ValueNetwork(torso_for(space, (4,)))
    seen: Any = torch.randn(3, 5, 2, 3)
    shown = TensorDict({"a": seen}, [3, 5]) if wide else seen
    values: Tensor = critic(SimpleNamespace(observations=shown))
    assert values.shape == (3, 5)
    alone = critic(SimpleNamespace(observations=shown[1:2, 2:3]))
    assert torch.allclose(values[1, 2], alone[0, 0], atol=1e-6)
