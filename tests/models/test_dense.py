"""Dense layers: products by oneDNN are those of torch, with their gradients, and small ones are left to torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad

from regimen.models import dense
from regimen.models.dense import Dense, FixedDense, large, product
from regimen.models.q_network import QNetwork


class Given(nn.Identity):
    """A torso that hands on what it sees."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width


def given(rows: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    shapes = ((rows, inputs), (outputs, inputs), (outputs,))
    x, weight, bias = (torch.randn(shape, generator=rng).requires_grad_() for shape in shapes)
    return x, weight, bias


@pytest.mark.parametrize("shape", [(256, 256, 256), (300, 129, 257), (70, 512, 512)])
def test_large_products_and_their_gradients_are_those_of_torch(shape: tuple[int, int, int]) -> None:
    x, weight, bias = given(*shape)
    assert large(x, weight)
    found, expected = product(x, weight, bias), nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    gradient = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    for mine, theirs in zip(
        grad(found, (x, weight, bias), gradient), grad(expected, (x, weight, bias), gradient), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("biased", [True, False])
@torch.no_grad()
def test_fixed_weights_serve_any_number_of_rows(biased: bool) -> None:
    x, weight, bias = given(256, 256, 129)
    layer = FixedDense(weight, bias if biased else None)
    for rows in (256, 300, 40, 3):
        few = x.repeat(2, 1)[:rows]
        expected = nn.functional.linear(few, weight, layer.bias)
        torch.testing.assert_close(layer(few), expected, rtol=1e-5, atol=1e-4)
    wide = torch.randn(256, 512)[:, 100:356]
    torch.testing.assert_close(layer(wide), nn.functional.linear(wide, weight, layer.bias), rtol=1e-5, atol=1e-4)


def test_a_gradient_of_the_gradient_is_that_of_torch() -> None:
    x, weight, bias = ((tensor.detach() / 16).requires_grad_() for tensor in given(256, 256, 256))
    seconds = []
    for layer in (product, nn.functional.linear):
        (slope,) = grad(layer(x, weight, bias).tanh().sum(), x, create_graph=True)
        seconds.append(grad(slope.square().sum(), weight)[0])
    torch.testing.assert_close(*seconds, rtol=1e-4, atol=1e-4)


def test_frozen_weights_get_no_gradient() -> None:
    x, weight, bias = given(256, 256, 256)
    product(x, weight.detach(), bias.detach()).sum().backward()
    assert x.grad is not None
    assert weight.grad is None


def test_small_and_double_products_are_left_to_torch() -> None:
    x, weight, bias = given(4, 64, 64)
    assert not large(x, weight)
    assert torch.equal(product(x, weight, bias), nn.functional.linear(x, weight, bias))
    x, weight, bias = (tensor.double() for tensor in given(256, 256, 256))
    assert not large(x, weight)
    assert torch.equal(product(x, weight, bias), nn.functional.linear(x, weight, bias))


def test_a_dense_layer_repeats_itself_bit_for_bit() -> None:
    layer, x = Dense(256, 256), given(256, 256, 1)[0]
    assert torch.equal(layer(x), layer(x))


def test_critics_one_by_one_are_the_critics_side_by_side() -> None:
    torch.manual_seed(0)
    critics = QNetwork(Given(5), 3, widths=(256, 256), critics=3)
    seen, actions = torch.randn(256, 5), torch.randn(256, 3).requires_grad_()
    together = critics.layers(torch.cat([seen, actions], -1).expand(3, 256, 8)).squeeze(-1)
    found = critics(seen, actions)
    assert large(torch.cat([seen, actions], -1), critics.layers[2].weight[0])
    torch.testing.assert_close(found, together, rtol=1e-5, atol=1e-5)
    sources = [actions, *critics.parameters()]
    for mine, theirs in zip(grad(found.square().mean(), sources), grad(together.square().mean(), sources), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_matrices_with_gaps_are_multiplied_as_others() -> None:
    """Columns of a wider matrix: oneDNN itself would take a thousand times as long for them."""
    wide = torch.randn(512, 384, generator=torch.Generator().manual_seed(0))
    part, rows = wide[:, 128:256], wide[:, :128].contiguous()
    for gaps in (part, part.t()):
        assert dense._dense(gaps).is_contiguous()
    assert dense._dense(rows.t()) is not None
    torch.testing.assert_close(dense.times(rows.t(), part.t()), rows.t() @ part, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(dense.times(part, rows), part @ rows.t(), atol=1e-3, rtol=1e-5)
