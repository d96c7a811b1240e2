"""Denoisers that fill in a mask and leave the rest of an image alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .conditioning import Context, required


def paste(image: Tensor, original: Tensor, mask: Tensor) -> Tensor:
    """`mask * image + (1 - mask) * original`: what was made, inside the mask, and the original around it.

    Args:
        image, original: `[B, C, H, W]`.
        mask: `[B, 1, H, W]`, 1 where pixels are made.

    Raises:
        ValueError: see `check_mask`.
    """
    check_mask(mask, image)
    return torch.where(mask.bool(), image, original)


def check_mask(mask: Tensor, image: Tensor) -> None:
    """Raise `ValueError` unless a mask is `[B, 1, H, W]` of zeros and ones, for images `[B, C, H, W]`."""
    expected = [len(image), 1, *image.shape[2:]]
    if list(mask.shape) != expected:
        raise ValueError(f"mask has size {list(mask.shape)}, expected {expected} for images {list(image.shape)}")
    if not bool(((mask == 0) | (mask == 1)).all()):
        odd = mask[(mask != 0) & (mask != 1)]
        raise ValueError(f"mask holds {float(odd[0]):g}; expected 1 where pixels are to be made and 0 elsewhere")


class InpaintingDenoiser(nn.Module):
    """A denoiser of `2 C + 1` channels, told a masked image and its mask, as a denoiser of `C` channels.

    The network sees the noisy image, the masked image and the mask as channels (as FLUX.1 Fill does), and its first `C`
    channels are the velocity. Outside the mask the velocity is the one that leads to the image's own pixels, `(x -
    image) / sigma`: samples and one-step predictions alike have them, as if they were pasted back.

    Context keys beside those of the network: `masked [B, C, H, W]`, the image with 0 inside the mask; `mask [B, 1, H,
    W]`, 1 where pixels are to be made.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser: Any = denoiser

    def forward(self, x: Tensor, sigma: Tensor, context: Context) -> Tensor:
        """Velocity `[B, C, H, W]` at `x [B, C, H, W]` and noise level `sigma [B]`; `ValueError` as `check_mask`."""
        masked, mask = (required(context, key, "InpaintingDenoiser") for key in ("masked", "mask"))
        check_mask(mask, x)
        made: Tensor = self.denoiser(torch.cat([x, masked, mask.to(x.dtype)], 1), sigma, context)[:, : x.shape[1]]
        return paste(made, (x - masked) / sigma.view(-1, 1, 1, 1), mask)

    def unconditional(self, context: Context) -> Context:
        """The network's; masked image and mask stay."""
        null: Context = self.denoiser.unconditional(context)
        return null
