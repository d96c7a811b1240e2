"""Hidden states, logits and adapters of `transformers` models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny_language_models as tiny
from regimen.models import CausalLM, small_decoder

IDS = torch.tensor([[5, 40, 8, 100, 7, 31], [9, 60, 12, 3, 3, 200]])


def small() -> CausalLM:
    return CausalLM(small_decoder(300, dim=16, layers=1, heads=2))


@pytest.fixture
def adapted() -> CausalLM:
    pytest.importorskip("peft")
    return small().lora(2, 4.0)


@pytest.mark.parametrize("kind", [*tiny.CLASSES, "mistral", "gemma2", "granite", "cohere"])
def test_logits_of_hidden_states_are_the_models_own(kind: str) -> None:
    options: dict[str, Any] = {
        "gemma2": {"final_logit_softcapping": 3.0, "attn_implementation": "eager"},
        "granite": {"logits_scaling": 4.0},
        "cohere": {"logit_scale": 0.5},
    }.get(kind, {})
    network = CausalLM(tiny.language_model(kind, **options))
    theirs = network.base(IDS).logits
    assert theirs.std() > 0.1
    torch.testing.assert_close(network.logits(network.hidden(IDS)), theirs, rtol=1e-5, atol=1e-5)


def test_logits_are_in_float32_or_better() -> None:
    network = small()
    assert network.to(torch.bfloat16).logits(network.hidden(IDS)).dtype == torch.float32
    assert network.double().logits(network.hidden(IDS)).dtype == torch.float64


def test_a_class_that_does_more_to_its_logits_is_refused() -> None:
    model = small_decoder(30, dim=8, layers=1, heads=2)
    forward = model.forward

    def doubled(*args: Any, **options: Any) -> Any:
        found = forward(*args, **options)
        found.logits = 2 * found.logits + torch.arange(30)
        return found

    model.forward = doubled
    with pytest.raises(ValueError, match="LlamaForCausalLM does more to its logits than is known here"):
        CausalLM(model)


def test_a_class_that_keeps_more_than_keys_and_values_is_refused() -> None:
    with pytest.raises(
        ValueError, match="layers of type linear_attention; expected full_attention or sliding_attention"
    ):
        CausalLM(tiny.language_model("qwen3_next"))


def test_padding_in_front_changes_nothing() -> None:
    network = small()
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), IDS], 1)
    mask = torch.arange(9).expand(2, -1) >= 3
    found = network.hidden(padded, mask=mask)[:, 3:]
    torch.testing.assert_close(found, network.hidden(IDS), rtol=0, atol=1e-5)


def test_it_stays_in_evaluation_mode() -> None:
    network = CausalLM(tiny.language_model("gpt2", resid_pdrop=0.5))
    nn.Sequential(network).train()
    assert not any(module.training for module in network.modules())
    assert torch.equal(network.hidden(IDS), network.hidden(IDS))


@pytest.mark.parametrize(("options", "message"), [
    ({"sliding_window": 4}, r"6 tokens; expected .* no more tokens than sliding_window \(4\)"),
    ({"attn_implementation": "flex_attention"}, "one of eager, sdpa .it is flex_attention."),
])  # fmt: skip
def test_visible_is_refused_where_the_attention_does_not_take_it(options: dict[str, Any], message: str) -> None:
    model = tiny.language_model("mistral", **{key: value for key, value in options.items() if key == "sliding_window"})
    network = CausalLM(model)
    network.config._attn_implementation = options.get("attn_implementation", "sdpa")
    with pytest.raises(ValueError, match=message):
        network.hidden(IDS, visible=torch.ones(2, 6, 6, dtype=torch.bool).tril())


# Adapters


def test_adapters_start_at_zero_effect_and_are_all_that_trains(adapted: CausalLM) -> None:
    torch.testing.assert_close(adapted.hidden(IDS), small().hidden(IDS))
    assert all(p.requires_grad == ("lora_" in name) for name, p in adapted.named_parameters())
    with pytest.raises(ValueError, match="has adapters already"):
        adapted.lora(2)


def stirred(network: CausalLM) -> CausalLM:
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    return network


def test_switched_off_the_base_weights_are_back(adapted: CausalLM) -> None:
    stirred(adapted)
    with adapted.adapters_disabled():
        torch.testing.assert_close(adapted.hidden(IDS), small().hidden(IDS))
    assert (adapted.hidden(IDS) - small().hidden(IDS)).abs().max() > 1e-3


def test_switching_off_leaves_what_trains_as_it_was_even_after_an_error(adapted: CausalLM) -> None:
    first = next(p for name, p in adapted.named_parameters() if "lora_A" in name).requires_grad_(False)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    with pytest.raises(RuntimeError, match="in between"), adapted.adapters_disabled():
        raise RuntimeError("in between")
    assert not first.requires_grad
    assert [name for name, p in adapted.named_parameters() if p.requires_grad] == trained


def test_without_adapters_there_is_nothing_to_switch_off() -> None:
    with pytest.raises(ValueError, match="no adapters; add them with lora"), small().adapters_disabled():
        pass


def test_a_state_has_the_adapters_only_and_is_loaded_onto_the_same_base(adapted: CausalLM) -> None:
    again = copy.deepcopy(adapted)
    state = stirred(adapted).state_dict()
    assert state
    assert all("lora_" in name for name in state)
    again.load_state_dict(state)
    assert torch.equal(again.hidden(IDS), adapted.hidden(IDS))
    nn.ModuleDict({"a": again}).load_state_dict(nn.ModuleDict({"a": adapted}).state_dict())


def test_a_missing_adapter_is_still_an_error(adapted: CausalLM) -> None:
    state = adapted.state_dict()
    state.pop(next(iter(state)))
    with pytest.raises(RuntimeError, match="Missing key"):
        adapted.load_state_dict(state)


def test_weights_under_adapters_that_are_trained_are_in_the_state(adapted: CausalLM) -> None:
    name, norm = next((n, p) for n, p in adapted.named_parameters() if "norm" in n)
    norm.requires_grad_(True)
    assert name in adapted.state_dict()


def test_a_state_without_adapters_has_all_weights() -> None:
    network = small()
    names = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    assert set(network.state_dict()) == names
    with pytest.raises(RuntimeError, match="Missing key"):
        network.load_state_dict({name: value for name, value in list(network.state_dict().items())[1:]})


def test_placeholders_of_images_are_never_said() -> None:
    model = small_decoder(30, dim=8, layers=1, heads=2)
    model.config.image_token_id, model.config.video_token_id = 7, 9
    network = CausalLM(model)
    logp: Tensor = (network.logits(network.hidden(IDS % 30)) / 1e-3).log_softmax(-1)
    assert logp.exp()[..., [7, 9]].max() == 0
    assert (logp.exp() * logp).sum(-1).isfinite().all()
