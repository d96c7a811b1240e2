"""A time limit on code that may hang, in this process. See `IsolatedReward` for code that cannot be interrupted."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class LimitReached(TimeoutError):
    """The body of a `time_limit` did not return in time."""


@contextmanager
def time_limit(seconds: float | None, what: str) -> Iterator[None]:
    """Raise `LimitReached` in the body after `seconds`; no limit if `None` or outside the main thread.

    It interrupts Python code and blocking system calls. A compiled function that never returns cannot be
    interrupted from within: run such code in a child process (`IsolatedReward`). A body that swallows the
    exception is interrupted again every second, and has failed even if it then returns.
    """
    if seconds is None or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return
    reached = LimitReached(f"{what} did not return within {seconds:g} s")
    expired = False

    def expire(_signal: int, _frame: FrameType | None) -> None:
        nonlocal expired
        expired = True
        raise reached

    started = time.monotonic()
    previous = signal.signal(signal.SIGALRM, expire)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Exception as error:
        if expired and error is not reached:
            raise reached from error
        raise
    finally:
        # Again: an alarm may have come just before the first.
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        if left:
            # Somebody else's timer (a test runner's, say) goes on as if it had never been interrupted.
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - started), 1e-3), interval)
    if expired:
        raise reached
