"""Several linear layers in the place of one: mixtures by hand, which head learns from which row, and their starts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from regimen.models import LinearHeads
from regimen.models.linear_heads import mixture_weights

NAMES = ("right", "warm", "short")


def heads(noise: float = 0.0, bias: bool = True, names: tuple[str, ...] = NAMES, seed: int = 0) -> LinearHeads:
    torch.manual_seed(seed)
    return LinearHeads(nn.Linear(4, 5, bias).double(), names, noise=noise)


def different(bias: bool = True) -> LinearHeads:
    """Heads that differ a lot."""
    found = heads(bias=bias)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
            parameter.mul_(torch.randn((), dtype=torch.float64))
    return found


def features(rows: int = 7) -> Tensor:
    return torch.randn(rows, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((0.5, 0.5), (0.404471, 0.404471, 0.191058)),
        ((0.8, 0.2), (0.702420, 0.211565, 0.086016)),
        ((1.0, 0.0), (0.843795, 0.114195, 0.042010)),
    ],
)
def test_worked_mixtures(weights: tuple[float, float], expected: tuple[float, ...]) -> None:
    """Heads whose logits are [2, 0, -1] and [-1, 1, 0.5]."""
    found = LinearHeads(nn.Linear(1, 3, bias=False).double(), ["one", "two"])
    found.load_state_dict(
        {"heads.0.weight": doubles(2, 0, -1)[:, None], "heads.1.weight": doubles(-1, 1, 0.5)[:, None]}
    )
    wide = found(doubles(1.0, *weights)[None])[0].softmax(-1)
    assert torch.allclose(wide, doubles(*expected), atol=2e-6)
    with found.mixed(torch.tensor(weights)):
        assert torch.allclose(found(doubles(1.0)[None])[0].softmax(-1), doubles(*expected), atol=2e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_a_mixture_is_one_matrix(bias: bool) -> None:
    """Row by row, in force, merged, and the weighted sum of what the heads say: the same numbers."""
    found, x, weights = different(bias), features(), torch.tensor([0.2, 3.0, 0.8])
    wide = torch.cat([x, weights.double().expand(len(x), 3)], -1)
    by_hand = sum(share * head(x) for share, head in zip(weights / weights.sum(), found.heads, strict=True))
    assert torch.allclose(found(wide), by_hand, atol=1e-6)
    assert torch.allclose(found.merge(weights)(x), by_hand, atol=1e-6)
    with found.mixed(weights):
        assert torch.allclose(found(x), by_hand, atol=1e-6)
    assert torch.allclose(found(x), sum(head(x) for head in found.heads) / 3, atol=1e-6)


def test_one_weight_is_that_head_and_a_factor_is_nothing() -> None:
    found, x = different(), features()
    for place, head in enumerate(found.heads):
        own = one_hot(torch.tensor(place), 3)
        assert torch.equal(found.merge(own * 7.0)(x), head(x))
        assert torch.allclose(found(torch.cat([x, own.double().expand(len(x), 3)], -1)), head(x))
    some = torch.tensor([1.0, 2.0, 5.0])
    assert torch.allclose(found.merge(some)(x), found.merge(some * 40)(x))


def test_rows_have_heads_of_their_own() -> None:
    """In any order, and in any number of dimensions."""
    found, x = different(), features(12)
    objective = torch.tensor([2, 0, 1, 1, 0, 2, 2, 2, 0, 1, 0, 0])
    wide = torch.cat([x, one_hot(objective, 3).double()], -1)
    said = found(wide)
    for row in range(12):
        assert torch.allclose(said[row], found.heads[int(objective[row])](x[row]))
    assert torch.equal(found(wide.view(3, 4, 7)), said.view(3, 4, 5))


def test_a_head_learns_from_its_own_rows_only() -> None:
    found, x = different(), features(6).requires_grad_()
    objective = torch.tensor([0, 2, 0, 0, 2, 2])
    found(torch.cat([x, one_hot(objective, 3).double()], -1)).square().sum().backward()
    for place, head in enumerate(found.heads):
        mine = x.detach()[objective == place]
        expected = 2 * head(mine).T @ mine
        assert torch.allclose(torch.zeros(5, 4).double() if head.weight.grad is None else head.weight.grad, expected)
    assert found.heads[1].weight.grad is None
    assert bool((x.grad != 0).all())


def test_gradients_of_mixtures_are_those_of_finite_differences() -> None:
    found = different()
    wide = torch.cat([features(3), torch.tensor([[0.5, 0.5, 0], [0, 0, 1], [0.2, 0.3, 0.5]]).double()], -1)
    names, values = zip(*found.named_parameters(), strict=True)

    def said(*parameters: Tensor) -> Tensor:
        return torch.func.functional_call(found, dict(zip(names, parameters, strict=True)), (wide,))

    assert torch.autograd.gradcheck(said, values, atol=1e-6)


def test_heads_start_alike_and_are_not_one_tensor() -> None:
    layer = nn.Linear(4, 5)
    found = LinearHeads(layer, NAMES)
    assert all(torch.equal(head.weight, layer.weight) and torch.equal(head.bias, layer.bias) for head in found.heads)
    with torch.no_grad():
        found.heads[0].weight.add_(1)
    assert torch.equal(found.heads[1].weight, layer.weight)


def test_noise_is_small_differs_by_head_and_is_the_same_again() -> None:
    layer = nn.Linear(100, 50)
    one, two = LinearHeads(layer, NAMES, noise=1e-3), LinearHeads(layer, NAMES, noise=1e-3)
    noises = [head.weight - layer.weight for head in one.heads]
    assert all(float(noise.std().detach()) == pytest.approx(1e-3, rel=0.05) for noise in noises)
    assert not torch.equal(noises[0], noises[1])
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(one.heads, two.heads, strict=True))


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_a_state_of_one_layer_loads_into_every_head(noise: float) -> None:
    class Model(nn.Module):
        def __init__(self, out: nn.Module) -> None:
            super().__init__()
            self.body, self.out = nn.Linear(3, 4), out

    torch.manual_seed(3)
    single = nn.Linear(4, 5)
    model = Model(LinearHeads(nn.Linear(4, 5), NAMES, noise=noise))
    model.load_state_dict(Model(single).state_dict())
    expected = LinearHeads(single, NAMES, noise=noise)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(model.out.heads, expected.heads, strict=True))
    assert all(torch.equal(a.bias, b.bias) for a, b in zip(model.out.heads, expected.heads, strict=True))
    again = Model(LinearHeads(nn.Linear(4, 5), NAMES))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.out.heads[2].weight, model.out.heads[2].weight)


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(ValueError, match=r"a list of different names"):
        heads(names=("a", "a"))
    with pytest.raises(ValueError, match=r"noise is -1.0, expected at least 0"):
        heads(noise=-1.0)
    with pytest.raises(ValueError, match=r"features \[2, 6\]; expected 4 in the last dimension, or 4 and a weight"):
        heads()(torch.zeros(2, 6))
    with pytest.raises(ValueError, match=r"weights \[2\] for 3 heads"):
        heads().merge(torch.ones(2))
    for bad in ([0.0, 0.0, 0.0], [1.0, -1.0, 1.0], [torch.inf, 1.0, 0.0]):
        with pytest.raises(ValueError, match=r"expected finite numbers of at least 0, and one above 0"):
            mixture_weights(torch.tensor(bad), NAMES)
