"""The transformer denoiser driven by prompt tokens, as a connector drives it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from regimen.models import KontextDenoiser

SHAPE, BATCH = (1, 8, 8), 4


@pytest.fixture
def model() -> KontextDenoiser:
    torch.manual_seed(0)
    model = KontextDenoiser(SHAPE, 3, dim=16, layers=2, heads=2, prompt_dim=12, pooled_dim=10)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def context() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "prompt_embeds": torch.randn(BATCH, 5, 12),
        "pooled": torch.randn(BATCH, 10),
        "null_prompt_embeds": torch.randn(BATCH, 2, 12),
        "null_pooled": torch.randn(BATCH, 10),
        "reference": torch.randn(BATCH, *SHAPE),
        "has_reference": torch.tensor([True, False, False, True]),
    }


def test_prompt_and_pooled_both_matter_and_get_gradients(model, context):
    x, sigma = torch.randn(BATCH, *SHAPE), torch.rand(BATCH)
    base = model(x, sigma, context)
    for key in ("prompt_embeds", "pooled"):
        given = {**context, key: context[key].clone().requires_grad_()}
        given[key].data += 0.5
        moved = model(x, sigma, given)
        assert (moved - base).abs().flatten(1).amax(1).min() > 1e-4
        moved.square().sum().backward()
        assert given[key].grad.abs().flatten(1).sum(1).min() > 0
    silent = [name for name, p in model.named_parameters() if not p.grad.abs().sum() > 0]
    assert silent == []


def test_reference_is_masked_beside_a_prompt_too(model, context):
    x, sigma, has = torch.randn(BATCH, *SHAPE), torch.rand(BATCH), context["has_reference"]
    omitted = model(x, sigma, {**context, "reference": None})
    mixed = model(x, sigma, context)
    torch.testing.assert_close(mixed[~has], omitted[~has], atol=1e-6, rtol=0)
    assert (mixed[has] - omitted[has]).abs().amax() > 1e-3


def test_a_missing_condition_is_the_null_condition(model, context):
    x, sigma = torch.randn(BATCH, *SHAPE), torch.rand(BATCH)
    null = {**context, "condition": torch.full((BATCH,), 3)}
    assert torch.equal(model(x, sigma, context), model(x, sigma, null))
    classed = {**context, "condition": torch.zeros(BATCH, dtype=torch.long)}
    assert not torch.equal(model(x, sigma, context), model(x, sigma, classed))


def test_unconditional_puts_the_null_prompt_in_place(model, context):
    context = {**context, "condition": torch.zeros(BATCH, dtype=torch.long)}
    null = model.unconditional(context)
    assert null["prompt_embeds"] is context["null_prompt_embeds"]
    assert null["pooled"] is context["null_pooled"]
    assert null["reference"] is context["reference"]
    assert null["condition"].eq(3).all()


def test_errors_name_the_missing_key(model, context):
    x, sigma = torch.randn(BATCH, *SHAPE), torch.rand(BATCH)
    for key in ("prompt_embeds", "pooled"):
        with pytest.raises(ValueError, match=f"KontextDenoiser needs '{key}'"):
            model(x, sigma, {k: v for k, v in context.items() if k != key})
    with pytest.raises(ValueError, match="KontextDenoiser.unconditional needs 'null_prompt_embeds'"):
        model.unconditional({k: v for k, v in context.items() if k != "null_prompt_embeds"})
