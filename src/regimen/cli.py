"""The command line: `regimen papers`, `regimen run`, `regimen report`, `regimen check`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from regimen.lab.runner import Plan

# torch and the papers are imported inside the commands: --help must not wait for them.

app = typer.Typer(
    help="Multi-task reinforcement learning and reward-driven post-training: run papers, and check parts of your own.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
USER_ERROR, INTERRUPTED = 2, 130


def _folder(text: str) -> Path:
    """The folder that a text names; the empty text of an unset shell variable would name the current one."""
    if not text.strip() or not text.isprintable():
        raise typer.BadParameter(f"'{_printable(text)}' is no name for a folder; expected printable characters")
    return Path(text)


def main() -> None:
    """The entry point of `regimen`."""
    app()


@app.command()
def papers(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    results: Annotated[
        bool, typer.Option("--results", help="Print every claim with its interval, and what the arms spent.")
    ] = False,
    update: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="For maintainers: record the verdict of the run (or of --all) in DIR."),
    ] = None,
) -> None:
    """List the papers and their recorded verdicts."""
    from regimen.papers import available, facts, record, verdicts

    if update is not None:
        with _clear_errors():
            from regimen.lab.results import FILE, read_results

            whole = not (update / FILE).exists() and sorted(path.parent for path in update.glob(f"*/{FILE}"))
            for folder in whole or [update]:
                record(read_results(folder))
    if results:
        from regimen.lab.overview import overview

        typer.echo(overview(verdicts()), nl=False)
        return
    rows = []
    with _clear_errors(ValueError, SyntaxError):  # A paper that is being written.
        recorded = verdicts()
        for slug in available():
            known, entry = facts(slug), recorded.get(slug)
            rows.append((slug, known["title"], known["arxiv"], known["verb"], known["policy"], _verdict(entry)))
    if markdown:
        typer.echo("| paper | | its idea is in | policy | verdict |\n|---|---|---|---|---|")
        for slug, title, arxiv, verb, policy, verdict in rows:
            typer.echo(f"| `{slug}` | [{title}](https://arxiv.org/abs/{arxiv}) | {verb} | {policy} | {verdict} |")
        return
    from rich.table import Column, Table

    widest = max(len(row[0]) for row in rows)
    table = Table(Column("paper", min_width=widest), "title", "its idea is in", "policy", "verdict")
    for slug, title, _, verb, policy, verdict in rows:
        table.add_row(f"[bold]{slug}[/bold]", title, verb, policy, verdict)
    _console().print(table)


@app.command()
def run(
    paper: Annotated[
        str | None,
        typer.Argument(help="A paper of 'regimen papers', such as unipic2, or a Python file with a PAPER of your own."),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every paper, one after the other; goes on where it stopped.")
    ] = False,
    scale: Annotated[str, typer.Option(help="quick (a smoke test), default (for the verdict) or full.")] = "default",
    seeds: Annotated[
        str | None, typer.Option(help="Such as 0-4 or 7,8,9.", show_default="0-4; 0 for scale quick")
    ] = None,
    arms: Annotated[
        str | None,
        typer.Option(
            help="Names with commas; what they start from is added.", show_default="all but the extended ones"
        ),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Change a setting of the paper, or a knob.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write.", show_default="runs/<paper or all>-<scale>", metavar="DIR", parser=_folder),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue what is in the folder, to the same numbers.")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes side by side.", show_default="one per CPU; 1 on a GPU"),
    ] = None,
) -> None:
    """Train a paper's method and its baselines over several seeds, and say whether its claims hold."""
    from functools import partial

    with _clear_errors():
        from regimen.lab.runner import ExperimentInterrupted, Plan
        from regimen.lab.settings import parse_seeds
        from regimen.papers import available, load

        _check_run(paper, every, arms, set_)
        root = out or Path("runs") / f"{Path(paper or 'all').stem}-{scale}"
        plans = {}
        for slug in available() if paper is None else [paper]:
            load(slug)
            folder = root / slug if every else root
            plans[slug] = Plan(
                load=partial(load, slug),
                out=folder,
                scale=scale,
                seeds=parse_seeds(seeds) if seeds is not None else None,
                arms=[name.strip() for name in arms.split(",") if name.strip()] if arms is not None else None,
                overrides=dict(_assignment(text) for text in set_ or ()),
                resume=resume or (every and folder.exists()),
                workers=workers,
            )
        found: dict[str, dict[str, Any]] = {}
        try:
            for slug, plan in plans.items():
                found[slug] = _run(plan)
                _show(found[slug], plan.out)
                if every:
                    _write_overview(found, root)
        except ExperimentInterrupted:
            _say(f"stopped; what was trained is kept. Continue with: {_continuation()}")
            raise typer.Exit(INTERRUPTED) from None
    failed = [_failed(results) for results in found.values() if results["failures"]]
    for line in failed:
        _say(line)
    if failed:
        raise typer.Exit(1)


def _check_run(paper: str | None, every: bool, arms: str | None, changes: list[str] | None) -> None:
    """Either one paper, or all of them as they are."""
    from regimen.lab.experiment import ExperimentError

    if (paper is None) != every:
        raise ExperimentError("expected the name of a paper (see 'regimen papers'), or --all")
    if every and (arms is not None or changes):
        raise ExperimentError("--arms and --set are of one paper; with --all every paper is run as it is")


def _write_overview(found: dict[str, dict[str, Any]], root: Path) -> None:
    """One results table of all papers so far, for readers and for programs."""
    import json

    from regimen.lab.overview import digest, overview
    from regimen.storage import write_text

    digests = {slug: digest(results) for slug, results in found.items()}
    write_text(root / "overview.json", json.dumps(digests, indent=1) + "\n")
    write_text(root / "overview.md", overview(digests))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a 'regimen run'.", metavar="DIR", parser=_folder)],
) -> None:
    """Make a run's report.html anew."""
    with _clear_errors():
        from regimen.lab.report import write_report

        typer.echo(write_report(folder))


@app.command()
def check(file: Annotated[Path, typer.Argument(help="A Python file with parts of your own.")]) -> None:
    """Try the rewards, tasks, credits, objectives and controllers defined in a file, and explain what fails."""
    from rich.markup import escape

    from regimen.checkers import FileError, check_file

    with _clear_errors(FileError):
        results = check_file(file)
    console = _console()
    for result in results:
        mark = "[green]passes[/green]" if result.ok else "[red]fails[/red]"
        console.print(f"{mark}  [bold]{escape(result.part)}[/bold]")
        for message in result.messages:
            console.print(f"        {escape(message)}", highlight=False)
    failed = sum(not result.ok for result in results)
    console.print(f"{len(results)} parts, {failed} with failures")
    raise typer.Exit(1 if failed else 0)


def _run(plan: Plan) -> dict[str, Any]:
    """Run a plan with its progress shown, and write the report."""
    from regimen.lab.display import Display
    from regimen.lab.report import write_report
    from regimen.lab.runner import run_experiment

    with Display(_console()) as display:
        results = run_experiment(plan, display)
    write_report(plan.out)
    return results


def _show(results: dict[str, Any], out: Path) -> None:
    """The end of a run: claims, arms, verdict, where the report is."""
    from regimen.lab.display import COLOURS, arms_table, spent_table, verdict_table

    console = _console()
    if results["claims"]:
        console.print(verdict_table(results))
    if any(results["arms"].values()):
        console.print(arms_table(results))
        console.print(spent_table(results))
    colour = COLOURS[results["verdict"]]
    smoke = " (scale quick is a smoke test: too short to mean anything)" if results["scale"] == "quick" else ""
    console.print(f"\n{results['paper']['slug']}: [bold {colour}]{results['verdict']}[/bold {colour}]{smoke}")
    console.print(f"report: {out / 'report.html'}", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _clear_errors(*more: type[Exception]) -> Iterator[None]:
    """Errors of use end the program with one line and exit code 2, not with a traceback."""
    from regimen.lab.experiment import ExperimentError
    from regimen.papers import UnknownPaper
    from regimen.storage import StorageError

    expected: tuple[type[Exception], ...] = (ExperimentError, StorageError, UnknownPaper, OSError, *more)
    try:
        yield
    except BrokenPipeError:  # Whoever reads our output has left; nothing is wrong.
        raise
    except expected as error:
        _say(str(error))
        raise typer.Exit(USER_ERROR) from None


def _assignment(text: str) -> tuple[str, str]:
    from regimen.lab.experiment import ExperimentError

    name, sign, value = text.partition("=")
    if not sign or not name.strip():
        raise ExperimentError(f"--set {text}: expected name=value")
    return name.strip(), value


def _failed(results: dict[str, Any]) -> str:
    """A sentence about the runs without a result."""
    failures, planned = results["failures"], len(results["arms"]) * len(results["seeds"])
    first = failures[0]
    return (
        f"{len(failures)} of {planned} runs failed, the first of them {first['arm']} seed {first['seed']}: "
        f"{first['reason']}; what is trained is kept, try the others again with --resume"
    )


def _continuation() -> str:
    """This command, to be continued."""
    import shlex

    words = ["regimen", *sys.argv[1:]]
    return shlex.join(words if "--resume" in words else [*words, "--resume"])


def _verdict(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "not run"
    scale = "" if entry["scale"] == "default" else f", scale {entry['scale']}"
    return f"{entry['verdict']} ({len(entry['seeds'])} seeds{scale})"


def _console() -> Console:
    from rich.console import Console

    return Console()


def _say(text: str) -> None:
    """One line on standard error."""
    typer.echo(f"regimen: {_printable(' '.join(text.split()))}", err=True)


def _printable(text: str) -> str:
    """A text with escapes in the place of characters that would steer a terminal or that it cannot show."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


if __name__ == "__main__":
    main()
