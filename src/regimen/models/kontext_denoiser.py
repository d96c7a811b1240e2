"""The small transformer denoiser with reference tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conditioning import (
    Context,
    embed_condition,
    lookup,
    null_condition,
    null_prompts,
    reference_of,
    required,
)
from .layers import Patches, SelfAttention, SigmaEmbedding, feed_forward


class AdaptiveBlock(nn.Module):
    """Pre-norm transformer block, norms and gates from outside (adaLN-zero, Peebles and Xie 2023)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention = SelfAttention(dim, heads)
        self.mlp = feed_forward(dim, 4 * dim)

    def forward(self, x: Tensor, modulation: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
        """`x [B, N, dim]`; `modulation` is shift, scale and gate of attention and of the MLP, `[B, 1, dim]`."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation
        x = torch.addcmul(x, self.attention(adaptive_norm(x, shift, scale), mask), gate)
        return torch.addcmul(x, self.mlp(adaptive_norm(x, mlp_shift, mlp_scale)), mlp_gate)


def adaptive_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm of `x [B, N, dim]`, then `(1 + scale) * x + shift`."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), 1 + scale)


class KontextDenoiser(nn.Module):
    """Token transformer that predicts a rectified flow's velocity, noise - data, given a reference image.

    Kontext conditioning (Wei et al. 2025): the reference goes through the same patch and positional
    embedding as the noisy image, its tokens stand in front of the noisy ones, and only the last h*w tokens
    are read out. Without a reference the sequence is the noisy tokens alone, so generation and editing
    share all weights. Noise level and condition act through adaLN-zero.

    Context keys: `condition` int64 `[B]` in [0, conditions], where `conditions` is the null condition
    (optional with `prompt_dim` or `pooled_dim`; missing means null); optional `reference [B, C, H, W]` and
    `has_reference` bool `[B]`; `prompt_embeds [B, L, prompt_dim]`, tokens in front of all others, and
    `pooled [B, pooled_dim]`, added to the conditioning vector, each where its size is given.
    `unconditional` then needs `null_prompt_embeds` and `null_pooled`.

    Args:
        shape: image size (C, H, W).
        conditions: number of classes or operations, without the null condition; may be 0.
        patch: side of a token's patch.
        dim: units per token.
        layers: transformer blocks.
        heads: attention heads.
        prompt_dim: size of prompt tokens; None takes none.
        pooled_dim: size of the pooled prompt; None takes none.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        conditions: int,
        patch: int = 2,
        dim: int = 64,
        layers: int = 3,
        heads: int = 4,
        prompt_dim: int | None = None,
        pooled_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.conditions = tuple(shape), conditions
        self.patches = Patches(shape, patch)
        self.embed = nn.Linear(self.patches.size, dim)
        self.position = nn.Parameter(0.02 * torch.randn(1, self.patches.count, dim))
        self.sigma = SigmaEmbedding(dim)
        self.condition = nn.Embedding(conditions + 1, dim)
        self.prompt = None if prompt_dim is None else nn.Linear(prompt_dim, dim)
        self.pooled = None if pooled_dim is None else nn.Linear(pooled_dim, dim)
        self.blocks = nn.ModuleList(AdaptiveBlock(dim, heads) for _ in range(layers))
        self.modulation = nn.Linear(dim, (6 * layers + 2) * dim)
        self.out = nn.Linear(dim, self.patches.size)
        nn.init.normal_(self.condition.weight, std=0.5)
        for layer in (self.modulation, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, sigma: Tensor, context: Context) -> Tensor:
        """Velocity `[B, C, H, W]` at `x [B, C, H, W]` and noise level `sigma [B]` (1 = noise).

        Raises:
            ValueError: `x` or the reference is of the wrong size, or a context key is missing or out of
                range.
        """
        if x.shape[1:] != self.shape:
            raise ValueError(f"x has size {tuple(x.shape)}; a sample should have {self.shape}")
        modulation = self.modulation(F.silu(self._vector(sigma, context)))
        parts = modulation.view(x.shape[0], -1, 1, self.embed.out_features).unbind(1)
        tokens, mask = self._tokens(x, context)
        for index, block in enumerate(self.blocks):
            tokens = block(tokens, parts[6 * index : 6 * index + 6], mask)
        read = adaptive_norm(tokens[:, -self.patches.count :], parts[-2], parts[-1])
        return self.patches.inverse(self.out(read)).to(x.dtype)

    def unconditional(self, context: Context) -> Context:
        """The context with the null condition and the null prompt; the reference stays."""
        context = null_condition(context, self.conditions)
        return context if self.prompt is None and self.pooled is None else null_prompts(context, "KontextDenoiser")

    def _vector(self, sigma: Tensor, context: Context) -> Tensor:
        vector: Tensor = self.sigma(sigma)
        if self.pooled is not None:
            pooled = required(context, "pooled", "KontextDenoiser")
            vector = vector + self.pooled(pooled.to(vector.dtype))
        condition = lookup(context, "condition")
        if condition is None and self.prompt is None and self.pooled is None:
            condition = required(context, "condition", "KontextDenoiser")
        if condition is None:
            condition = torch.full_like(sigma, self.conditions, dtype=torch.long)
        return vector + embed_condition(self.condition, condition)

    def _tokens(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        """Tokens `[B, N, dim]` (prompt, reference, noisy) and the mask `[B, 1, 1, N]` if some are hidden."""
        reference, has = reference_of(context, x)
        images = [x] if reference is None else [reference, x]
        tokens = [self.embed(self.patches(image).to(self.embed.weight.dtype)) + self.position for image in images]
        if self.prompt is not None:
            prompt = required(context, "prompt_embeds", "KontextDenoiser")
            tokens.insert(0, self.prompt(prompt.to(self.prompt.weight.dtype)))
        joined = torch.cat(tokens, dim=1)
        if has is None:
            return joined, None
        mask = has.new_ones(joined.shape[:2])
        start = joined.shape[1] - 2 * self.patches.count
        mask[:, start : start + self.patches.count] = has.unsqueeze(1)
        return joined, mask[:, None, None]
