"""One side of one job, in a process of its own: `python -m benchmarks.worker JOB ours|theirs SEED` prints JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import torch

from benchmarks.harness import find


def main() -> None:
    """Measure once."""
    name, side, seed = sys.argv[1:]
    torch.set_num_threads(1)
    torch.manual_seed(int(seed))
    print(json.dumps(asdict(getattr(find(name), side)(int(seed)))))


if __name__ == "__main__":
    main()
