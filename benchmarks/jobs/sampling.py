"""Sampling alone: 64 tokens at temperature 1 after each of 128 prompts, which are 16 different ones, 8 times each.

Theirs is `generate` of `transformers` as TRL calls it, with its default (dynamic) cache. Ours
gives log-probabilities too, as a rollout needs them; theirs does not.
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.harness import Job, Measurement
from benchmarks.language import NEW_TOKENS, SIZES, Watch, decoder, prompts, timed, tokenizer
from regimen.knobs import Knobs
from regimen.policies import TokenPolicy
from regimen.policies.base import Policy

PROMPTS, GROUP = 16, 8
WARM_UP = 1


def ours(name: str, steps: int, seed: int) -> Measurement:
    """Tokens per second of `TokenPolicy.sample`."""
    from tensordict import NonTensorStack, TensorDict

    size = SIZES[name]
    policy: Policy = TokenPolicy(decoder(size, seed), tokenizer(size), max_new_tokens=NEW_TOKENS)
    texts = [text for text in prompts(PROMPTS, size, seed) for _ in range(GROUP)]
    contexts = TensorDict({"prompt": NonTensorStack(*texts)}, batch_size=[len(texts)])
    rng, lengths = torch.Generator().manual_seed(seed), set[int]()

    def sample(_turn: int) -> None:
        rollout = policy.sample(contexts, Knobs.of(policy), rng)
        lengths.update(rollout.loss_mask.sum(1).tolist())

    return _measured(timed(sample, WARM_UP, steps), lengths)


def theirs(name: str, steps: int, seed: int) -> Measurement:
    """Tokens per second of `generate`."""
    size = SIZES[name]
    model, words = decoder(size, seed), tokenizer(size)
    texts = [text for text in prompts(PROMPTS, size, seed) for _ in range(GROUP)]
    lengths = set[int]()

    def sample(_turn: int) -> None:
        inputs = words(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
        with torch.inference_mode():
            found = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=NEW_TOKENS)
        answers = found[:, inputs["input_ids"].shape[1] :]
        words.batch_decode(answers, skip_special_tokens=True)
        lengths.add(answers.shape[1])

    return _measured(timed(sample, WARM_UP, steps), lengths)


def _measured(watch: Watch, lengths: set[int]) -> Measurement:
    assert lengths == {NEW_TOKENS}
    tokens = watch.measured * PROMPTS * GROUP * NEW_TOKENS
    return Measurement(tokens / watch.wall, {"length": NEW_TOKENS}, {"wall": watch.wall, "cpu": watch.cpu})


BOUND = (
    "Each row's own keys and values (6 MB per token at 0.15M, more than a core's second cache), which a prompt's, "
    "read once for its 8 rows, do not have; products of 128 rows, a fifth of a token's time at 0.15M and over half at "
    "7M; and some 600 calls. `torch.compile` of a step was twice as slow as these calls. `python -m "
    "benchmarks.profile sampling-1M` gives the shares."
)

JOBS = [
    Job(
        f"sampling-{name}", "tokens/s", partial(ours, name, steps), partial(theirs, name, steps),
        "transformers generate", 3.0, bound=BOUND,
    )
    for name, steps in [("0.15M", 10), ("1M", 5), ("7M", 2)]
]  # fmt: skip
