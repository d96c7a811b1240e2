"""A process reward model: what the value of a text is after each of its tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regimen.models.causal_lm import CausalLM
from regimen.rollout import Rollout


class ProcessValue(nn.Module):
    """A frozen language model with a trainable head on its hidden states: linear, ReLU, linear to one number.

    Called with a rollout of texts it gives the value after each token, `[B, T]`, where that token has been read (a
    `critic` gives the value before it). Source: arXiv 2510.01167, section 3.
    """

    def __init__(self, trunk: CausalLM, width: int | None = None) -> None:
        """Make the head.

        Args:
            trunk: the language model, which is not trained here and belongs to somebody else: it is not part of this
                module's state.
            width: of the hidden layer; that of the trunk's states by default.
        """
        super().__init__()
        dim = trunk.config.hidden_size
        # A list keeps the trunk out of this module's own parameters.
        self._trunk = [trunk]
        self.head = nn.Sequential(nn.Linear(dim, width or dim), nn.ReLU(), nn.Linear(width or dim, 1))

    def forward(self, rollout: Rollout) -> Tensor:
        """`[B, T]`, values after each token, in float32."""
        with torch.no_grad():
            hidden = self._trunk[0].hidden(rollout.actions)
        values: Tensor = self.head(hidden.to(next(self.head.parameters()).dtype)).squeeze(-1)
        return torch.where(rollout.mask, values, 0)

    @torch.no_grad()
    def last(self, rollout: Rollout) -> Tensor:
        """`[B]`, the value after the last token of each text."""
        return self(rollout).gather(1, rollout.lengths[:, None] - 1).squeeze(1)
