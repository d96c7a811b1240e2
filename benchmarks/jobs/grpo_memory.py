"""Peak memory of a GRPO iteration at 7 million parameters: growth of the process from after its set-up, in MiB.

The same work as in `grpo.py`, without gradient checkpoints on either side.
"""

from __future__ import annotations

import resource
from typing import Any

from benchmarks.harness import Job, Measurement
from benchmarks.jobs.grpo import regimen, trainer
from benchmarks.language import SIZES
from regimen import train
from regimen.loop import Event

SIZE = SIZES["7M"]


def peak() -> float:
    """Largest resident size of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ours(seed: int) -> Measurement:
    """One iteration of `train`."""
    start = list[float]()

    def listen(event: Event) -> None:
        if event.kind == "stage":
            start.append(peak())

    train(regimen(SIZE, seed, 1), seed=seed, listener=listen)
    return Measurement(peak() - start[0], {"at_start": start[0]})


def theirs(seed: int) -> Measurement:
    """One step of TRL's GRPOTrainer."""
    from transformers import TrainerCallback

    start = list[float]()

    class Watching(TrainerCallback):
        def on_train_begin(self, *_args: Any, **_options: Any) -> None:
            start.append(peak())

    trainer(SIZE, seed, 1, Watching()).train()
    return Measurement(peak() - start[0], {"at_start": start[0]})


JOBS = [
    Job(
        "grpo-memory-7M",
        "MiB",
        ours,
        theirs,
        "TRL GRPOTrainer",
        0.7,
        "at most",
        bound="What layers keep for the backward pass: inputs, gate pairs. No gradient checkpointing on either side.",
    )
]
