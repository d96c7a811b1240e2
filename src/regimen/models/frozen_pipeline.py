"""What stands around the transformer of a pipeline of `diffusers`: text encoders and autoencoder, all frozen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from .sd3 import decode_latents, encode_images

KEPT = 512
EncodeText = Callable[[str, str], tuple[Tensor, Tensor]]
"""A text and a device to prompt tokens `[L, D]` and a pooled prompt `[P]`."""


class FrozenPipeline:
    """A pipeline's frozen parts, applied to texts and images that are named by their place in a list.

    What was computed for the last few hundred texts and images is kept. The parts move to the device that they are
    used on; copies of a policy share them, and no checkpoint holds them.

    Args:
        encode_text: the text encoders.
        vae: a `diffusers.AutoencoderKL`.
        texts, paths: what the numbers mean; image files are cropped to a square and resized.
        resolution: side of the images.
        shift: of the sampling grid.
        decode_batch: images decoded at once.
    """

    def __init__(
        self,
        encode_text: EncodeText,
        vae: Any,
        texts: Sequence[str],
        paths: Sequence[Path],
        resolution: int,
        shift: float,
        decode_batch: int = 4,
    ) -> None:
        self.encoder, self.vae, self.shift = encode_text, vae.requires_grad_(False).eval(), shift
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        if resolution % factor:
            raise ValueError(f"resolution {resolution} is not a multiple of {factor}, the autoencoder's factor")
        self.latent_size = (resolution // factor, resolution // factor)
        self.texts, self.paths, self.resolution, self.decode_batch = texts, paths, resolution, decode_batch
        self._text = lru_cache(KEPT)(encode_text)
        self._image, self._latent = lru_cache(KEPT)(self._load), lru_cache(KEPT)(self._encode_image)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    @torch.no_grad()
    def prompts(self, rows: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """`prompt_embeds [B, L, D]` and `pooled [B, P]` of texts by number; -1 is the empty text."""
        encoded = [self._text(self.texts[row] if row >= 0 else "", str(device)) for row in rows]
        prompts, pooled = zip(*encoded, strict=True)
        return torch.stack(prompts), torch.stack(pooled)

    def images(self, rows: Sequence[int], device: torch.device) -> Tensor:
        """Images `[B, 3, H, W]` in [0, 1] by number; -1 is black."""
        return torch.stack([self._image(row) for row in rows]).to(device)

    def latents(self, rows: Sequence[int], device: torch.device) -> Tensor:
        """Latents `[B, C, h, w]` of images by number."""
        return torch.stack([self._latent(row, str(device)) for row in rows])

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents `[B, C, h, w]` of images `[B, 3, H, W]` in [0, 1], a few at a time."""
        vae = self.vae.to(images.device)
        return torch.cat([encode_images(vae, part) for part in images.split(self.decode_batch)])

    def decode(self, latents: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [0, 1] of latents `[B, C, h, w]`, a few at a time; differentiable."""
        vae = self.vae.to(latents.device)
        return torch.cat([decode_latents(vae, part) for part in latents.split(self.decode_batch)])

    def _load(self, row: int) -> Tensor:
        if row < 0:
            return torch.zeros(3, self.resolution, self.resolution)
        import numpy as np
        from PIL import Image, ImageOps

        size = (self.resolution, self.resolution)
        with Image.open(self.paths[row]) as file:
            picture = np.asarray(ImageOps.fit(file.convert("RGB"), size))
        return torch.from_numpy(picture.copy()).permute(2, 0, 1).float() / 255

    def _encode_image(self, row: int, device: str) -> Tensor:
        if row < 0:
            return torch.zeros(self.vae.config.latent_channels, *self.latent_size, device=device)
        return self.encode(self._image(row).to(device)[None])[0]
