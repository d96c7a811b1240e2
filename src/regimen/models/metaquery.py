"""Learnable queries that let a frozen multimodal language model condition a denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self, cast

import torch
from torch import Tensor, nn

from .conditioning import Context, lookup, replaced, required
from .encoders import MultimodalEncoder
from .layers import TransformerBlock


class MetaQueryConnector(nn.Module):
    """Queries and the transformer that maps what a language model answers them to a denoiser's prompt.

    Linear(encoder_hidden -> hidden), a pre-norm bidirectional transformer to H, then prompt_embeds =
    Linear(H) and pooled = Linear(mean over tokens of H). Source: Wei et al. 2025 (UniPic 2, MetaQuery
    connector), after Pan et al. 2025. The defaults fit Qwen2.5-VL-7B and SD3.5-Medium.

    Args:
        num_queries: learnable queries, drawn from N(0, 0.02).
        encoder_hidden: hidden size of the language model.
        hidden: size of the connector's tokens.
        layers: transformer blocks.
        heads: attention heads.
        mlp: hidden units of a block's MLP.
        prompt_dim: size of a prompt token of the denoiser.
        pooled_dim: size of the denoiser's pooled prompt.
    """

    def __init__(
        self,
        num_queries: int = 256,
        encoder_hidden: int = 3584,
        hidden: int = 1536,
        layers: int = 24,
        heads: int = 24,
        mlp: int = 8960,
        prompt_dim: int = 4096,
        pooled_dim: int = 2048,
    ) -> None:
        super().__init__()
        self.queries = nn.Parameter(0.02 * torch.randn(num_queries, encoder_hidden))
        self.inp = nn.Linear(encoder_hidden, hidden)
        self.blocks = nn.ModuleList(TransformerBlock(hidden, heads, mlp) for _ in range(layers))
        self.prompt = nn.Linear(hidden, prompt_dim)
        self.pooled = nn.Linear(hidden, pooled_dim)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """`prompt_embeds [B, Q, prompt_dim]`, `pooled [B, pooled_dim]` of answers `[B, Q, encoder_hidden]`."""
        x = self.inp(hidden.to(self.inp.weight.dtype))
        for block in self.blocks:
            x = block(x)
        return self.prompt(x), self.pooled(x.mean(dim=1))


class MetaQueryConditioner(nn.Module):
    """Adds `prompt_embeds` and `pooled` to a context: the queries' answers from a multimodal language
    model.

    The queries follow each prompt's last token as input embeddings and in position, on whichever side the
    prompt is padded; the model runs once; its last hidden states at the queries go through the connector.
    The model is never trained: it stays in evaluation mode and its parameters get no gradient, while
    gradients flow through it to the queries.

    Context keys: `prompt_ids` int64 and `prompt_mask` bool `[B, L]`; optional `prompt_image [B, C, H, W]`
    in [0, 1], seen by the model's own vision tower, and `has_prompt_image` bool `[B]` (default: every row
    has one).

    Args:
        encoder: a `MultimodalEncoder` module.
        connector: whose `encoder_hidden` is the encoder's `hidden`.
        freeze: False leaves the encoder's parameters and mode alone (to pre-train a small one).
        guidance: also add `null_prompt_embeds` and `null_pooled`, without gradient, for classifier-free
            guidance.
        null_prompt: tokens of the null prompt, such as the chat format around no text; default
            `encoder.null_token`.

    Raises:
        ValueError: encoder and connector differ in hidden size.
    """

    def __init__(
        self,
        encoder: nn.Module,
        connector: MetaQueryConnector,
        freeze: bool = True,
        guidance: bool = False,
        null_prompt: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        model, width = cast(MultimodalEncoder, encoder), connector.queries.shape[1]
        if model.hidden != width:
            raise ValueError(
                f"encoder.hidden is {model.hidden}, the connector's encoder_hidden {width}; make them equal"
            )
        self.encoder, self.connector, self.freeze, self.guidance = encoder, connector, freeze, guidance
        self.null_prompt = tuple(null_prompt or (model.null_token,))
        if freeze:
            encoder.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Set the connector's mode; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.freeze:
            self.encoder.eval()
        return self

    def forward(self, context: Context) -> Context:
        """The context with `prompt_embeds [B, Q, prompt_dim]` and `pooled [B, pooled_dim]` added.

        Raises:
            ValueError: `prompt_ids` or `prompt_mask` is missing, or a prompt has no token (on CPU; see
                `unconditional` for the empty prompt).
        """
        prompt_embeds, pooled = self._answers(context)
        added = {"prompt_embeds": prompt_embeds, "pooled": pooled}
        if self.guidance:
            with torch.no_grad():
                added["null_prompt_embeds"], added["null_pooled"] = self._answers(self.unconditional(context))
        return replaced(context, **added)

    def unconditional(self, context: Context) -> Context:
        """The context with every prompt replaced by the null prompt; images stay."""
        ids = required(context, "prompt_ids", "MetaQueryConditioner")
        null = ids.new_tensor(self.null_prompt).repeat(ids.shape[0], 1)
        return replaced(context, prompt_ids=null, prompt_mask=torch.ones_like(null, dtype=torch.bool))

    def _answers(self, context: Context) -> tuple[Tensor, Tensor]:
        encoder = cast(MultimodalEncoder, self.encoder)
        ids, mask = (required(context, key, "MetaQueryConditioner") for key in ("prompt_ids", "prompt_mask"))
        mask = mask.bool()
        if not mask.is_cuda and not bool(mask.any(1).all()):
            raise ValueError("prompt_mask has a row without any token; give the empty prompt at least one token")
        image, has_image = lookup(context, "prompt_image"), lookup(context, "has_prompt_image")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            embeds, mask, positions = encoder.embed(ids, mask, image, has_image)
        count = self.connector.queries.shape[0]
        queries = self.connector.queries.to(embeds.dtype).expand(embeds.shape[0], -1, -1)
        hidden = encoder.run(
            torch.cat([embeds, queries], dim=1),
            torch.cat([mask, mask.new_ones(mask.shape[0], count)], dim=1),
            continued(positions, mask, count),
        )
        answers: tuple[Tensor, Tensor] = self.connector(hidden[:, -count:])
        return answers


def continued(positions: Tensor, mask: Tensor, count: int) -> Tensor:
    """Positions `[..., B, N]` of masked tokens, followed by `count` that go on after each row's highest."""
    highest = positions.masked_fill(~mask, -1).amax(-1)
    if positions.dim() == 3:
        highest = highest.amax(0)
    after = highest.unsqueeze(-1) + torch.arange(1, count + 1, device=positions.device)
    return torch.cat([positions, after.expand(*positions.shape[:-1], count)], dim=-1)
