"""A small text encoder for the built-in tasks' short prompts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .conditioning import Context, replaced, required


class TextEmbedding(nn.Module):
    """Adds `prompt_embeds` and `pooled` to a context: embedded words with their places, and the words' mean.

    The mean is over words that know their place, through one hidden layer, so that `pooled` can tell "a red
    square and a blue disc" from "a blue square and a red disc".

    Context keys: `prompt_ids` int64 and `prompt_mask` bool `[B, length]`; token 0 is padding.

    Args:
        words: size of the vocabulary.
        length: tokens of a prompt.
        dim: size of a prompt token and of the pooled prompt.
        guidance: also add `null_prompt_embeds` and `null_pooled`, those of padding alone, without gradient.
    """

    def __init__(self, words: int, length: int, dim: int, guidance: bool = False) -> None:
        super().__init__()
        self.guidance = guidance
        self.word = nn.Embedding(words, dim)
        self.place = nn.Parameter(0.5 * torch.randn(length, dim))
        self.mix = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        nn.init.normal_(self.word.weight, std=0.5)

    def forward(self, context: Context) -> Context:
        """The context with `prompt_embeds [B, length, dim]` and `pooled [B, dim]` added.

        Raises:
            ValueError: `prompt_ids` or `prompt_mask` is missing.
        """
        ids, mask = (required(context, key, "TextEmbedding") for key in ("prompt_ids", "prompt_mask"))
        prompt_embeds, pooled = self._encoded(ids, mask)
        added = {"prompt_embeds": prompt_embeds, "pooled": pooled}
        if self.guidance:
            with torch.no_grad():
                added["null_prompt_embeds"], added["null_pooled"] = self._encoded(ids * 0, torch.ones_like(mask))
        return replaced(context, **added)

    def _encoded(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        embeds = self.word(ids) + self.place
        weight = mask.to(embeds.dtype).unsqueeze(-1)
        mixed = self.mix(embeds) * weight
        return embeds, mixed.sum(1) / weight.sum(1).clamp(min=1)
