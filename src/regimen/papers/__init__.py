"""The papers, one file each, found by name: `load("unipic2")`; and experiments in files of one's own."""

from __future__ import annotations

import ast
import difflib
import importlib
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regimen.lab.experiment import Paper

_FOLDER = Path(__file__).parent
VERDICTS = _FOLDER / "verdicts.json"
"""Verdicts that maintainers recorded with `regimen papers --update`, by slug."""


class UnknownPaper(LookupError):
    """There is no paper of that name."""

    def __init__(self, slug: str, known: Iterable[str]) -> None:
        known = list(known)
        near = difflib.get_close_matches(slug, known, n=1, cutoff=0.5)
        hint = f" did you mean '{near[0]}'?" if near else ""
        super().__init__(f"there is no paper '{slug}';{hint} there are: {', '.join(known)}")


def available() -> list[str]:
    """The slugs of all papers, in order."""
    return sorted(path.stem.replace("_", "-") for path in _FOLDER.glob("[!_]*.py"))


def load(name: str) -> Paper:
    """The paper with that slug, or the `PAPER` of a Python file of one's own (a name that ends with .py).

    Raises:
        UnknownPaper: there is none; the message names the nearest.
        ExperimentError: the file cannot be imported, or defines no `PAPER`.
    """
    if name.endswith(".py"):
        return _load_file(Path(name).resolve())
    paper: Paper = importlib.import_module(f"regimen.papers.{_file(name).stem}").PAPER
    return paper


def _load_file(path: Path) -> Paper:
    """The file imported by its own name, as Python imports a script's neighbours, so that workers find it again."""
    from regimen.lab.experiment import ExperimentError, Paper

    if not path.is_file():
        raise ExperimentError(f"{path} is not a file; expected a Python file with an experiment of your own")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    try:
        module = importlib.import_module(path.stem)
    except Exception as error:
        raise ExperimentError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    if module.__file__ is None or Path(module.__file__).resolve() != path:
        raise ExperimentError(f"{path} has the name of another module, {module.__file__}; rename your file")
    paper = getattr(module, "PAPER", None)
    if not isinstance(paper, Paper):
        raise ExperimentError(
            f"{path} defines no PAPER = Paper(...), but {type(paper).__name__}; see regimen.lab.experiment, and "
            "examples/ for experiments to begin with"
        )
    return paper


def facts(slug: str) -> dict[str, str]:
    """A paper's slug, title, arXiv number, verb, policy and claim, read from its file without importing it."""
    for node in ast.parse(_file(slug).read_bytes()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            target = node.targets[0]
            if isinstance(target, ast.Name) and target.id == "PAPER":
                literal = {k.arg: k.value for k in node.value.keywords if isinstance(k.value, ast.Constant)}
                return {str(name): str(value.value) for name, value in literal.items()}
    raise ValueError(f"{_file(slug).name} has no PAPER = Paper(...); expected one, with its texts as literals")


def verdicts() -> dict[str, Any]:
    """What was recorded, by slug; a paper without an entry has not been run."""
    recorded: dict[str, Any] = json.loads(VERDICTS.read_text()) if VERDICTS.exists() else {}
    return recorded


def record(results: Mapping[str, Any]) -> None:
    """Keep the verdict of an experiment's `results.json` with the package.

    Raises:
        ExperimentError: it is a smoke test, or not all that the paper's verdict needs was trained.
    """
    from regimen.lab.experiment import ExperimentError
    from regimen.lab.overview import digest
    from regimen.storage import write_text

    gaps = [
        claim["name"]
        for claim in (*results["claims"], *results["left_out"])
        if claim["judged"] and claim.get("missing", True)
    ]
    if results["scale"] == "quick" or results["changed"] or gaps:
        raise ExperimentError(
            f"this run of {results['paper']['slug']} is no evidence for a verdict: its scale is '{results['scale']}', "
            f"its changed settings are {', '.join(results['changed']) or 'none'}, its judged claims with gaps: "
            f"{', '.join(gaps) or 'none'}; expected scale 'default' or 'full', no changes and no gaps"
        )
    recorded = dict(sorted((verdicts() | {results["paper"]["slug"]: digest(results)}).items()))
    write_text(VERDICTS, json.dumps(recorded, indent=1) + "\n")


def _file(slug: str) -> Path:
    if slug not in available():
        raise UnknownPaper(slug, available())
    return _FOLDER / f"{slug.replace('-', '_')}.py"
