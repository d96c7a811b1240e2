"""When an answer ends: at the end-of-text token, or where a stop text is complete."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class StopAt:
    """Rows whose newest token ends the text, or completes one of some texts.

    Whether a text is complete is decided on decoded text, because a tokenizer may join its end with what comes before;
    only rows whose newest token has the last character of a stop text are decoded.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str] = ()) -> None:
        """`ValueError` for an empty stop text."""
        if not all(texts):
            raise ValueError(f"StopAt: stop texts {list(texts)}; expected none that is empty")
        self.texts = list(texts)
        self._tokenizer = tokenizer
        self._ends = torch.tensor([tokenizer.eos_token_id])
        self._may_end = self._candidates() if texts else None

    def _candidates(self) -> Tensor:
        """Bool `[V]`, tokens that hold the last character of a stop text."""
        last = {text[-1] for text in self.texts}
        words = self._tokenizer.batch_decode([[i] for i in range(len(self._tokenizer))])
        return torch.tensor([bool(last & set(word)) for word in words])

    def __call__(self, tokens: Tensor, length: int) -> Tensor:
        """Bool `[R]`, given the tokens so far, int64 `[R, capacity]`, of which `length` count."""
        newest = tokens[:, length - 1]
        ended = torch.isin(newest, self._ends.to(tokens.device))
        if self._may_end is None:
            return ended
        may_end = self._may_end.to(tokens.device)
        # Models may have more output tokens than their tokenizer knows.
        likely = may_end[newest.clamp(max=len(may_end) - 1)] & (newest < len(may_end)) & ~ended
        for row in likely.nonzero().squeeze(-1).tolist():
            text = self._tokenizer.decode(tokens[row, :length])
            before = self._tokenizer.decode(tokens[row, : length - 1])
            ended[row] = any(stop in text and stop not in before for stop in self.texts)
        return ended
