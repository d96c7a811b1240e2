"""The connector's queries learn through a frozen language model."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from regimen.models import KontextDenoiser, MetaQueryConditioner, MetaQueryConnector, SmallMultimodalEncoder
from regimen.models.metaquery import continued

BATCH, VOCAB = 4, 20


def build(**options) -> MetaQueryConditioner:
    torch.manual_seed(0)
    encoder = SmallMultimodalEncoder(VOCAB, dim=16, layers=2, heads=2)
    connector = MetaQueryConnector(
        num_queries=3, encoder_hidden=16, hidden=24, layers=2, heads=2, mlp=32, prompt_dim=12, pooled_dim=10
    )
    return MetaQueryConditioner(encoder, connector, **options)


@pytest.fixture
def context() -> dict[str, Tensor]:
    torch.manual_seed(1)
    mask = torch.ones(BATCH, 5, dtype=torch.bool)
    mask[1, 3:] = False
    return {"prompt_ids": torch.randint(1, VOCAB, (BATCH, 5)), "prompt_mask": mask}


def test_adds_prompt_tokens_and_a_pooled_prompt(context):
    out = build()({**context, "condition": torch.zeros(BATCH)})
    assert out["prompt_embeds"].shape == (BATCH, 3, 12)
    assert out["pooled"].shape == (BATCH, 10)
    assert out["prompt_ids"] is context["prompt_ids"]
    assert set(out) == {"prompt_ids", "prompt_mask", "condition", "prompt_embeds", "pooled"}


def test_a_tensordict_stays_one(context):
    conditioner = build(guidance=True)
    out = conditioner(TensorDict(context, [BATCH]))
    assert isinstance(out, TensorDict)
    assert torch.equal(out["pooled"], conditioner(context)["pooled"])
    assert out[1:3]["null_prompt_embeds"].shape == (2, 3, 12)


def test_pooled_is_a_map_of_the_mean_token():
    connector = MetaQueryConnector(4, 6, 8, layers=1, heads=2, mlp=8, prompt_dim=8, pooled_dim=8)
    connector.pooled.load_state_dict(connector.prompt.state_dict())
    prompt_embeds, pooled = connector(torch.randn(2, 4, 6))
    torch.testing.assert_close(prompt_embeds.mean(1), pooled)


def test_connector_sees_all_queries_from_each():
    connector = MetaQueryConnector(4, 6, 8, layers=1, heads=2, mlp=8, prompt_dim=5, pooled_dim=5)
    hidden = torch.randn(1, 4, 6)
    moved = hidden.clone()
    moved[0, 3] += 1
    change = (connector(moved)[0] - connector(hidden)[0]).abs().amax(-1)
    assert change.min() > 0


def test_full_scale_sizes_are_those_of_the_paper():
    with torch.device("meta"):
        connector = MetaQueryConnector()
    assert connector.queries.shape == (256, 3584)
    assert len(connector.blocks) == 24
    assert (connector.prompt.out_features, connector.pooled.out_features) == (4096, 2048)


def test_queries_learn_while_the_encoder_is_untouched(context):
    conditioner = build()
    denoiser = KontextDenoiser((1, 4, 4), 0, dim=16, layers=1, prompt_dim=12, pooled_dim=10)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    before = {name: value.clone() for name, value in conditioner.state_dict().items()}
    parameters = [p for p in conditioner.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(parameters, 0.1)
    x = torch.randn(BATCH, 1, 4, 4)
    denoiser(x, torch.rand(BATCH), conditioner(context)).square().mean().backward()
    optimiser.step()
    for name, value in conditioner.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("encoder."), name
    assert all(p.grad is None for p in conditioner.encoder.parameters())
    assert conditioner.connector.queries.grad.abs().sum(1).min() > 0


def test_a_frozen_encoder_stays_in_evaluation_mode():
    conditioner = build().train()
    assert conditioner.connector.training
    assert not conditioner.encoder.training
    thawed = build(freeze=False).train()
    assert thawed.encoder.training
    assert all(p.requires_grad for p in thawed.parameters())


def test_padding_side_and_amount_do_not_matter(context):
    conditioner = build()
    ids, mask = context["prompt_ids"], context["prompt_mask"]
    right = conditioner(context)
    left_ids, left_mask = ids.clone(), mask.clone()
    left_ids[1] = ids[1].roll(2)
    left_mask[1] = mask[1].roll(2)
    left = conditioner({"prompt_ids": left_ids, "prompt_mask": left_mask})
    short = conditioner({"prompt_ids": ids[1:2, :3], "prompt_mask": mask[1:2, :3]})
    for key in ("prompt_embeds", "pooled"):
        torch.testing.assert_close(left[key], right[key], atol=1e-5, rtol=0)
        torch.testing.assert_close(short[key], right[key][1:2], atol=1e-5, rtol=0)
    junk = ids.masked_fill(~mask, 7)
    torch.testing.assert_close(conditioner({**context, "prompt_ids": junk})["pooled"], right["pooled"])


def test_the_prompt_and_its_order_matter(context):
    conditioner = build()
    base = conditioner(context)["pooled"]
    for ids in (context["prompt_ids"].flip(1), (context["prompt_ids"] + 1) % VOCAB):
        assert (conditioner({**context, "prompt_ids": ids})["pooled"] - base).abs().amax(1).min() > 1e-4


def test_the_image_is_seen_by_rows_that_have_one(context):
    conditioner = build()
    image = torch.rand(BATCH, 1, 8, 8)
    plain, seen = conditioner(context), conditioner({**context, "prompt_image": image})
    assert (seen["pooled"] - plain["pooled"]).abs().amax(1).min() > 1e-4
    has = torch.tensor([True, False, True, False])
    mixed = conditioner({**context, "prompt_image": image, "has_prompt_image": has})
    torch.testing.assert_close(mixed["pooled"][has], seen["pooled"][has], atol=1e-5, rtol=0)
    torch.testing.assert_close(mixed["pooled"][~has], plain["pooled"][~has], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"\(1, 4, 4\) and should have \(1, 8, 8\)"):
        conditioner({**context, "prompt_image": image[..., :4, :4]})


def test_unconditional_is_the_null_prompt_and_keeps_the_image(context):
    conditioner = build()
    image = torch.rand(BATCH, 1, 8, 8)
    null = conditioner.unconditional({**context, "prompt_image": image})
    assert torch.equal(null["prompt_ids"], torch.zeros(BATCH, 1, dtype=torch.long))
    assert null["prompt_mask"].all()
    assert null["prompt_image"] is image
    pooled = conditioner(conditioner.unconditional(context))["pooled"]
    torch.testing.assert_close(pooled, pooled[:1].expand_as(pooled))
    formatted = build(null_prompt=(4, 5)).unconditional(context)
    assert torch.equal(formatted["prompt_ids"], torch.tensor([[4, 5]]).expand(BATCH, -1))


def test_guidance_adds_the_null_prompt_without_gradient(context):
    conditioner = build(guidance=True)
    out = conditioner(context)
    null = conditioner(conditioner.unconditional(context))
    for key in ("prompt_embeds", "pooled"):
        assert torch.equal(out[f"null_{key}"], null[key])
        assert out[key].requires_grad
        assert not out[f"null_{key}"].requires_grad


def test_errors_name_what_is_wrong(context):
    conditioner = build()
    with pytest.raises(ValueError, match="MetaQueryConditioner needs 'prompt_mask'"):
        conditioner({"prompt_ids": context["prompt_ids"]})
    with pytest.raises(ValueError, match="a row without any token"):
        conditioner({**context, "prompt_mask": torch.zeros(BATCH, 5, dtype=torch.bool)})
    with pytest.raises(ValueError, match="encoder.hidden is 16, the connector's encoder_hidden 8"):
        MetaQueryConditioner(SmallMultimodalEncoder(5, dim=16), MetaQueryConnector(2, 8, 8, 1, 2, 8, 4, 4))


def test_queries_go_on_after_the_highest_position_of_each_row():
    mask = torch.tensor([[True, True, False], [False, True, True]])
    positions = torch.tensor([[0, 1, 1], [0, 0, 1]])
    expected = torch.tensor([[0, 1, 1, 2, 3], [0, 0, 1, 2, 3]])
    assert torch.equal(continued(positions, mask, 2), expected)
    grid = torch.stack([positions, positions + 4, positions])
    assert torch.equal(continued(grid, mask, 1)[..., -1], torch.full((3, 2), 6))
