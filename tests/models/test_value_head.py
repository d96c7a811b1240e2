"""The value head."""

from __future__ import annotations

import pytest
import torch

from regimen.models.value_head import ValueHead


def test_starts_at_zero_and_learns() -> None:
    head = ValueHead(4)
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    assert torch.equal(head(hidden), torch.zeros(2, 3))
    (head(hidden) - 1).square().sum().backward()
    assert head.layer.bias.grad is not None
    assert float(head.layer.bias.grad) == -12


@pytest.mark.parametrize("detach", [False, True])
def test_gradient_into_the_policy(detach: bool) -> None:
    head = ValueHead(4, detach=detach)
    torch.nn.init.ones_(head.layer.weight)
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    head(hidden).sum().backward()
    assert (hidden.grad is None) is detach


def test_half_precision_states_give_full_precision_values() -> None:
    assert ValueHead(4)(torch.randn(2, 4, dtype=torch.bfloat16)).dtype == torch.float32


def test_error() -> None:
    with pytest.raises(ValueError, match="dim is 0, expected at least 1"):
        ValueHead(0)
