"""Which of torch's operations a side of a job spends its time in: `python -m benchmarks.profile JOB [--side theirs]`.

Shares are of the time of the whole job, set-up and warm-up included; the machine must be quiet. Watching adds a
microsecond or two to every operation, so the shares of small ones are too large.
"""

from __future__ import annotations

import argparse
import time

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import Job, Side, find


def main() -> None:
    """Run a side once and print its operations."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.add_argument("job")
    parser.add_argument("--side", choices=("ours", "theirs"), default="ours")
    parser.add_argument("--top", type=int, default=12, help="operations that are named")
    options = parser.parse_args()
    Console().print(table(find(options.job), options.side, options.top))


def table(job: Job, side: Side, top: int) -> Table:
    """The operations that take most of a side's time, and what is left."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    work = getattr(job, side)
    start = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        work(0)
        total = (time.perf_counter() - start) * 1e6
    found = sorted(watched.key_averages(), key=lambda entry: -entry.self_cpu_time_total)
    result = Table("operation", "calls", "share", title=f"{job.name}, {side}")
    for entry in found[:top]:
        result.add_row(entry.key, f"{entry.count:,}", f"{entry.self_cpu_time_total / total:.1%}")
    rest = sum(entry.self_cpu_time_total for entry in found[top:])
    result.add_row("other operations", f"{sum(entry.count for entry in found[top:]):,}", f"{rest / total:.1%}")
    outside = total - sum(entry.self_cpu_time_total for entry in found)
    result.add_row("between operations", "", f"{max(outside, 0) / total:.1%}")
    return result


if __name__ == "__main__":
    main()
