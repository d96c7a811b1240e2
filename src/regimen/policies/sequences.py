"""Prompts and answers laid out as the rows of a rollout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from regimen.policies.decoding import Completions


@dataclass(frozen=True)
class Sequences:
    """Prompts, forced prefixes and answers laid out in rows, with padding at the end only.

    Attributes:
        tokens: int64 `[B, T]`; mask: bool `[B, T]`; own: bool `[B, T]`, the policy's own steps.
        prompts: int64 `[B]`, lengths of the prompts.
        logprobs: `[B, T]`; kept: int64 `[B, T]` or `None`.
    """

    tokens: Tensor
    mask: Tensor
    own: Tensor
    prompts: Tensor
    logprobs: Tensor
    kept: Tensor | None

    @classmethod
    def of(cls, starts: Sequence[Tensor], prefixes: Sequence[Tensor], answers: Completions) -> Self:
        """Lay out `B` rows."""
        device = answers.tokens.device
        prompts = torch.tensor([len(start) for start in starts], device=device)
        given = prompts + torch.tensor([len(prefix) for prefix in prefixes], device=device)
        length = given + answers.mask.sum(1)
        place = torch.arange(int(length.max()), device=device)
        mask, first = place < length[:, None], place < given[:, None]
        own = mask & ~first
        tokens = torch.zeros(mask.shape, dtype=torch.int64, device=device)
        tokens[first] = torch.cat([x for pair in zip(starts, prefixes, strict=True) for x in pair]).to(device)
        tokens[own] = answers.tokens[answers.mask]
        logprobs = answers.logprobs.new_zeros(mask.shape)
        logprobs[own] = answers.logprobs[answers.mask]
        kept = None
        if answers.kept is not None:
            kept = torch.zeros_like(tokens)
            kept[own] = answers.kept[answers.mask]
        return cls(tokens, mask, own, prompts, logprobs, kept)

    def answer_tokens(self) -> list[Tensor]:
        """What comes after each prompt, forced prefix included."""
        lengths = self.mask.sum(1).tolist()
        return [row[p:n] for row, p, n in zip(self.tokens, self.prompts.tolist(), lengths, strict=True)]

    def fields(self, scored: bool) -> dict[str, Any]:
        """The fields of a rollout."""
        found: dict[str, Any] = {"actions": self.tokens, "mask": self.mask, "loss_mask": self.own}
        if scored:
            found["logprobs"] = self.logprobs
        if scored and self.kept is not None:
            found["step_columns"] = {"kept": self.kept}
        return found
