"""Layers that the denoisers and the connector share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Sinusoid(nn.Module):
    """Sines and cosines of numbers `[...]`, as `[..., features]`; geometric frequencies from low to high."""

    frequencies: Tensor
    phases: Tensor

    def __init__(self, features: int, low: float, high: float) -> None:
        super().__init__()
        half = features // 2
        frequencies = torch.logspace(math.log10(low), math.log10(high), half)
        self.register_buffer("frequencies", frequencies.repeat(2), persistent=False)
        self.register_buffer("phases", torch.tensor([0.0, math.pi / 2]).repeat_interleave(half), persistent=False)

    def forward(self, value: Tensor) -> Tensor:
        frequencies = self.frequencies.float()
        return torch.addcmul(self.phases.float(), value.to(frequencies.dtype).unsqueeze(-1), frequencies).sin()


class SigmaEmbedding(nn.Module):
    """Noise levels `sigma [B]` in [0, 1] to `[B, dim]`: a linear map of their sines and cosines."""

    def __init__(self, dim: int, features: int = 32) -> None:
        super().__init__()
        self.sinusoid = Sinusoid(features, low=0.5, high=64.0)
        self.linear = nn.Linear(features, dim)

    def forward(self, sigma: Tensor) -> Tensor:
        out: Tensor = self.linear(self.sinusoid(sigma).to(self.linear.weight.dtype))
        return out


class SelfAttention(nn.Module):
    """Multi-head self-attention of `[B, N, dim]`; a bool mask `[B, 1, 1 or N, N]` marks what is seen."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


def feed_forward(dim: int, hidden: int) -> nn.Sequential:
    """Two linear layers with a tanh-approximated GELU between them."""
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))


class TransformerBlock(nn.Module):
    """Pre-norm transformer block `[B, N, dim] -> [B, N, dim]`; bidirectional unless `mask` says otherwise."""

    def __init__(self, dim: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, heads)
        self.mlp = feed_forward(dim, mlp)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Patches(nn.Module):
    """Images `[B, C, H, W]` to token vectors `[B, N, C * patch^2]` in row order, and back."""

    def __init__(self, shape: tuple[int, int, int], patch: int) -> None:
        super().__init__()
        channels, height, width = shape
        if height % patch or width % patch:
            raise ValueError(f"image of {height}x{width} does not divide into patches of {patch}x{patch}")
        self.grid = (height // patch, width // patch)
        self.patch, self.channels = patch, channels
        self.count, self.size = self.grid[0] * self.grid[1], channels * patch * patch

    def forward(self, image: Tensor) -> Tensor:
        rows, columns = self.grid
        split = image.reshape(-1, self.channels, rows, self.patch, columns, self.patch)
        return split.permute(0, 2, 4, 1, 3, 5).reshape(-1, self.count, self.size)

    def inverse(self, tokens: Tensor) -> Tensor:
        split = tokens.reshape(-1, *self.grid, self.channels, self.patch, self.patch)
        return split.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
