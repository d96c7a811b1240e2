"""What stands around Stable Diffusion 3, tiny and randomly initialised, loaded from a pipeline's folder."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensordict import TensorDict
from torch import Tensor, nn

import tiny_models
from regimen.models import SD3Denoiser
from regimen.models.frozen_pipeline import FrozenPipeline
from regimen.models.sd3_pipeline import SD3Conditioner, frozen_sd3, save_only_trained

diffusers = pytest.importorskip("diffusers")

CPU = torch.device("cpu")
TEXTS = ["a red cat", "two dogs beside a bench and so on"]
SIZE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipeline")
    tiny_models.sd3_pipeline().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A wide picture, red in its middle square and black beside it; and a small green one with transparency."""
    path = tmp_path_factory.mktemp("images")
    wide = Image.new("RGB", (96, 32))
    wide.paste((255, 0, 0), (32, 0, 64, 32))
    wide.save(path / "wide.png")
    Image.new("RGBA", (5, 5), (0, 255, 0, 255)).save(path / "small.png")
    return [path / "wide.png", path / "small.png"]


@pytest.fixture(scope="module")
def frozen(folder: Path, paths: list[Path]) -> FrozenPipeline:
    return frozen_sd3(folder, TEXTS, paths, SIZE, torch.float32)


# Texts


@torch.no_grad()
def test_texts_are_encoded_as_the_pipeline_does(folder: Path, frozen: FrozenPipeline) -> None:
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(folder)
    embeds, pooled = frozen.prompts([0, 1, -1], CPU)
    for row, text in enumerate([*TEXTS, ""]):
        expected, _, expected_pooled, _ = pipeline.encode_prompt(text, None, None, do_classifier_free_guidance=False)
        torch.testing.assert_close(embeds[row], expected[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(pooled[row], expected_pooled[0], atol=1e-5, rtol=1e-4)
    assert embeds.shape == (3, 77 + 256, 24)
    assert pooled.shape == (3, 10)
    assert not torch.allclose(embeds[0], embeds[1])


@torch.no_grad()
def test_a_missing_third_encoder_is_zeros_as_in_the_pipeline(tmp_path: Path) -> None:
    """SD3 is often loaded without T5, which is its largest part."""
    pipeline = tiny_models.sd3_pipeline()
    pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipeline.save_pretrained(tmp_path)
    frozen = frozen_sd3(tmp_path, TEXTS, [], SIZE, torch.float32)
    embeds, pooled = frozen.prompts([0], CPU)
    expected, _, expected_pooled, _ = pipeline.encode_prompt(TEXTS[0], None, None, do_classifier_free_guidance=False)
    torch.testing.assert_close(embeds, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pooled, expected_pooled, atol=1e-5, rtol=1e-4)
    assert not embeds[:, 77:].any()


def test_a_pipeline_without_text_encoders_is_loaded(tmp_path: Path) -> None:
    tiny_models.sd3_pipeline(encoders=False).save_pretrained(tmp_path)
    frozen = frozen_sd3(tmp_path, TEXTS, [], SIZE, torch.float32)
    embeds, pooled = frozen.prompts([0, -1], CPU)
    assert embeds.shape == (2, 77 + 256, 24)
    assert pooled.shape == (2, 10)
    assert not embeds.any()
    assert not pooled.any()


def test_a_missing_clip_leaves_zeros_in_its_place(frozen: FrozenPipeline) -> None:
    encoder: Any = frozen.encoder
    alone = copy.copy(encoder)
    alone.clips = [encoder.clips[0], (None, None)]
    one, pooled = alone(TEXTS[0], "cpu")
    both, both_pooled = encoder(TEXTS[0], "cpu")
    torch.testing.assert_close(pooled[:4], both_pooled[:4])
    assert not pooled[4:].any()
    torch.testing.assert_close(one[:77, :8], both[:77, :8])
    assert not one[:77, 8:].any()
    torch.testing.assert_close(one[77:], both[77:])


# Images


def test_pictures_are_cropped_to_their_middle_square(frozen: FrozenPipeline) -> None:
    wide, small, none = frozen.images([0, 1, -1], CPU)
    assert wide.shape == (3, SIZE, SIZE)
    torch.testing.assert_close(wide, torch.tensor([1.0, 0, 0])[:, None, None].expand_as(wide), atol=0.1, rtol=0)
    torch.testing.assert_close(small, torch.tensor([0.0, 1, 0])[:, None, None].expand_as(small), atol=0.02, rtol=0)
    assert not none.any()


@torch.no_grad()
def test_latents_are_the_autoencoders(frozen: FrozenPipeline) -> None:
    latents = frozen.latents([0, -1, 0], CPU)
    assert frozen.latent_size == (SIZE // 4, SIZE // 4)
    assert latents.shape == (3, 4, *frozen.latent_size)
    assert not latents[1].any()
    assert torch.equal(latents[0], latents[2])
    mode = frozen.vae.encode(2 * frozen.images([0], CPU) - 1).latent_dist.mode()
    torch.testing.assert_close(latents[:1], (mode - 0.06) * 1.5)


@torch.no_grad()
def test_decoding_a_few_at_a_time_changes_nothing(frozen: FrozenPipeline) -> None:
    latents = torch.randn(7, 4, *frozen.latent_size, generator=torch.Generator().manual_seed(0))
    images = frozen.decode(latents)
    assert images.shape == (7, 3, SIZE, SIZE)
    expected = (frozen.vae.decode(latents / 1.5 + 0.06).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images, expected)


def test_what_was_computed_is_kept(
    folder: Path, frozen: FrozenPipeline, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = frozen_sd3(folder, TEXTS, paths, SIZE, torch.float32)
    latents = fresh.latents([0], CPU)
    embeds, _ = fresh.prompts([0], CPU)
    monkeypatch.setattr(fresh, "vae", None)
    monkeypatch.setattr(fresh.encoder, "clips", None)
    assert torch.equal(fresh.latents([0], CPU), latents)
    assert torch.equal(fresh.prompts([0], CPU)[0], embeds)
    with pytest.raises(AttributeError):
        fresh.latents([1], CPU)
    assert torch.equal(frozen.latents([0], CPU), latents)


def test_the_grids_shift_is_the_schedulers(frozen: FrozenPipeline) -> None:
    assert frozen.shift == 3.0


def test_half_precision_parts_are_loaded_as_asked(folder: Path, paths: list[Path]) -> None:
    frozen = frozen_sd3(folder, TEXTS, paths, SIZE, torch.bfloat16)
    assert frozen.vae.dtype == torch.bfloat16
    embeds, pooled = frozen.prompts([0], CPU)
    assert embeds.dtype == pooled.dtype == torch.bfloat16
    latents = frozen.latents([0, -1], CPU)
    assert frozen.decode(latents).dtype == latents.dtype == torch.float32


def test_wrong_resolutions_are_named(folder: Path) -> None:
    with pytest.raises(ValueError, match="resolution 18 is not a multiple of 4, the autoencoder's factor"):
        frozen_sd3(folder, TEXTS, [], 18, torch.float32)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"needs diffusers: pip install 'regimen-rl\[diffusers\]'$"):
        frozen_sd3(tmp_path, TEXTS, [], SIZE, torch.float32)


# The conditioner


def contexts(prompt: list[int], source: list[int]) -> TensorDict:
    table = {"prompt": torch.tensor(prompt), "source": torch.tensor(source)}
    return TensorDict(table, batch_size=[len(prompt)])


def test_conditioner_adds_what_the_denoiser_reads(frozen: FrozenPipeline, folder: Path) -> None:
    given = contexts([1, 0, 1], [0, -1, 1])
    out = SD3Conditioner(frozen)(given)
    embeds, pooled = frozen.prompts([1, 0, 1], CPU)
    assert torch.equal(out["prompt_embeds"], embeds)
    assert torch.equal(out["pooled"], pooled)
    null, null_pooled = frozen.prompts([-1], CPU)
    assert torch.equal(out["null_prompt_embeds"][2], null[0])
    assert torch.equal(out["null_pooled"][0], null_pooled[0])
    assert out["has_reference"].tolist() == [True, False, True]
    assert torch.equal(out["reference"], frozen.latents([0, -1, 1], CPU))
    assert sorted(given.keys()) == ["prompt", "source"]
    denoiser = SD3Denoiser.from_pretrained(folder)
    x, sigma = torch.randn(3, 4, *frozen.latent_size), torch.rand(3)
    velocity = denoiser(x, sigma, out)
    assert velocity.shape == x.shape
    assert not torch.allclose(velocity, denoiser(x, sigma, denoiser.unconditional(out)))
    with pytest.raises(ValueError, match="SD3Conditioner needs 'source'"):
        SD3Conditioner(frozen)(given.exclude("source"))


def test_conditioner_has_no_weights_and_copies_share_the_frozen_parts(frozen: FrozenPipeline) -> None:
    conditioner = SD3Conditioner(frozen)
    assert list(conditioner.parameters()) == []
    assert conditioner.state_dict() == {}
    assert copy.deepcopy(conditioner).frozen is frozen
    encoder: Any = frozen.encoder
    assert not any(p.requires_grad for module in (frozen.vae, encoder.t5[1]) for p in module.parameters())


# Saving


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.adapter = nn.Linear(2, 2), nn.Linear(2, 2)
        # A table of positions, say, which may be larger than all adapters.
        self.base.register_buffer("table", torch.zeros(3))
        self.base.requires_grad_(False)
        self.register_buffer("count", torch.zeros(1))


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def test_only_trained_weights_are_saved_and_others_stay() -> None:
    one, other = save_only_trained(Pair()), save_only_trained(Pair())
    base = values(other)
    assert sorted(one.state_dict()) == ["adapter.bias", "adapter.weight", "count"]
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.adapter.weight, one.adapter.weight)
    assert torch.equal(other.base.weight, base["base.weight"])


def test_what_is_saved_does_not_change_when_training_stops() -> None:
    module = save_only_trained(Pair())
    module.requires_grad_(False)
    assert "adapter.weight" in module.state_dict()
    assert "base.weight" not in module.state_dict()


def test_a_part_of_a_larger_module_and_a_copy_save_alike() -> None:
    whole: Any = nn.ModuleDict({"policy": save_only_trained(Pair()), "head": nn.Linear(1, 1)})
    assert sorted(k for k in whole.state_dict() if k.startswith("policy")) == [
        "policy.adapter.bias", "policy.adapter.weight", "policy.count",
    ]  # fmt: skip
    assert sorted(copy.deepcopy(whole["policy"]).state_dict()) == sorted(whole["policy"].state_dict())
    whole.load_state_dict(whole.state_dict())


def test_a_missing_adapter_is_still_an_error() -> None:
    module = save_only_trained(Pair())
    state = {k: v for k, v in module.state_dict().items() if k != "adapter.bias"}
    with pytest.raises(RuntimeError, match="adapter.bias"):
        module.load_state_dict(state)
