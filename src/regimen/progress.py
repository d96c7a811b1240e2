"""What a run tells while it runs, and a progress bar that shows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


@dataclass(frozen=True)
class Event:
    """Something a listener may show: a stage's start, a finished iteration, an evaluation, a warning."""

    kind: Literal["stage", "step", "evaluation", "warning"]
    stage: str
    step: int
    total: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    text: str = ""


Listener = Callable[[Event], None]


class ProgressBar:
    """A listener with a bar per stage; evaluations and warnings are lines. It shows nothing but on a terminal.

    `train` uses one unless it is given a listener. To keep it up over several runs, use it as a context manager.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._visible = self._console.is_terminal
        self._bars = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._visible,
        )
        self._current: TaskID | None = None

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        if not self._visible:
            return
        if event.kind == "stage":
            self._current = self._bars.add_task(event.stage, total=event.total, completed=event.step, shown="")
        elif event.kind == "step" and self._current is not None:
            self._bars.update(self._current, completed=event.step, shown=headline(event.metrics))
        elif event.kind == "evaluation":
            numbers = "  ".join(f"{name} {value:.3g}" for name, value in event.metrics.items())
            self._console.print(f"[dim]{escape(event.stage)} {event.step}:[/dim] {escape(numbers)}", highlight=False)
        elif event.kind == "warning":
            self._console.print(f"[yellow]warning[/yellow] ({escape(event.stage)} {event.step}): {escape(event.text)}")


def headline(metrics: Mapping[str, float]) -> str:
    """The one number of an iteration that a user follows: its reward, or else its loss."""
    if "reward/total" in metrics:
        return f"reward {metrics['reward/total']:.3f}"
    losses = [value for name, value in metrics.items() if name.endswith("/loss")]
    return f"loss {losses[0]:.4f}" if losses else ""
