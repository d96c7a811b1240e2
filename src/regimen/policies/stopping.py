"""When an answer ends: at an end-of-text token, or where a stop text is complete."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_BROKEN = "\ufffd"
"""What a part of a character is decoded to."""


class StopAt:
    """Rows whose newest token ends the text, or completes one of some texts.

    Whether a text is complete is decided on decoded text, because a tokenizer may join its end with what comes before
    or after; only rows whose newest token may have brought the last character of a stop text are decoded. What is
    sampled is looked at, without prompt and prefix.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str] = (), ends: Sequence[int] = ()) -> None:
        """Make the rule.

        Args:
            tokenizer: of `transformers`, with an end-of-text token.
            texts: stop texts.
            ends: further tokens that end a text.

        Raises:
            ValueError: a stop text is empty, or one text was given in place of several.
        """
        if isinstance(texts, str) or not all(texts):
            raise ValueError(f"StopAt: stop texts are {texts!r}; expected a list of texts, none of them empty")
        self.texts = list(texts)
        self._tokenizer = tokenizer
        self.ends = torch.tensor(sorted({tokenizer.eos_token_id, *ends}))
        self._may_end = self._candidates() if texts else None

    def _candidates(self) -> Tensor:
        """Bool `[V]`, tokens that may bring the last character of a stop text."""
        last = {text[-1] for text in self.texts}
        words = self._tokenizer.batch_decode([[i] for i in range(len(self._tokenizer))])
        # White space may belong to no token, but stand between two.
        between = any(character.isspace() for character in last)
        return torch.tensor([between or _BROKEN in word or bool(last & set(word)) for word in words])

    def __call__(self, tokens: Tensor, length: int) -> Tensor:
        """Bool `[R]`, given the tokens so far, int64 `[R, capacity]`, of which `length` count."""
        newest = tokens[:, length - 1]
        ends = self.ends.to(tokens.device)
        ended = newest == ends if len(ends) == 1 else torch.isin(newest, ends)
        if self._may_end is None:
            return ended
        may_end = self._may_end.to(tokens.device)
        # Models may have more output tokens than their tokenizer knows.
        likely = may_end[newest.clamp(max=len(may_end) - 1)] & (newest < len(may_end)) & ~ended
        rows = likely.nonzero().squeeze(-1)
        texts = self._tokenizer.batch_decode(tokens[rows, :length].tolist())
        complete = [any(stop in text for stop in self.texts) for text in texts]
        ended[rows] = torch.tensor(complete, dtype=torch.bool, device=tokens.device)
        return ended
