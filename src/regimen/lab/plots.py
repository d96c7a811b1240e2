"""Figures of a report, each readable by itself: axes named, one colour per arm throughout."""

from __future__ import annotations

import io
import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5BA6", "#8C8C00", "#4D4D4D")
METHOD, START = "#D55E00", "#555555"
PATTERNS: tuple[Any, ...] = ("solid", (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))
"""Of lines that share a colour with others in their figure."""
DASHED = (0, (5, 3))
VERDICTS = {"holds": "#00795a", "unclear": "#8a6d00", "does not hold": "#c0392b"}
INK, FAINT = "#222222", "#D9D9D9"
_DPI = 150
_WIDTH = 4.8


@dataclass(frozen=True)
class Curve:
    """One line: where it goes, its band (NaN where there is none), points of it to mark, and how it looks."""

    label: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    strong: bool = False
    marks: Sequence[float] = ()
    dashed: bool = False


def colours(arms: Mapping[str, Mapping[str, Any]], method: str) -> dict[str, str]:
    """A colour per arm: grey for those that others start from, the signal colour for the method."""
    starts = {arm["start"] for arm in arms.values()}
    chosen, rest = {}, iter(COLOURS * (1 + len(arms) // len(COLOURS)))
    for name in arms:
        chosen[name] = METHOD if name == method else START if name in starts else next(rest)
    return chosen


def forest(claims: Sequence[Mapping[str, Any]]) -> Figure:
    """Claims, one above the other: a value per seed, the mean, its 95 % interval, the threshold."""
    figure = _figure(5.2, 0.2 + 0.85 * len(claims))
    rows = figure.subplots(len(claims), 1, squeeze=False)[:, 0]
    for axes, claim in zip(rows, claims, strict=True):
        colour = VERDICTS[claim["verdict"]] if claim["judged"] else START
        values = [value for value in claim["values"].values() if value is not None]
        axes.axvline(claim["above"], color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.scatter(values, [0] * len(values), s=26, facecolors="none", edgecolors=colour, linewidths=1, alpha=0.65)
        if claim["low"] is not None:
            axes.plot(
                [claim["low"], claim["high"]], [0, 0], color=colour, linewidth=4.5, solid_capstyle="round", alpha=0.55
            )
        if claim["mean"] is not None:
            axes.plot(claim["mean"], 0, "D", color=colour, markersize=7)
        _forest_row(axes, claim, values)
    return figure


def _forest_row(axes: Axes, claim: Mapping[str, Any], values: Sequence[float]) -> None:
    shown = [*values, claim["above"], *(claim[k] for k in ("low", "high") if claim[k] is not None)]
    room = 0.08 * ((max(shown) - min(shown)) or 1.0)
    axes.set_xlim(min(shown) - room, max(shown) + room)
    axes.set_ylim(-1, 1)
    axes.set_yticks([])
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(labelsize=8, color="#888888")
    axes.spines["bottom"].set_color("#888888")
    said = f": {claim['verdict']}" if claim["judged"] else ""
    axes.set_title(textwrap.fill(f"{claim['text']}{said}", 62), loc="left", fontsize=9)


def lines(curves: Sequence[Curve], title: str, x_label: str, y_label: str, steps: bool = False) -> Figure:
    """Lines with their bands over a common axis."""
    figure = _figure(_WIDTH, 3.1 + 0.2 * math.ceil(len(curves) / 2))
    axes = figure.subplots()
    patterns = _patterns(curves)
    for curve, pattern in sorted(zip(curves, patterns, strict=True), key=lambda pair: pair[0].strong):
        style: dict[str, Any] = {"drawstyle": "steps-post"} if steps else {}
        style["linewidth"] = 2.4 if curve.strong else 1.6
        style["linestyle"] = pattern
        if len(curve.x) == 1:
            style["marker"] = "o"
        axes.plot(curve.x, curve.y, color=curve.colour, label=curve.label, **style)
        if len(curve.low) and np.isfinite(curve.low).any():
            axes.fill_between(curve.x, curve.low, curve.high, color=curve.colour, alpha=0.15, linewidth=0)
        if curve.marks:
            there = [(x, y) for x, y in zip(curve.x, curve.y, strict=True) if x in curve.marks]
            axes.plot(*zip(*there, strict=True), "o", color=curve.colour, markersize=4.5)
    axes.set_title(textwrap.shorten(title, 70), loc="left", fontsize=10)
    axes.set_xlabel(x_label, fontsize=8.5)
    axes.set_ylabel(y_label, fontsize=8.5)
    _tidy(axes)
    handles, labels = axes.get_legend_handles_labels()
    order = {curve.label: i for i, curve in enumerate(curves)}
    ordered = sorted(zip(handles, labels, strict=True), key=lambda pair: order[pair[1]])
    figure.legend(
        [handle for handle, _ in ordered], [textwrap.shorten(label, 40) for _, label in ordered],
        loc="outside lower left", ncols=2, fontsize=7, frameon=False,
    )  # fmt: skip
    return figure


def _patterns(curves: Sequence[Curve]) -> list[Any]:
    """How each line is drawn, so that no two of one colour look alike."""
    seen = Counter[str]()
    patterns = []
    for curve in curves:
        patterns.append(DASHED if curve.dashed else PATTERNS[seen[curve.colour] % len(PATTERNS)])
        seen[curve.colour] += not curve.dashed
    return patterns


def matrix(title: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]]) -> Figure:
    """Numbers by stage (rows) and metric (columns); darker is larger, relative to a column's largest value."""
    table = np.asarray(values, dtype=float)
    largest, smallest = np.fmax.reduce(np.abs(table), 0), np.fmin.reduce(table, 0)  # NaN where there is no number.
    shade = np.clip((table - smallest) / np.where(largest > 0, largest, 1.0), 0, 1)
    figure = _figure(1.3 + 1.05 * len(columns), 1.15 + 0.42 * len(rows))
    axes = figure.subplots()
    axes.imshow(0.08 + 0.75 * shade, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        text = "–" if math.isnan(value) else f"{value:.2f}"
        axes.text(
            column,
            row,
            text,
            ha="center",
            va="center",
            fontsize=10,
            color="white" if shade[row, column] > 0.6 else INK,
        )
    axes.set_xticks(range(len(columns)), [textwrap.fill(name, 14) for name in columns], fontsize=8)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=9)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(0.5, len(columns) - 1), minor=True)
    axes.set_yticks(np.arange(0.5, len(rows) - 1), minor=True)
    axes.grid(which="minor", color="white", linewidth=3)
    axes.tick_params(which="minor", length=0)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG file's content."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _tidy(axes: Axes) -> None:
    axes.spines[["right", "top"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, color="#888888")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.margins(x=0.02)
