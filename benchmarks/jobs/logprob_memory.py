"""Peak memory of the log-probabilities of 4,096 tokens among 32,000, and of their gradient, in MiB.

Ours are those of `TokenSteps`, which computes logits block by block; theirs are the plain `log_softmax` and `gather` of
torch on all logits. What is measured is the growth of the process after states and output layer are there. Both sides
give the same mean and the same norms of gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from benchmarks.harness import Job, Measurement
from benchmarks.jobs.grpo_memory import peak
from regimen.policies.token_steps import TokenSteps
from regimen.rollout import Steps

ROWS, VOCABULARY, WIDTH = 4096, 32_000, 256

Logprobs = Callable[[Tensor, Tensor, Tensor], Tensor]
"""States `[R, D]`, weights `[V, D]` and tokens `[R]` to log-probabilities `[R]`."""


def blockwise(states: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    """As a token policy computes them."""
    steps = Steps(torch.ones(1, len(tokens), dtype=torch.bool))
    output = partial(linear, weight=weight)
    return TokenSteps(steps, tokens, states, torch.ones(len(tokens)), None, output, {}).logprob[0]


def whole(states: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    """As one would write them."""
    return linear(states, weight).log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)


def measured(logprobs: Logprobs, seed: int) -> Measurement:
    """Growth of the process's peak."""
    generator = torch.Generator().manual_seed(seed)
    states, weight = (
        nn.Parameter(torch.randn(rows, WIDTH, generator=generator) * WIDTH**-0.5) for rows in (ROWS, VOCABULARY)
    )
    tokens = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    # The libraries make their own preparations first, on a few rows.
    logprobs(states[:8], weight, tokens[:8]).sum().backward()
    before = peak()
    states.grad = weight.grad = None
    found = logprobs(states, weight, tokens)
    found.mean().backward()
    assert states.grad is not None
    assert weight.grad is not None
    results = {"mean": found.mean(), "states_grad": states.grad.norm(), "weight_grad": weight.grad.norm()}
    return Measurement(peak() - before, {name: value.item() for name, value in results.items()}, {"at_start": before})


JOBS = [
    Job(
        "logprob-memory-32k",
        "MiB",
        partial(measured, blockwise),
        partial(measured, whole),
        "log_softmax and gather",
        0.1,
        "at most",
        tolerance=1e-6,
        bound="The gradient of the output layer, 31 MiB, of which autograd adds up copies; a block of logits is 4 MiB.",
    )
]
