"""What the workers of `test_crew` do; as a program, a parent that is killed while its worker is at work."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from regimen.lab.crew import Crew, Line, Stopped


def work(task: Any, line: Line) -> Any:
    """Does what the task says."""
    kind, value = task
    if kind == "raise":
        raise KeyError(value)
    if kind == "die":
        os.kill(os.getpid(), value)
    if kind == "wait":
        line.tell("waiting")
        while not line.told_to_stop():
            time.sleep(0.01)
        Path(value).write_text("stopped")
        raise Stopped
    return value, os.environ["OMP_NUM_THREADS"]


def main(file: str) -> None:
    """Start a worker, and be killed."""
    crew = Crew(1, work)
    crew.submit("a", ("wait", file))
    while not crew.wait(1.0):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1])
