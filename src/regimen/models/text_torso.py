"""Torsos that read texts: tables of tokens to features, as those of vectors and images read theirs."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.functional import pad

from regimen.models.causal_lm import CausalLM
from regimen.models.packing import Packed


class TextTorso(nn.Module):
    """A causal language model's state after the last token of a text.

    A text is a row of a table: `tokens` int64 `[R, L]` and `mask` bool `[R, L]`, padded at the end.

    Attributes:
        width: of the features, `[R, width]`.
    """

    def __init__(self, network: CausalLM) -> None:
        """`network` may have the weights of a policy to start with; it is trained as part of the torso."""
        super().__init__()
        self.network, self.width = network, int(network.config.hidden_size)

    def forward(self, texts: TensorDict) -> Tensor:
        """Features `[R, width]`; `ValueError` if a text is empty."""
        tokens, length = texts["tokens"], lengths(texts)
        tokens = tokens[:, : int(length.max())]
        if (known := self.network.forward_pass) is None:
            hidden = self.network.hidden(tokens)
            return hidden[torch.arange(len(length), device=length.device), length - 1]
        place = torch.arange(tokens.shape[1] + 1, device=length.device)
        packed = Packed.of(pad(tokens, (0, 1)), place == length[:, None])
        return known.packed(packed)[packed.before]


class PooledTextTorso(nn.Module):
    """What an encoder of another vocabulary, such as RoBERTa, makes of a text: its pooled output.

    Tokens are decoded and encoded anew; of a text that is too long the end is kept.

    Attributes:
        width: of the features, `[R, width]`.
    """

    def __init__(self, encoder: Any, tokenizer: Any, source: Any, longest: int = 512) -> None:
        """Make the torso.

        Args:
            encoder: an `AutoModel` of `transformers` whose output has a `pooler_output`.
            tokenizer: the encoder's.
            source: the tokenizer of the tokens that it is given, the policy's.
            longest: tokens of the encoder that are read.
        """
        super().__init__()
        self.encoder, self.width, self.longest = encoder, int(encoder.config.hidden_size), longest
        self._tokenizer, self._source = tokenizer, source
        tokenizer.truncation_side = "left"

    def forward(self, texts: TensorDict) -> Tensor:
        """Features `[R, width]`; `ValueError` if a text is empty."""
        rows = zip(texts["tokens"], lengths(texts).tolist(), strict=True)
        said = self._source.batch_decode([tokens[:n].tolist() for tokens, n in rows], skip_special_tokens=True)
        inputs = self._tokenizer(said, padding=True, truncation=True, max_length=self.longest, return_tensors="pt")
        device = texts["tokens"].device
        pooled: Tensor = self.encoder(**{name: value.to(device) for name, value in inputs.items()}).pooler_output
        return pooled


def lengths(texts: TensorDict) -> Tensor:
    """int64 `[R]`, tokens of each text; `ValueError` if one has none."""
    length: Tensor = texts["mask"].sum(1)
    if not bool(length.all()):
        raise ValueError(
            f"empty action or state: text {int(length.argmin())} of {len(length)} has no tokens; a text that is read "
            "needs at least one (the end-of-text token counts)"
        )
    return length
