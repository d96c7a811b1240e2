"""A critic that shares a policy's network: one linear layer on its hidden states."""

from __future__ import annotations

from torch import Tensor, nn


class ValueHead(nn.Module):
    """`V = w . h + b` on hidden states `[..., D]`, giving `[...]`; it starts at 0 everywhere.

    As the cast's `critic` it is used by `GAE(reads="policy")` and `ValueObjective(reads="policy")`, which hand it the
    hidden states of the policy's step distribution.
    """

    def __init__(self, dim: int, *, detach: bool = False) -> None:
        """Make the layer.

        Args:
            dim: `D`.
            detach: keep the critic's gradient out of the policy's network.

        Raises:
            ValueError: `dim` is below 1.
        """
        super().__init__()
        if dim < 1:
            raise ValueError(f"ValueHead: dim is {dim}, expected at least 1")
        self.detach = detach
        self.layer = nn.Linear(dim, 1)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Values `[...]`, in float32 whatever the policy's precision."""
        values: Tensor = self.layer((hidden.detach() if self.detach else hidden).to(self.layer.weight.dtype))
        return values.squeeze(-1)
