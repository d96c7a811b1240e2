"""The small, fast denoiser of the built-in image tasks."""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conditioning import Context, embed_condition, null_condition, reference_of, required
from .layers import SigmaEmbedding


class MLPDenoiser(nn.Module):
    """Residual MLP that predicts a rectified flow's velocity, noise - data, of small images.

    The input is the flattened image, the flattened reference image (0 where a row has none) and a flag that
    tells whether there is one. Each block adds silu(scale * linear(h) + shift) to h; scale and shift (FiLM,
    Perez et al. 2018) are a function of noise level and condition. The last layer starts at zero.

    Context keys: `condition` int64 `[B]` in [0, conditions], where `conditions` is the null condition;
    optional `reference [B, C, H, W]` and `has_reference` bool `[B]`.

    Args:
        shape: image size (C, H, W).
        conditions: number of classes or operations, without the null condition.
        width: units per layer.
        blocks: residual blocks.
        embedding: units of the noise-level and condition embedding.
    """

    def __init__(
        self,
        shape: tuple[int, int, int] = (1, 8, 8),
        conditions: int = 14,
        width: int = 256,
        blocks: int = 3,
        embedding: int = 32,
    ) -> None:
        super().__init__()
        self.shape, self.conditions, size = tuple(shape), conditions, prod(shape)
        self.sigma = SigmaEmbedding(embedding)
        self.condition = nn.Embedding(conditions + 1, embedding)
        self.film = nn.Linear(embedding, 2 * blocks * width)
        self.inp = nn.Linear(2 * size + 1, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.out = nn.Linear(width, size)
        nn.init.normal_(self.condition.weight, std=0.5)
        nn.init.zeros_(self.film.weight)
        with torch.no_grad():
            self.film.bias.copy_(torch.tensor([1.0, 0.0]).repeat_interleave(blocks * width))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, sigma: Tensor, context: Context) -> Tensor:
        """Velocity `[B, C, H, W]` at `x [B, C, H, W]` and noise level `sigma [B]` (1 = noise).

        Raises:
            ValueError: `x` or the reference is of the wrong size, or `condition` is missing or out of
                range.
        """
        if x.shape[1:] != self.shape:
            raise ValueError(f"x has size {tuple(x.shape)}; a sample should have {self.shape}")
        condition = embed_condition(self.condition, required(context, "condition", "MLPDenoiser"))
        modulation = self.film(F.silu(self.sigma(sigma) + condition)).chunk(2 * len(self.blocks), dim=1)
        scales, shifts = modulation[: len(self.blocks)], modulation[len(self.blocks) :]
        h = self.inp(self._input(x, context).to(self.inp.weight.dtype))
        for block, scale, shift in zip(self.blocks, scales, shifts, strict=True):
            h = h + F.silu(torch.addcmul(shift, block(h), scale))
        velocity: Tensor = self.out(self.norm(h))
        return velocity.view_as(x).to(x.dtype)

    def unconditional(self, context: Context) -> Context:
        """The context with the null condition; the reference stays."""
        return null_condition(context, self.conditions)

    def _input(self, x: Tensor, context: Context) -> Tensor:
        reference, has = reference_of(context, x)
        flat = x.flatten(1)
        if reference is None:
            return torch.cat([flat, flat.new_zeros(flat.shape[0], flat.shape[1] + 1)], dim=1)
        flag = flat.new_ones(flat.shape[0], 1) if has is None else has.to(flat.dtype).unsqueeze(1)
        return torch.cat([flat, reference.flatten(1).to(flat.dtype), flag], dim=1)
