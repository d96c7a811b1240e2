"""What stands around FLUX.1 Fill's transformer: text encoders, autoencoder and masks, all frozen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .conditioning import Context, replaced, required
from .frozen_pipeline import FrozenPipeline


class FluxTexts:
    """The two text encoders of a `diffusers.FluxFillPipeline`, as its `encode_prompt` uses them."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        for module in (pipeline.text_encoder, pipeline.text_encoder_2):
            module.requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, text: str, device: str) -> tuple[Tensor, Tensor]:
        """Prompt tokens `[L, D]` and pooled prompt `[P]`."""
        for module in (self.pipeline.text_encoder, self.pipeline.text_encoder_2):
            module.to(device)
        prompts, pooled, _ = self.pipeline.encode_prompt(text, device=torch.device(device))
        return prompts[0], pooled[0]


def frozen_flux(
    path: str | Path, texts: Sequence[str], paths: Sequence[Path], resolution: int, dtype: torch.dtype
) -> FrozenPipeline:
    """The frozen parts of a FLUX.1 Fill pipeline's folder or hub name.

    The grid's shift is that which its scheduler prescribes for the resolution.

    Raises:
        ImportError: diffusers is not installed.
    """
    try:
        from diffusers import FluxFillPipeline
        from diffusers.pipelines.flux.pipeline_flux_fill import calculate_shift
    except ImportError as error:
        raise ImportError("PicturesWorld needs diffusers: pip install 'regimen-rl[diffusers]'") from error
    pipeline = FluxFillPipeline.from_pretrained(path, torch_dtype=dtype, transformer=None)
    frozen = FrozenPipeline(FluxTexts(pipeline), pipeline.vae, texts, paths, resolution, 1.0)
    # Backpropagating through the decoder would else keep all that it computes.
    pipeline.vae.enable_gradient_checkpointing()
    c, (height, width) = pipeline.scheduler.config, frozen.latent_size
    tokens = height // 2 * (width // 2)
    range_of_shifts = c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift
    frozen.shift = math.exp(calculate_shift(tokens, *range_of_shifts)) if c.use_dynamic_shifting else float(c.shift)
    return frozen


class FluxFillConditioner(nn.Module):
    """Adds what `FluxFillDenoiser` reads to contexts of numbers.

    They are `prompt` and `source`, int64 `[B]`: a text and a picture of the frozen pipeline; `mask_file`, int64 `[B]`:
    another picture, white where pixels are to be made, or -1; then the mask is `box [B, 4]`: top, bottom, left and
    right edge as shares of the picture. Added are `masked` (latents of the picture, grey inside the mask), `mask`, the
    prompt's embeddings and those of the negative prompt. It has no weights of its own.

    Args:
        frozen: the pipeline.
        negative: number of the negative prompt, -1 for the empty text.
    """

    def __init__(self, frozen: FrozenPipeline, negative: int = -1) -> None:
        super().__init__()
        self.frozen, self.negative = frozen, negative

    def mask(self, context: Context) -> Tensor:
        """`[B, 1, H, W]`, 1 where pixels are to be made."""
        number, box = (required(context, key, "FluxFillConditioner") for key in ("mask_file", "box"))
        drawn = self.frozen.images(number.tolist(), box.device)[:, :1] > 0.5
        side = torch.arange(self.frozen.resolution, device=box.device).add(0.5) / self.frozen.resolution
        top, bottom, left, right = box.view(-1, 4, 1).unbind(1)
        rows, columns = (side >= top) & (side < bottom), (side >= left) & (side < right)
        inside = rows[:, None, :, None] & columns[:, None, None, :]
        return torch.where((number >= 0).view(-1, 1, 1, 1), drawn, inside).float()

    def pictures(self, context: Context) -> Tensor:
        """The pictures to be changed, `[B, 3, H, W]` in [0, 1]."""
        source = required(context, "source", "FluxFillConditioner")
        return self.frozen.images(source.tolist(), source.device)

    def forward(self, context: Context) -> Context:
        """The context with the entries above added."""
        prompt, mask = required(context, "prompt", "FluxFillConditioner"), self.mask(context)
        prompt_embeds, pooled = self.frozen.prompts(prompt.tolist(), prompt.device)
        null_embeds, null_pooled = self.frozen.prompts([self.negative], prompt.device)
        return replaced(
            context,
            masked=self.frozen.encode(torch.where(mask > 0, 0.5, self.pictures(context))),
            mask=mask,
            prompt_embeds=prompt_embeds,
            pooled=pooled,
            null_prompt_embeds=null_embeds.expand_as(prompt_embeds),
            null_pooled=null_pooled.expand_as(pooled),
        )
