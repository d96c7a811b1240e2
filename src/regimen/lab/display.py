"""What an experiment looks like on a terminal, and in a log."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from regimen.lab.experiment import SPENT
from regimen.lab.jobs import Note
from regimen.lab.results import bracket, left_out, number, shown_metrics
from regimen.lab.runner import Key
from regimen.lab.runner import Progress as Told

COLOURS = {"holds": "green", "unclear": "yellow", "does not hold": "red"}
_LOG_PAUSE_S = 10.0


class Display:
    """A listener of `run_experiment`: live bars on a terminal, plain lines elsewhere. A context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = console.is_terminal and not console.is_dumb_terminal
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=18),
            TextColumn("{task.fields[shown]}"),
            console=console,
            disable=not self._live,
            refresh_per_second=5,
        )
        self._whole: TaskID | None = None
        self._rows: dict[Key, TaskID] = {}
        self._metrics: dict[Key, str] = {}
        self._done: dict[Key, float] = {}
        self._begun: dict[Key, float] = {}
        self._started, self._already, self._logged = time.monotonic(), 0, 0.0

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def __call__(self, told: Told) -> None:
        """Show what was told."""
        key = (told.arm, told.seed)
        if told.kind == "plan":
            self._already = told.finished
            text = f"{told.jobs} runs" + (f", {told.finished} of them finished before" if told.finished else "")
            self._console.print(text, highlight=False)
            self._whole = self._bars.add_task("[bold]all runs", total=float(told.jobs), shown="")
        elif told.kind == "note" and told.note is not None:
            self._note(key, told.note)
        else:
            self._event(key, told)
        self._update_whole(told)

    def _note(self, key: Key, note: Note) -> None:
        name = _name(key)
        if note.kind == "begin":
            self._begun[key] = time.monotonic()
            if key not in self._rows:
                self._rows[key] = self._bars.add_task(name, total=1.0, shown="starting")
            return
        self._done[key] = note.done
        if note.kind == "warning":
            place = f", {note.stage} {note.step}" if note.stage else ""
            self._print(f"[yellow]warning[/yellow] {name}{place}: {escape(note.text)}")
        elif note.kind == "evaluation":
            self._metrics[key] = _numbers(note.metrics)
            if not self._live and time.monotonic() - self._logged > _LOG_PAUSE_S:
                self._print(f"{name}, {note.stage} {note.step}: {_numbers(note.metrics)}")
        elif key in self._rows:
            reward = "" if note.reward is None else f"reward {note.reward:.3f}  "
            left = _left(time.monotonic() - self._begun[key], note.done)
            shown = f"{note.stage} {note.step}/{note.total}  [dim]{left}[/dim]  {reward}{self._metrics.get(key, '')}"
            self._bars.update(self._rows[key], completed=note.done, shown=shown)

    def _event(self, key: Key, told: Told) -> None:
        name, count = _name(key), f"[dim]{told.finished}/{told.jobs}[/dim]"
        if told.kind == "done":
            spent = time.monotonic() - self._begun.get(key, time.monotonic())
            how = f", {told.text}" if told.text else f" in {spent:.0f} s"
            self._print(f"{count} [green]done[/green] {name}{how}: {_numbers(told.metrics)}")
        elif told.kind == "failed":
            self._print(f"{count} [red]failed[/red] {name}: {escape(told.text)}")
        elif told.kind == "died":
            self._print(f"[yellow]the process of[/yellow] {name} was lost, {told.text}; it goes on from its checkpoint")
        elif told.kind == "stopping":
            self._print(f"stopping: {told.text}; press Ctrl-C again to end at once")
        if told.kind in ("done", "failed", "died"):
            self._done.pop(key, None)
            if (row := self._rows.pop(key, None)) is not None:
                self._bars.remove_task(row)

    def _update_whole(self, told: Told) -> None:
        if self._whole is None:
            return
        done = told.finished + sum(self._done.values())
        share = (done - self._already) / max(told.jobs - self._already, 1)
        left = _left(time.monotonic() - self._started, share)
        self._bars.update(self._whole, completed=done, shown=f"{told.finished}/{told.jobs}  [dim]{left}[/dim]")

    def _print(self, text: str) -> None:
        self._logged = time.monotonic()
        self._console.print(text, highlight=False, soft_wrap=True)


def verdict_table(results: Mapping[str, Any]) -> Table:
    """The claims with mean, interval and verdict."""
    table = Table(title="Claims", title_justify="left", title_style="bold", caption_justify="left")
    table.caption = left_out(results) or None
    for name, justify in (
        ("claim", "left"),
        ("mean", "right"),
        ("95 % interval", "right"),
        ("above", "right"),
        ("verdict", "left"),
    ):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for claim in results["claims"]:
        colour = COLOURS[claim["verdict"]]
        verdict = f"[{colour}]{claim['verdict']}[/{colour}]" if claim["judged"] else "[dim]not judged[/dim]"
        note = f"\n[dim]{escape(claim['note'])}[/dim]" if claim["note"] else ""
        bounds = bracket(claim)
        table.add_row(escape(claim["text"]) + note, number(claim["mean"]), bounds, f"{claim['above']:g}", verdict)
    return table


def arms_table(results: Mapping[str, Any]) -> Table:
    """The arms' first metrics at the end, means over seeds with their intervals."""
    table = Table(title="Arms (mean over seeds, 95 % interval)", title_justify="left", title_style="bold")
    labels = dict(list(shown_metrics(results).items())[:3])
    table.add_column("arm")
    for label in labels.values():
        table.add_column(label, justify="right")
    for arm, title in _trained(results).items():
        found = results["intervals"][arm]
        cells = (f"{number(found[m]['mean'])} [dim]{escape(bracket(found[m]))}[/dim]".strip() for m in labels)
        table.add_row(escape(title), *cells)
    return table


def spent_table(results: Mapping[str, Any]) -> Table:
    """What each arm cost, its start included, means over seeds."""
    table = Table(title="Spent per seed", title_justify="left", title_style="bold")
    table.add_column("arm")
    for name in SPENT.values():
        table.add_column(name, justify="right")
    for arm, title in _trained(results).items():
        seeds = results["arms"][arm].values()
        spent = (sum(entry.get(what, 0) for entry in seeds) / len(seeds) for what in SPENT)
        table.add_row(escape(title), *(f"{value:,.0f}" for value in spent))
    return table


def _trained(results: Mapping[str, Any]) -> dict[str, str]:
    """The titles of the arms that have results, by name."""
    return {arm: results["paper"]["arms"][arm]["title"] for arm, seeds in results["arms"].items() if seeds}


def _name(key: Key) -> str:
    return f"[bold]{key[0]}[/bold] seed {key[1]}"


def _numbers(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {number(value)}" for name, value in list(metrics.items())[:3])


def _left(spent: float, share: float) -> str:
    """Time left, from the time spent and the share that is done."""
    if share < 0.02:
        return ""
    seconds = spent * (1 - share) / share
    return f"{seconds:.0f} s left" if seconds < 90 else f"{seconds / 60:.0f} min left"
