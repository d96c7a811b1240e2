"""Importance weights in the KL to a reference: its gradient becomes the KL's, on any policy's samples."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regimen.checkers import assert_ok
from regimen.objectives import Batch, ReferenceKL
from regimen.rollout import Rollout

WORDS = torch.tensor([0] * 4 + [1] * 3 + [2] * 2 + [3])  # as often as a policy of 0.4, 0.3, 0.2, 0.1 says them
BEHAVIOUR = torch.tensor([0.4, 0.3, 0.2, 0.1]).double().log()


class Writer(nn.Module):
    """One distribution over words."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.double())

    def logp(self) -> Tensor:
        return self.logits.log_softmax(0)

    def distribution(self, rollout: Rollout, where: Tensor) -> Any:
        return SimpleNamespace(logprob=torch.where(where, self.logp()[rollout.actions], 0))


def gradient(policy: Writer, reference: Writer, kl: ReferenceKL) -> Tensor:
    """Of the mean over the words, which is the expectation under the policy that said them."""
    rollout = Rollout.create(
        task="t", group=torch.arange(10), mask=torch.ones(10, 1, dtype=torch.bool), actions=WORDS[:, None],
        logprobs=BEHAVIOUR[WORDS][:, None],
    )  # fmt: skip
    loss = kl(Batch(rollout, {"policy": policy, "reference": reference}, {}, torch.Generator())).total
    return torch.autograd.grad(loss, policy.logits)[0]


def exact(policy: Writer, reference: Writer) -> Tensor:
    kl = (policy.logp().exp() * (policy.logp() - reference.logp().detach())).sum()
    return torch.autograd.grad(kl, policy.logits)[0]


@pytest.mark.parametrize("policy", [Writer(BEHAVIOUR), Writer(torch.tensor([-1.0, 0.0, 1.0, 0.5]))])
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_gradient_is_that_of_the_divergence(policy: Writer, estimator: str) -> None:
    """On the policy's own samples and on another's."""
    reference = Writer(torch.tensor([0.5, -0.5, 1.0, 0.0])).requires_grad_(False)
    expected = exact(policy, reference)
    torch.testing.assert_close(
        gradient(policy, reference, ReferenceKL(estimator, importance_weighted=True)), expected, rtol=1e-6, atol=1e-6
    )
    assert not torch.allclose(gradient(policy, reference, ReferenceKL(estimator)), expected, atol=1e-2)


def test_passes_the_checker_for_objectives() -> None:
    assert_ok(ReferenceKL("k3", importance_weighted=True))


def test_analytic_forms_are_refused() -> None:
    with pytest.raises(ValueError, match="'exact' is no estimate from samples.*use k1, k2, k3, or imp"):
        ReferenceKL("exact", importance_weighted=True)
