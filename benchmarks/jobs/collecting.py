"""Collecting in two processes beside collecting in one: the same task, as many samples."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tensordict import NonTensorStack, TensorDict

from benchmarks.harness import Job, Measurement
from regimen import Cast
from regimen.models.small_decoder import small_decoder, word_tokenizer
from regimen.policies import ActionPolicy, TokenPolicy
from regimen.rollout import Rollout
from regimen.tasks import EnvTask, Gymnasium, ParallelTask, PromptTask
from regimen.tasks.base import Task

ROUNDS = 8
WORDS = [f"word{number}" for number in range(60)]


def cheetah(worker: int) -> EnvTask:
    """Four copies of HalfCheetah, 512 steps each."""
    return EnvTask("cheetah", Gymnasium("HalfCheetah-v5"), copies=4, steps=512)


def prompts(worker: int) -> PromptTask:
    """Thirty prompts of 16 words, each answered eight times."""
    texts = [" ".join(WORDS[(start + step) % len(WORDS)] for step in range(16)) for start in range(30)]
    return PromptTask("prompts", TensorDict({"prompt": NonTensorStack(*texts)}, batch_size=[30]), group_size=8)


def control() -> Cast:
    """A policy of two layers of 64."""
    return Cast(policy=ActionPolicy.for_spaces(*cheetah(0).spaces))


def language(dim: int, layers: int, heads: int) -> Cast:
    """A decoder."""
    tokenizer = word_tokenizer(WORDS)
    return Cast(policy=TokenPolicy(small_decoder(len(tokenizer), dim=dim, layers=layers, heads=heads), tokenizer))


def measured(task: Task, cast: Cast, size: int, seed: int, count: Callable[[Rollout], int]) -> Measurement:
    """Steps of the policy per second, after a first round that is not counted."""
    rng, done = torch.Generator().manual_seed(seed), 0
    knobs = {knob.name: knob.default for knob in (*cast["policy"].knobs, *task.knobs)}
    task.collect(cast, knobs, rng, size)
    start = time.perf_counter()
    for _ in range(ROUNDS):
        done += count(task.collect(cast, knobs, rng, size))
    seconds = time.perf_counter() - start
    return Measurement(done / seconds, {"policy steps": done})


def job(name: str, make: Callable[[int], Any], cast: Callable[[], Cast], size: int, bound: str) -> Job:
    """Two workers beside the task itself."""

    def own(rollout: Rollout) -> int:
        return int(rollout.loss_mask.sum())

    def two(seed: int) -> Measurement:
        task = ParallelTask(make, 2)
        try:
            return measured(task, cast(), size, seed, own)
        finally:
            task.close()

    def one(seed: int) -> Measurement:
        return measured(make(0), cast(), size, seed, own)

    return Job(
        name=name, unit="policy steps/s", ours=two, theirs=one, peer="one process", target=1.7, bound=bound
    )  # fmt: skip


CONTROL = (
    "Two cores: 2 at best. Packing, sending and putting together a rollout are many small calls in cold memory, 2 to "
    "3 ms of a round, so the stretch matters: it was 1.65 with stretches of 128 steps (22 ms of work for each)."
)
LANGUAGE = (
    "Half of the rows are more than half of the work: in one process by itself, a token of 120 rows takes {share} of "
    "the time of one of 240, and two such processes slow each other by some 8 %."
)

JOBS = [
    job("collecting-control", cheetah, control, 8, CONTROL),
    job("collecting-language", prompts, partial(language, 160, 3, 4), 240, LANGUAGE.format(share="0.58 to 0.65")),
    job("collecting-language-7M", prompts, partial(language, 256, 8, 8), 240, LANGUAGE.format(share="0.55")),
]
