"""Critics of actions: several at once are each on its own, boxes do not matter, and spaces that do not fit say so."""

from __future__ import annotations

import gymnasium.spaces as spaces
import numpy as np
import pytest
import torch
from torch import nn

from regimen.models import ActionValues, MLPTorso, QNetwork


def network(critics: int = 3, **settings: object) -> QNetwork:
    torch.manual_seed(0)
    return QNetwork(MLPTorso(2, ()), 2, widths=(8, 5), critics=critics, **settings)  # type: ignore[arg-type]


def test_critics_are_networks_of_their_own() -> None:
    critics = network()
    seen, actions = torch.randn(6, 2), torch.randn(6, 2)
    values = critics(seen, actions)
    assert list(values.shape) == [3, 6]
    for number, value in enumerate(values):
        x = torch.cat([seen, actions], -1)
        for layer in critics.layers:
            x = x.relu() if isinstance(layer, nn.ReLU) else x @ layer.weight[number] + layer.bias[number]
        torch.testing.assert_close(value, x.squeeze(-1))
    assert len({round(float(value[0].detach()), 4) for value in values}) == 3


def test_the_loss_of_one_critic_leaves_the_others() -> None:
    critics = network()
    critics(torch.randn(6, 2), torch.randn(6, 2))[1].sum().backward()
    for parameter in critics.layers.parameters():
        assert parameter.grad[[0, 2]].abs().sum() == 0
    assert float(critics.layers[0].weight.grad[1].abs().sum()) > 0


def test_actions_are_read_relative_to_their_box() -> None:
    wide, plain = network(box=([-10.0, 0.0], [10.0, 100.0])), network()
    seen, relative = torch.randn(6, 2), torch.rand(6, 2) * 2 - 1
    actions = torch.tensor([0.0, 50.0]) + relative * torch.tensor([10.0, 50.0])
    torch.testing.assert_close(wide(seen, actions), plain(seen, relative))


def test_without_layers_a_critic_is_linear() -> None:
    critics = QNetwork(MLPTorso(2, ()), 1, widths=(), critics=1)
    assert sum(parameter.numel() for parameter in critics.parameters()) == 4


def test_critics_fit_the_spaces_of_an_environment() -> None:
    box = spaces.Box(np.array([-2.0], np.float32), np.array([2.0], np.float32))
    seen = spaces.Dict({"place": spaces.Box(-1, 1, (3,)), "cell": spaces.Discrete(4)})
    critics = QNetwork.for_spaces(seen, box, widths=(6,))
    assert critics.layers[0].weight.shape == (2, 3 + 4 + 1, 6)
    assert QNetwork.for_spaces(seen, box, reads=["place"], widths=(6,), critics=5).layers[0].weight.shape == (5, 4, 6)
    pixels = QNetwork.for_spaces(spaces.Box(0, 255, (1, 8, 8), np.uint8), box, widths=(6,))
    assert pixels(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, 1)).shape == (2, 2)


def test_dueling_values_are_a_value_and_advantages_that_are_zero_in_the_mean() -> None:
    torch.manual_seed(0)
    head = ActionValues(3, 4, dueling=True)
    features = torch.randn(5, 3)
    assert head.value is not None
    torch.testing.assert_close(head(features).mean(1, keepdim=True), head.value(features))
    with torch.no_grad():
        head.advantages.bias += 7
    torch.testing.assert_close(head(features).mean(1, keepdim=True), head.value(features))
    plain = ActionValues(3, 4)
    torch.testing.assert_close(plain(features), plain.advantages(features))
    assert sum(p.numel() for p in plain.parameters()) == 16


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"no critic for the actions Discrete\(3\); .* discrete ones have a QPolicy"):
        QNetwork.for_spaces(spaces.Box(-1, 1, (2,)), spaces.Discrete(3))
    with pytest.raises(
        ValueError, match=r"QNetwork: critics=2, box from \[-inf\] to \[inf\]; expected .* finite bounds"
    ):
        QNetwork.for_spaces(spaces.Box(-1, 1, (2,)), spaces.Box(-np.inf, np.inf, (1,)))
    with pytest.raises(ValueError, match="critics=0"):
        network(critics=0)
