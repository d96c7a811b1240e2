"""One table of many papers: claims with intervals, and what every arm spent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regimen.lab.experiment import SPENT
from regimen.lab.results import bracket, number

_KEPT = ("name", "text", "mean", "low", "high", "above", "verdict", "judged")
_FACTS = ("verdict", "scale", "seeds", "versions", "machine", "wall_clock_seconds")


def digest(results: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of an experiment's `results.json`: verdict, claims, and what each arm spent per seed, on average.

    What an arm spent includes the arms that it starts from: pre-training, and probes.
    """
    return {
        **{name: results[name] for name in _FACTS},
        "claims": [{name: claim[name] for name in _KEPT} for claim in results["claims"]],
        "spent": {
            results["paper"]["arms"][arm]["title"]: {
                what: round(sum(seed.get(what, 0) for seed in seeds.values()) / len(seeds), 1) for what in SPENT
            }
            for arm, seeds in results["arms"].items()
            if seeds
        },
    }


def overview(digests: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a table of all papers' claims, and one of what their arms spent.

    Args:
        digests: by slug, see `digest`.
    """
    claims = [
        "| paper | claim | mean [95 %] | needed | verdict | seeds | minutes |",
        "|---|---|---|---|---|---|---|",
        *(line for slug, entry in digests.items() for line in _claim_lines(slug, entry)),
    ]
    spent = [
        f"| paper | arm | {' | '.join(SPENT.values())} |",
        f"|---|---|{'---|' * len(SPENT)}",
        *(line for slug, entry in digests.items() for line in _spent_lines(slug, entry)),
    ]
    return "\n".join(["### Claims", "", *claims, "", "### Spent per seed", "", *spent]) + "\n"


def _claim_lines(slug: str, entry: Mapping[str, Any]) -> list[str]:
    lines = []
    seeds, minutes = len(entry["seeds"]), f"{entry['wall_clock_seconds'] / 60:.1f}"
    for claim in entry["claims"]:
        verdict = claim["verdict"] if claim["judged"] else f"({claim['verdict']})"
        mean = f"{number(claim['mean'])} {bracket(claim)}".strip()
        lines.append(
            f"| `{slug}` | {claim['text']} | {mean} | above {claim['above']:g} | {verdict} | {seeds} | {minutes} |"
        )
    return lines


def _spent_lines(slug: str, entry: Mapping[str, Any]) -> list[str]:
    return [
        f"| `{slug}` | {arm} | " + " | ".join(f"{spent.get(what, 0):,.0f}" for what in SPENT) + " |"
        for arm, spent in entry["spent"].items()
    ]
