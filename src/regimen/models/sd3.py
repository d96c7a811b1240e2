"""Stable Diffusion 3 as a denoiser, with reference images, adapters, sampling grid and image codec.

Nothing here imports `diffusers` or `peft` until it is needed: models are handed in as objects.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from .adapters import ATTENTION_PROJECTIONS, adapters_disabled, add_adapters, has_adapters
from .conditioning import Context, null_prompts, reference_of, required


class SD3Denoiser(nn.Module):
    """A `diffusers` SD3 transformer that predicts the velocity, noise - data, of latents.

    Kontext conditioning (Wei et al. 2025): reference latents go through the same patch and positional
    embedding as the noisy latents, their tokens stand in front, the transformer's own blocks attend to all,
    and only the last h*w tokens are read out. Without a reference this is the plain transformer. Since its
    blocks take no attention mask, a batch in which only some rows have a reference runs as two.

    Context keys: `prompt_embeds [B, L, Dp]`, `pooled [B, Dq]`; for `unconditional` `null_prompt_embeds [B,
    L', Dp]` and `null_pooled [B, Dq]`; optional `reference [B, C, H, W]` latents and `has_reference` bool
    `[B]`.

    Args:
        transformer: a `diffusers.SD3Transformer2DModel`.
    """

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer: Any = transformer

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> Self:
        """Load the transformer of a pipeline's folder or hub name, or a bare transformer's folder.

        `options` go to `SD3Transformer2DModel.from_pretrained` (such as `torch_dtype`).

        Raises:
            ImportError: diffusers is not installed.
        """
        try:
            from diffusers import SD3Transformer2DModel
        except ImportError as error:
            raise ImportError(_missing("SD3Denoiser.from_pretrained", "diffusers")) from error
        folder = Path(path)
        if folder.is_dir() and not (folder / "transformer").is_dir():
            return cls(SD3Transformer2DModel.from_pretrained(path, **options))
        return cls(SD3Transformer2DModel.from_pretrained(path, subfolder="transformer", **options))

    @staticmethod
    def pretrained_shift(path: str | Path) -> float:
        """The sampling grid's shift that a pipeline's folder or hub name prescribes (3 for SD3 and SD3.5).

        Raises:
            ImportError: diffusers is not installed.
        """
        try:
            from diffusers import FlowMatchEulerDiscreteScheduler
        except ImportError as error:
            raise ImportError(_missing("SD3Denoiser.pretrained_shift", "diffusers")) from error
        return float(FlowMatchEulerDiscreteScheduler.from_pretrained(path, subfolder="scheduler").shift)

    def forward(self, x: Tensor, sigma: Tensor, context: Context) -> Tensor:
        """Velocity `[B, C, H, W]` at latents `x [B, C, H, W]` and noise level `sigma [B]` (1 = noise), in
        x's dtype.

        Raises:
            ValueError: `x` does not divide into patches, the reference is of another size, or a key is
                missing.
        """
        prompts = required(context, "prompt_embeds", "SD3Denoiser")
        pooled = required(context, "pooled", "SD3Denoiser")
        patch = self.transformer.config.patch_size
        if x.shape[2] % patch or x.shape[3] % patch:
            raise ValueError(f"latents of {tuple(x.shape[2:])} do not divide into patches of {patch}x{patch}")
        reference, has = reference_of(context, x)
        if reference is None or has is None:
            return self._velocity(x, sigma, prompts, pooled, reference)
        velocity = torch.empty_like(x)
        for rows, images in ((has, reference), (~has, None)):
            if bool(rows.any()):
                given = None if images is None else images[rows]
                velocity[rows] = self._velocity(x[rows], sigma[rows], prompts[rows], pooled[rows], given)
        return velocity

    def unconditional(self, context: Context) -> Context:
        """The context with the null prompt in the prompt's place; the reference stays."""
        return null_prompts(context, "SD3Denoiser")

    def lora(self, rank: int = 32, alpha: float = 64) -> Self:
        """Freeze the weights and add LoRA adapters to all attention projections; returns self.

        Adapters start at zero effect (gaussian A, zero B). Rank and alpha default to Flow-GRPO's.

        Raises:
            ImportError: peft is not installed.
        """
        add_adapters(self.transformer, rank, alpha, ATTENTION_PROJECTIONS, "SD3Denoiser.lora")
        return self

    @property
    def has_adapters(self) -> bool:
        """Whether `lora` has added adapters (without any, `adapters_disabled` raises ValueError)."""
        return has_adapters(self.transformer)

    def adapters_disabled(self) -> AbstractContextManager[None]:
        """Within the context, the denoiser computes with its base weights: a reference policy at no memory.

        Raises:
            ValueError: there are no adapters.
        """
        return adapters_disabled(self.transformer, "SD3Denoiser")

    def _velocity(self, x: Tensor, sigma: Tensor, prompts: Tensor, pooled: Tensor, reference: Tensor | None) -> Tensor:
        model = self.transformer
        dtype = model.pos_embed.proj.weight.dtype
        images = [x] if reference is None else [reference, x]
        parts = [model.pos_embed(image.to(dtype)) for image in images]
        tokens, text = torch.cat(parts, dim=1), model.context_embedder(prompts.to(dtype))
        time = model.time_text_embed(1000 * sigma, pooled.to(dtype))
        checkpointed = model.gradient_checkpointing and torch.is_grad_enabled()
        for block in model.transformer_blocks:
            if checkpointed:
                text, tokens = model._gradient_checkpointing_func(block, tokens, text, time)
            else:
                text, tokens = block(hidden_states=tokens, encoder_hidden_states=text, temb=time)
        patches = model.proj_out(model.norm_out(tokens[:, -parts[-1].shape[1] :], time))
        return self._unpatchified(patches, x).to(x.dtype)

    def _unpatchified(self, patches: Tensor, x: Tensor) -> Tensor:
        patch = self.transformer.config.patch_size
        batch, _, height, width = x.shape
        grid = patches.reshape(batch, height // patch, width // patch, patch, patch, -1)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, height, width)


def sd3_sigmas(scheduler: Any, steps: int) -> Tensor:
    """The noise levels `[steps + 1]`, from 1 down to 0, on which a `diffusers` pipeline would sample.

    `scheduler` is a `FlowMatchEulerDiscreteScheduler`; it is not changed. Its grid is s u / (1 + (s - 1) u)
    with shift s, as ours is, but on another u. Ours is u = 1 - i / N. Theirs spaces the first N levels of u
    evenly from 1 to m = s / (999 + s), which is 1/1000 already shifted once, and then appends 0. So their
    last level above 0 is s m / (1 + (s - 1) m), 0.009 for s = 3 whatever N (ours is 0.5 for N = 4), and their
    last step hardly moves. Use these levels to sample as a pipeline does; to train with few steps use
    `shifted_sigmas(steps, SD3Denoiser.pretrained_shift(path))`.

    Raises:
        ValueError: the scheduler shifts by resolution (`use_dynamic_shifting`), so it has no single grid.
    """
    if scheduler.config.use_dynamic_shifting:
        raise ValueError("sd3_sigmas: a scheduler with use_dynamic_shifting has a grid per resolution")
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    sigmas: Tensor = scheduler.sigmas
    return sigmas


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Images `[B, 3, 8H, 8W]` in [0, 1] of latents `[B, C, H, W]`, by a `diffusers.AutoencoderKL`."""
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    image: Tensor = vae.decode((latents / scale + shift).to(vae.dtype)).sample
    return (image / 2 + 0.5).clamp(0, 1).to(latents.dtype)


def encode_images(vae: Any, images: Tensor) -> Tensor:
    """Latents `[B, C, H, W]` (the encoder's mode) of images `[B, 3, 8H, 8W]` in [0, 1]; for references."""
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    mode: Tensor = vae.encode((2 * images - 1).to(vae.dtype)).latent_dist.mode()
    latents: Tensor = (mode - shift) * scale
    return latents.to(images.dtype)


def _missing(owner: str, package: str) -> str:
    return f"{owner} needs {package}: pip install 'regimen-rl[{package}]'"
