"""Stable Diffusion 3, tiny and randomly initialised, as a denoiser."""

from __future__ import annotations

import sys

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from regimen.models import SD3Denoiser, decode_latents, encode_images, sd3_sigmas

diffusers = pytest.importorskip("diffusers")
BATCH = 3


def transformer(**options) -> nn.Module:
    torch.manual_seed(0)
    settings = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 10,
        "pos_embed_max_size": 12,
        "qk_norm": "rms_norm",
        "dual_attention_layers": (0,),
    }
    return diffusers.SD3Transformer2DModel(**(settings | options)).eval()


@pytest.fixture
def model() -> SD3Denoiser:
    return SD3Denoiser(transformer())


@pytest.fixture
def x() -> Tensor:
    return torch.randn(BATCH, 4, 8, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def sigma() -> Tensor:
    return torch.tensor([0.1, 0.5, 1.0])


@pytest.fixture
def context() -> dict[str, Tensor]:
    torch.manual_seed(2)
    return {
        "prompt_embeds": torch.randn(BATCH, 5, 12),
        "pooled": torch.randn(BATCH, 10),
        "null_prompt_embeds": torch.randn(BATCH, 2, 12),
        "null_pooled": torch.randn(BATCH, 10),
        "reference": torch.randn(BATCH, 4, 8, 6),
        "has_reference": torch.tensor([True, False, True]),
    }


def without(context: dict[str, Tensor], *keys: str) -> dict[str, Tensor]:
    return {key: value for key, value in context.items() if key not in keys}


@torch.no_grad()
def test_without_a_reference_it_is_the_plain_transformer(model, x, sigma, context):
    expected = model.transformer(
        hidden_states=x,
        encoder_hidden_states=context["prompt_embeds"],
        pooled_projections=context["pooled"],
        timestep=1000 * sigma,
    ).sample
    plain = without(context, "reference", "has_reference")
    none = {**context, "has_reference": torch.zeros(BATCH, dtype=torch.bool)}
    for given in (plain, {**plain, "reference": None}, none, TensorDict(plain, [BATCH])):
        torch.testing.assert_close(model(x, sigma, given), expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_reference_tokens_are_a_second_image_in_front(model, x, sigma, context):
    """The same numbers through diffusers itself, with a patch embedding that also embeds the reference."""
    embed, reference = model.transformer.pos_embed, context["reference"]

    class Both(nn.Module):
        def forward(self, latent: Tensor) -> Tensor:
            return torch.cat([embed(reference), embed(latent)], dim=1)

    tall = transformer(pos_embed_max_size=24)
    tall.load_state_dict(
        {k: v for k, v in model.transformer.state_dict().items() if "pos_embed" not in k}, strict=False
    )
    tall.pos_embed = Both()
    read = []
    tall.proj_out.register_forward_hook(lambda module, args, out: read.append(out))
    with pytest.raises(RuntimeError):
        tall(x, context["prompt_embeds"], context["pooled"], 1000 * sigma)
    tokens = read[0][:, -12:].reshape(BATCH, 4, 3, 2, 2, 4)
    expected = torch.einsum("nhwpqc->nchpwq", tokens).reshape(BATCH, 4, 8, 6)
    found = model(x, sigma, without(context, "has_reference"))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_batch_may_mix_rows_with_and_without_reference(model, x, sigma, context):
    mixed, has = model(x, sigma, context), context["has_reference"]
    every = model(x, sigma, without(context, "has_reference"))
    none = model(x, sigma, without(context, "reference"))
    torch.testing.assert_close(mixed[has], every[has], atol=1e-5, rtol=0)
    torch.testing.assert_close(mixed[~has], none[~has], atol=1e-5, rtol=0)
    assert (every - none).abs().flatten(1).amax(1).min() > 1e-4


@torch.no_grad()
def test_rows_do_not_depend_on_each_other(model, x, sigma, context):
    batched = model(x, sigma, context)
    for i in range(BATCH):
        row = {key: value[i : i + 1] for key, value in context.items()}
        torch.testing.assert_close(model(x[i : i + 1], sigma[i : i + 1], row), batched[i : i + 1], atol=1e-5, rtol=0)


def test_gradients_reach_prompts_reference_and_weights(model, x, sigma, context):
    keys = ("prompt_embeds", "pooled", "reference")
    given = context | {key: context[key].clone().requires_grad_() for key in keys}
    model(x, sigma, given).square().sum().backward()
    assert all(given[key].grad.abs().sum() > 0 for key in keys)
    assert given["reference"].grad[1].abs().sum() == 0
    silent = [name for name, p in model.named_parameters() if p.grad is None]
    assert silent == []


def test_gradient_checkpointing_changes_nothing(model, x, sigma, context):
    plain = model(x, sigma, context)
    model.train().transformer.enable_gradient_checkpointing()
    checkpointed = model(x, sigma, context)
    torch.testing.assert_close(checkpointed, plain)
    checkpointed.sum().backward()
    assert model.transformer.proj_out.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_half_precision_weights_give_the_dtype_of_x(model, x, sigma, context):
    full = model(x, sigma, context)
    half = model.bfloat16()(x, sigma, context)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, atol=0.05, rtol=0.1)


def test_unconditional_swaps_the_prompt_and_keeps_the_reference(model, context):
    null = model.unconditional(context)
    assert null["prompt_embeds"] is context["null_prompt_embeds"]
    assert null["pooled"] is context["null_pooled"]
    assert null["reference"] is context["reference"]
    with pytest.raises(ValueError, match="SD3Denoiser.unconditional needs 'null_pooled'"):
        model.unconditional(without(context, "null_pooled"))


def test_errors_name_what_is_wrong(model, x, sigma, context):
    with pytest.raises(ValueError, match=r"\(3, 4, 4, 4\).*\(3, 4, 8, 6\)"):
        model(x, sigma, {**context, "reference": torch.zeros(BATCH, 4, 4, 4)})
    with pytest.raises(ValueError, match="SD3Denoiser needs 'pooled'"):
        model(x, sigma, without(context, "pooled"))
    with pytest.raises(ValueError, match=r"\(7, 6\) do not divide into patches of 2x2"):
        model(x[:, :, :7], sigma, without(context, "reference"))


@torch.no_grad()
def test_saved_and_loaded_denoisers_are_equal(model, x, sigma, context, tmp_path):
    expected = model(x, sigma, context)
    model.transformer.save_pretrained(tmp_path / "bare")
    model.transformer.save_pretrained(tmp_path / "pipeline" / "transformer")
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(tmp_path / "pipeline" / "scheduler")
    for folder in ("bare", "pipeline"):
        assert torch.equal(SD3Denoiser.from_pretrained(tmp_path / folder)(x, sigma, context), expected)
    assert SD3Denoiser.pretrained_shift(tmp_path / "pipeline") == 3.0


def perturbed(model: SD3Denoiser) -> SD3Denoiser:
    """Adapters start at no effect, B = 0; this gives them one."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    return model


def test_lora_trains_adapters_and_nothing_else(model, x, sigma, context):
    expected = model(x, sigma, context)
    model.lora(rank=2, alpha=4)
    torch.testing.assert_close(model(x, sigma, context), expected, atol=1e-6, rtol=0)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    for part in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
        assert any(f".{part}.lora_A" in name for name in trainable), part
    before = {name: p.detach().clone() for name, p in perturbed(model).named_parameters()}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    model(x, sigma, context).square().sum().backward()
    optimiser.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    # The last block discards its text stream, so the text queries of that block have no effect.
    unused = {name for name in trainable if "transformer_blocks.1.attn.add_q_proj" in name}
    assert moved == trainable - unused


@torch.no_grad()
def test_disabled_adapters_give_the_base_model(model, x, sigma, context):
    base = model(x, sigma, context)
    assert not model.has_adapters
    perturbed(model.lora(rank=2, alpha=4))
    assert model.has_adapters
    adapted = model(x, sigma, context)
    assert (adapted - base).abs().amax() > 1e-4
    frozen = next(p for name, p in model.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    with model.adapters_disabled():
        torch.testing.assert_close(model(x, sigma, context), base, atol=1e-6, rtol=0)
    assert torch.equal(model(x, sigma, context), adapted)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_gradient_survives_a_reference_pass_in_between(model, x, sigma, context):
    perturbed(model.lora(rank=2, alpha=4))
    adapted = model(x, sigma, context)
    with torch.no_grad(), model.adapters_disabled():
        base = model(x, sigma, context)
    (adapted - base).square().sum().backward()
    assert model.transformer.transformer_blocks[0].attn.to_q.lora_B["default"].weight.grad.abs().sum() > 0


def test_adapters_are_on_again_after_an_error(model):
    with pytest.raises(ValueError, match="no adapters"), model.adapters_disabled():
        pass
    model.lora(rank=2)
    with pytest.raises(KeyError), model.adapters_disabled():
        raise KeyError
    assert not model.transformer.transformer_blocks[0].attn.to_q.disable_adapters


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [4, 10, 40])
def test_sigmas_are_the_schedulers_and_differ_from_ours_as_documented(shift, steps):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    sigmas = sd3_sigmas(scheduler, steps)
    low = shift / (999 + shift)
    u = torch.linspace(1, low, steps)
    shifted = shift * u / (1 + (shift - 1) * u)
    torch.testing.assert_close(sigmas, torch.cat([shifted, torch.zeros(1)]), atol=1e-6, rtol=0)
    assert len(scheduler.sigmas) == 1000, "the scheduler that was handed in must stay as it was"
    ours = torch.linspace(1, 0, steps + 1)
    scheduler.set_timesteps(sigmas=ours[:-1].tolist())
    torch.testing.assert_close(scheduler.sigmas, shift * ours / (1 + (shift - 1) * ours), atol=1e-6, rtol=0)


def test_a_grid_per_resolution_is_refused():
    with pytest.raises(ValueError, match="use_dynamic_shifting"):
        sd3_sigmas(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 4)


@torch.no_grad()
def test_images_are_coded_with_the_autoencoders_scale_and_shift():
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=2, latent_channels=4, scaling_factor=1.5, shift_factor=0.06
    ).eval()
    latents = torch.randn(2, 4, 8, 8)
    image = decode_latents(vae, latents)
    expected = (vae.decode(latents / 1.5 + 0.06).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(image, expected)
    assert image.shape == (2, 3, 8, 8)
    coded = encode_images(vae, image)
    mean = vae.encode(2 * image - 1).latent_dist.mean
    torch.testing.assert_close(coded, (mean - 0.06) * 1.5)


def test_missing_extras_are_named_in_one_line(model, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setitem(sys.modules, "peft", None)
    for call in (SD3Denoiser.from_pretrained, SD3Denoiser.pretrained_shift):
        with pytest.raises(ImportError, match=r"needs diffusers: pip install 'regimen-rl\[diffusers\]'$"):
            call(tmp_path)
    with pytest.raises(ImportError, match=r"needs peft: pip install 'regimen-rl\[peft\]'$"):
        model.lora()
