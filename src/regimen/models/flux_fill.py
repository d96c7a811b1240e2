"""FLUX.1 Fill as a denoiser: the base that OneReward trains.

Nothing here imports `diffusers` until it is needed.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from .adapters import ATTENTION_PROJECTIONS, adapters_disabled, add_adapters, has_adapters
from .conditioning import Context, null_prompts, required
from .inpainting import check_mask


class FluxFillDenoiser(nn.Module):
    """A `diffusers` FLUX transformer that predicts the velocity, noise - data, of latents inside a mask.

    As `FluxFillPipeline` does, latents, masked latents and mask stand side by side as channels of tokens of 2 x 2
    latents; the mask is given in pixels, of which each latent takes its square. Nothing is pasted back.

    Context keys: `masked [B, C, H, W]`, latents of the masked image; `mask [B, 1, fH, fW]` in pixels, 1 where pixels
    are to be made; `prompt_embeds [B, L, D]` and `pooled [B, P]`; for `unconditional` `null_prompt_embeds` and
    `null_pooled`.
    """

    def __init__(self, transformer: nn.Module, guidance: float = 1.0) -> None:
        """Make a denoiser.

        Args:
            transformer: a `diffusers.FluxTransformer2DModel` of a fill model.
            guidance: the number that a distilled model is told (`guidance_scale`); it is not classifier-free guidance.
        """
        super().__init__()
        self.transformer: Any = transformer
        self.guidance = guidance

    @classmethod
    def from_pretrained(cls, path: str | Path, guidance: float = 1.0, **options: Any) -> Self:
        """Load the transformer of a pipeline's folder or hub name; `options` go to its `from_pretrained`.

        Raises:
            ImportError: diffusers is not installed.
        """
        try:
            from diffusers import FluxTransformer2DModel
        except ImportError as error:
            raise ImportError(
                "FluxFillDenoiser.from_pretrained needs diffusers: pip install 'regimen-rl[diffusers]'"
            ) from error
        return cls(FluxTransformer2DModel.from_pretrained(path, subfolder="transformer", **options), guidance)

    def lora(self, rank: int = 32, alpha: float = 64) -> Self:
        """Freeze the weights and add LoRA adapters to all attention projections; returns self.

        Raises:
            ImportError: peft is not installed.
        """
        add_adapters(self.transformer, rank, alpha, ATTENTION_PROJECTIONS, "FluxFillDenoiser.lora")
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
        return adapters_disabled(self.transformer, "FluxFillDenoiser")

    def forward(self, x: Tensor, sigma: Tensor, context: Context) -> Tensor:
        """Velocity `[B, C, H, W]` at latents `x [B, C, H, W]`, `H` and `W` even, and noise level `sigma [B]`.

        Raises:
            ValueError: a key is missing, or the mask is not of zeros and ones for every pixel.
        """
        masked, mask, prompts, pooled = (
            required(context, key, "FluxFillDenoiser") for key in ("masked", "mask", "prompt_embeds", "pooled")
        )
        model, height, width = self.transformer, x.shape[2], x.shape[3]
        factor = mask.shape[2] // height
        check_mask(mask, x.new_empty(len(x), 1, factor * height, factor * width))
        squares = mask.unflatten(3, (width, factor)).unflatten(2, (height, factor)).permute(0, 1, 3, 5, 2, 4)
        seen = torch.cat([x, masked.to(x.dtype), squares.flatten(1, 3).to(x.dtype)], 1)
        # In the order of the pipeline: latents and masked latents first, each packed by itself.
        channels = x.shape[1], x.shape[1], factor**2
        tokens = torch.cat([packed(part) for part in seen.split(channels, 1)], 2).to(model.dtype)
        guidance = torch.full((len(x),), self.guidance, device=x.device) if model.config.guidance_embeds else None
        said = model(
            hidden_states=tokens,
            timestep=sigma.to(tokens.dtype),
            guidance=guidance,
            pooled_projections=pooled.to(tokens.dtype),
            encoder_hidden_states=prompts.to(tokens.dtype),
            txt_ids=x.new_zeros(prompts.shape[1], 3),
            img_ids=places(height // 2, width // 2).to(x.device, x.dtype),
            return_dict=False,
        )[0]
        return unpacked(said, height, width).to(x.dtype)

    def unconditional(self, context: Context) -> Context:
        """The context with the null prompt in the prompt's place."""
        return null_prompts(context, "FluxFillDenoiser")


def packed(latents: Tensor) -> Tensor:
    """Latents `[B, C, H, W]` as tokens `[B, H/2 * W/2, 4 C]`, of 2 x 2 each."""
    tokens = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5)
    return tokens.flatten(3).flatten(1, 2)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens `[B, H/2 * W/2, 4 C]` as latents `[B, C, H, W]`."""
    latents = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (height // 2, width // 2)).permute(0, 3, 1, 4, 2, 5)
    return latents.flatten(4).flatten(2, 3)


def places(height: int, width: int) -> Tensor:
    """Row and column of each token, `[height * width, 3]`, with 0 first."""
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], 2).flatten(0, 1)
