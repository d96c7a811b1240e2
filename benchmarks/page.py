"""The table of a page of the documentation, made from the results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmarks.harness import Row, catalogue, load

RESULTS = Path(__file__).parent / "results.json"
BEGIN, END = "<!-- begin: python -m benchmarks --page -->", "<!-- end -->"


def write(page: Path, results: Path = RESULTS) -> None:
    """Put the table of a results file between the two markers of a page; `ValueError` if it does not have them."""
    page.write_text(filled(page.read_text(encoding="utf-8"), load(results)), encoding="utf-8")


def filled(text: str, rows: Mapping[str, Row]) -> str:
    """A page's text with the table of these rows; `ValueError` if it does not have the two markers."""
    if text.count(BEGIN) != 1 or END not in text.partition(BEGIN)[2]:
        raise ValueError(f"the page has no place for the table; expected a line '{BEGIN}' and after it a line '{END}'")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{rest.partition(END)[2]}"


def table(rows: Mapping[str, Row]) -> str:
    """Markdown: a line for each job that was measured, in the catalogue's order; what limits them; on which machine."""
    jobs = {name: job for name, job in catalogue().items() if name in rows}
    lines = [
        "| job | figure | ours: median (best) | peer | peer: median (best) | ours / peer | target | measured |",
        "|---|---|---|---|---|---|---|---|",
        *(_line(rows[name]) for name in jobs),
    ]
    bounds = [f"- `{name}`: {' '.join(job.bound.split())}" for name, job in jobs.items() if job.bound]
    machines = dict.fromkeys(_machine(rows[name]) for name in jobs)
    return "\n\n".join(["\n".join(lines), *(["\n".join(bounds)] if bounds else []), *machines])


def _line(row: Row) -> str:
    ratio = f"{row.ratio:.2f}" if row.theirs else ""
    measured = f"{row.date}, {len(row.ours)} times; others' load up to {max(row.loads):.0%}"
    cells = [f"`{row.job}`", row.unit, row.spread("ours"), row.peer, row.spread("theirs"), ratio, row.verdict, measured]
    return f"| {' | '.join(cells)} |"


def _machine(row: Row) -> str:
    versions = [f"{name} {version}" for name, version in row.machine.items() if name not in ("processor", "cores")]
    return f"Machine: {row.machine['processor']}, {row.machine['cores']} cores; {', '.join(sorted(versions))}."
