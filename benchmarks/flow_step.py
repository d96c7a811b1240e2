"""Seconds of one reinforcement step of a flow policy, and where they go, beside the bare network calls.

    python benchmarks/flow_step.py [--repeats 15] [--json FILE]

"Bare" is the least that any implementation must do with this network: `sampling_steps` forward passes of the batch, and
a forward and backward pass for every (sample, step) pair that is learned from. Each phase is timed in turn with the
bare calls (A B A B ...), one thread, and the minimum and median over the repeats are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from regimen.iteration import Counters, StageRun
from regimen.papers import unipic2


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds and result."""
    start = time.perf_counter()
    result = function()
    return (time.perf_counter() - start) * 1e3, result


def one_turn(run: StageRun, counters: Counters, rng: torch.Generator) -> dict[str, float]:
    """The loop's phases one by one, in milliseconds."""
    spent: dict[str, float] = {}
    metrics: dict[str, float] = {}
    spent["collect"], rollout = timed(lambda: run._collect(rng, counters))
    spent["judge"], rollout = timed(lambda: run._judge(rollout, metrics))
    spent["credit"], rollout = timed(lambda: run.stage.credit(rollout, run.board))
    run.memory.add(rollout)
    spent["learn"], _ = timed(lambda: run._learn(rollout, 1, metrics, counters, rng))
    return spent


def bare(run: StageRun) -> dict[str, Callable[[], Any]]:
    """The network calls of one turn and nothing else."""
    policy, task, size = run.cast["policy"], run.stage.tasks[0], run.stage.batch_size
    steps = int(run.board["sampling_steps"])
    contexts = task.rows[torch.arange(size)]
    x, half = torch.randn(size, *policy.shape), torch.arange(size // 2).repeat_interleave(steps - 1)
    pairs, halves = torch.randn(len(half), *policy.shape), task.rows[half]

    @torch.no_grad()
    def sample() -> None:
        for _ in range(steps):
            policy.denoiser(x, torch.full((size,), 0.5), contexts)

    def learn() -> None:
        for _ in range(2):
            policy.denoiser(pairs, torch.full((len(half),), 0.5), halves).square().mean().backward()

    return {"collect": sample, "learn": learn}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    regimen = unipic2.staged(100, unipic2.Settings())
    run = StageRun(regimen, regimen.stages[0])
    run.start(fresh=True)
    rng, counters, calls = torch.Generator().manual_seed(0), Counters(), bare(run)
    ours, least = defaultdict(list), defaultdict(list)
    for _ in range(options.repeats + 2):
        for phase, spent in one_turn(run, counters, rng).items():
            ours[phase].append(spent)
        for phase, call in calls.items():
            least[phase].append(timed(call)[0])
    table = {}
    for phase, values in ours.items():
        values, floor = values[2:], least[phase][2:] if phase in least else []
        table[phase] = {
            "min_ms": min(values),
            "median_ms": statistics.median(values),
            "bare_median_ms": statistics.median(floor) if floor else 0.0,
        }
    table["all"] = {key: sum(row[key] for row in table.values()) for key in ("min_ms", "median_ms", "bare_median_ms")}
    print(f"load {os.getloadavg()[0]:.2f}, torch {torch.__version__}, {platform.machine()}, 1 thread")
    print(f"{'phase':10}{'min ms':>10}{'median ms':>12}{'bare ms':>10}{'bare/ours':>11}")
    for phase, row in table.items():
        share = f"{row['bare_median_ms'] / row['median_ms']:.2f}" if row["bare_median_ms"] else ""
        print(f"{phase:10}{row['min_ms']:10.1f}{row['median_ms']:12.1f}{row['bare_median_ms']:10.1f}{share:>11}")
    if options.json:
        options.json.write_text(json.dumps({"load": os.getloadavg(), "torch": torch.__version__, "phases": table}))


if __name__ == "__main__":
    main()
