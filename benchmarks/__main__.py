"""Every job beside its peer, one table: `python -m benchmarks [JOB ...] [--repeats 5] [--save FILE]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import page
from benchmarks.harness import Row, catalogue, find, measure, save


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("jobs", nargs="*", metavar="JOB", help="all by default")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of measurements of each job")
    parser.add_argument("--save", type=Path, help="results file; rows of other jobs in it are kept")
    parser.add_argument("--list", action="store_true", help="name the jobs and stop")
    parser.add_argument("--page", type=Path, help="put the table of benchmarks/results.json into this page, and stop")
    options = parser.parse_args()
    if options.list:
        print("\n".join(catalogue()))
    elif options.page:
        page.write(options.page)
    else:
        _measure(options.jobs or list(catalogue()), options.repeats, options.save)


def _measure(names: list[str], repeats: int, file: Path | None) -> None:
    rows = []
    for name in names:
        rows.append(measure(find(name), repeats))
        Console(width=160).print(table(rows[-1:]))
        if file:
            save(rows[-1:], file)
    if len(rows) > 1:
        Console(width=160).print(table(rows))


def table(rows: list[Row]) -> Table:
    """One line for each job."""
    result = Table()
    for column in ("job", "unit", "ours: median (best)", "peer", "theirs: median (best)", "ratio", "target", "results"):
        result.add_column(column)
    for row in rows:
        result.add_row(
            row.job,
            row.unit,
            row.spread("ours"),
            row.peer,
            row.spread("theirs"),
            f"{row.ratio:.2f}",
            row.verdict,
            _results(row),
        )
    return result


def _results(row: Row) -> str:
    """What the first pair came to: ours / theirs."""
    sides = [measured[0].results for measured in (row.ours, row.theirs) if measured]
    names = dict.fromkeys(name for side in sides for name in side)
    return ", ".join(f"{n} {' / '.join(f'{side[n]:.4g}' if n in side else '-' for side in sides)}" for n in names)


if __name__ == "__main__":
    main()
