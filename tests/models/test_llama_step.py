"""Token by token with prepared weights, against the forward pass of `transformers`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_language_models as tiny
from regimen.models import CausalLM, llama_step
from regimen.models.kv_cache import RowsCache
from regimen.models.llama_step import LlamaStep
from regimen.models.shared_prefix import SharedPrefixCache

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama with yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
    "llama with one head for each query": {"num_key_value_heads": 4},
    "llama with a large epsilon": {"rms_norm_eps": 0.1},
    "qwen2": {},
    "qwen3": {"rms_norm_eps": 0.1},
    "mistral": {"sliding_window": None},
}
PROMPT, STEPS = 6, 5
LENGTHS = torch.tensor([6, 3, 5])
ROWS = torch.tensor([0, 0, 1, 2, 1])


def perturb(network: CausalLM) -> CausalLM:
    """Biases start at 0, and gains of norms at 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return network


@pytest.fixture(params=KINDS)
def network(request: pytest.FixtureRequest) -> CausalLM:
    return perturb(CausalLM(tiny.language_model(request.param.split()[0], **KINDS[request.param])))


def tokens() -> tuple[Tensor, Tensor]:
    """Prompts `[3, PROMPT]`, padded on the left, and what five rows say after them, `[5, STEPS]`."""
    every = torch.randint(5, 200, (8, PROMPT), generator=torch.Generator().manual_seed(0))
    return every[:3], every[3:, :STEPS]


@torch.no_grad()
def states(network: CausalLM, prepared: bool) -> Iterator[Tensor]:
    """Of every step, the states of the five rows."""
    prompts, said = tokens()
    forward, real = network.forward_pass, torch.arange(PROMPT) >= PROMPT - LENGTHS[:, None]
    assert forward is not None
    read = RowsCache(PROMPT)
    network.hidden(prompts, mask=real, positions=network.positions(real, prompts, None), cache=read)
    step = LlamaStep(forward.model)
    layers = step.paired(read.filled()) if prepared else read.filled()
    cache = SharedPrefixCache(layers, real, ROWS)
    for place in range(STEPS):
        yield (step if prepared else forward.step)(said[:, place], LENGTHS[ROWS] + place, cache)


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_states_are_those_of_the_whole_sequences(network: CausalLM, prepared: bool, dtype: torch.dtype) -> None:
    network.to(dtype)
    found = torch.stack(list(states(network, prepared)), 1)
    assert found.dtype == dtype
    prompts, said = tokens()
    for row, prompt in enumerate(ROWS.tolist()):
        whole = torch.cat([prompts[prompt, -int(LENGTHS[prompt]) :], said[row]])
        expected = network.plain_hidden(whole[None])[0, -STEPS:].detach()
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-5)


def test_an_input_of_zeros_has_a_norm() -> None:
    network = CausalLM(tiny.language_model("llama"))
    with torch.no_grad():
        network.base.model.embed_tokens.weight.zero_()
    assert all(bool(state.isfinite().all()) for state in states(network, prepared=True))


def test_models_without_plain_layers_or_full_precision_do_not_suit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert LlamaStep.suits(CausalLM(tiny.language_model("llama")).base.model)
    assert not LlamaStep.suits(CausalLM(tiny.language_model("llama")).lora(2).base.model)
    assert not LlamaStep.suits(CausalLM(tiny.language_model("llama")).to(torch.bfloat16).base.model)
    monkeypatch.setattr(llama_step, "AT_MOST", 1000)
    assert not LlamaStep.suits(CausalLM(tiny.language_model("llama")).base.model)
