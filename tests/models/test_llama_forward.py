"""Our forward pass of decoders of Llama's kind against that of `transformers`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny_language_models as tiny
from regimen.models import CausalLM, sublayers
from regimen.models.kv_cache import RowsCache
from regimen.models.packing import Packed

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama with yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
}


@pytest.fixture(params=KINDS)
def network(request: pytest.FixtureRequest) -> CausalLM:
    network = CausalLM(tiny.language_model(request.param.split()[0], **KINDS[request.param]))
    assert network.forward_pass is not None
    # Biases start at 0, and the scales of norms at 1.
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return network


def batch() -> tuple[Tensor, Tensor]:
    """Six rows, of which some begin alike, and the steps that are asked for; nothing is asked of row 3."""
    ids = torch.randint(5, 200, (6, 13), generator=torch.Generator().manual_seed(0))
    ids[1] = ids[0]
    ids[4, :8] = ids[0, :8]
    where = torch.zeros(6, 13, dtype=torch.bool)
    where[:, 8:] = True
    where[2, 11:], where[3], where[4, 9] = False, False, False
    return ids, where


def result(network: CausalLM, states: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """States, and the gradients of a sum over them."""
    network.zero_grad()
    (states * torch.randn(states.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    return states.detach(), {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


def same(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("block", [1024, 5])
def test_values_and_gradients_are_those_of_transformers(
    network: CausalLM, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sublayers, "BLOCK", block)
    ids, where = batch()
    forward, packed = network.forward_pass, Packed.of(ids, where)
    assert forward is not None
    row, step = where.nonzero(as_tuple=True)
    expected = result(network, network.plain_hidden(ids)[row, step - 1])
    same(result(network, network.hidden(ids)[row, step - 1]), expected)
    same(result(network, forward.packed(packed)[packed.before]), expected)


def test_token_by_token_after_left_padding_is_the_same(network: CausalLM) -> None:
    ids, _ = batch()
    real = torch.arange(13) >= torch.tensor([0, 3, 1, 0, 5, 0])[:, None]
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected, cache, parts = network.plain_hidden(ids, real, positions=positions), RowsCache(13), []
        for part in (slice(0, 6), slice(6, 9), *(slice(t, t + 1) for t in range(9, 13))):
            parts.append(
                network.hidden(ids[:, part], mask=real[:, : part.stop], positions=positions[:, part], cache=cache)
            )
    torch.testing.assert_close(torch.cat(parts, 1)[real], expected[real], rtol=0, atol=1e-5)


def test_adapters_are_part_of_the_pass() -> None:
    network = CausalLM(tiny.language_model("llama")).lora(2)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    assert network.forward_pass is not None
    ids, _ = batch()
    expected = result(network, network.plain_hidden(ids))
    assert len(expected[1]) == 28
    same(result(network, network.hidden(ids)), expected)
    with network.adapters_disabled(), torch.no_grad():
        assert (network.hidden(ids) - expected[0]).abs().max() > 1e-3
        torch.testing.assert_close(network.hidden(ids), network.plain_hidden(ids), rtol=0, atol=1e-5)


def test_half_precision_agrees_to_its_rounding() -> None:
    network = CausalLM(tiny.language_model("qwen3")).to(torch.bfloat16)
    ids, _ = batch()
    expected = network.plain_hidden(ids).float()
    assert (network.hidden(ids).float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_what_is_not_known_is_left_to_transformers() -> None:
    for kind, options in [("gpt2", {}), ("gemma2", {}), ("mistral", {"sliding_window": 5}),
                          ("llama", {"attn_implementation": "eager"}), ("llama", {"hidden_act": "gelu"})]:  # fmt: skip
        assert CausalLM(tiny.language_model(kind, **options)).forward_pass is None
    network = CausalLM(tiny.language_model("llama"))
    hook = network.base.model.layers[0].register_forward_hook(lambda *_: None)
    assert network.forward_pass is None
    hook.remove()
    assert network.forward_pass is not None


def test_shared_beginnings_are_packed_once() -> None:
    tokens = torch.tensor([[7, 8, 9, 1, 2], [7, 8, 9, 3, 4], [7, 5, 6, 0, 0]])
    where = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 1, 1], [0, 1, 1, 0, 0]]).bool()
    packed = Packed.of(tokens, where)
    assert packed.ids.tolist() == [7, 8, 9, 1, 3, 7, 5]
    assert packed.positions.tolist() == [0, 1, 2, 3, 3, 0, 1]
    assert packed.place[:2].tolist() == [[0, 1, 2, 3], [0, 1, 2, 4]]
    assert packed.owner.tolist() == [0, 1, 2, 3, 7, 8, 9]
    assert packed.before.tolist() == [2, 3, 2, 4, 5, 6]


@pytest.mark.parametrize("biased", [True, False])
def test_sublayers_agree_with_finite_differences(biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sublayers, "BLOCK", 2)
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, scale, weights = leaf(5, 3), leaf(3), [leaf(4, 3), leaf(2, 3)]
    biases = [leaf(4), leaf(2)] if biased else [None, None]

    def both(x: Tensor, scale: Tensor, first: Tensor, second: Tensor, down: Tensor, *biases: Tensor) -> Tensor:
        given = list(biases) if biases else [None, None]
        return sublayers.gated_projection(sublayers.normed_projection(x, scale, 1e-3, [first, second], given), down)

    inputs = [x, scale, *weights, leaf(2, 3), *(b for b in biases if b is not None)]
    assert torch.autograd.gradcheck(both, inputs)
    normed = nn.functional.rms_norm(x, (3,), scale, 1e-3)
    plain = torch.cat([nn.functional.linear(normed, w, b) for w, b in zip(weights, biases, strict=True)], -1)
    torch.testing.assert_close(sublayers.normed_projection(x, scale, 1e-3, weights, biases), plain)
