"""What a paper is to the library: arms that differ in what it adds, claims about them, and scales."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from regimen.regimen import Regimen

SPENT = {
    "samples": "samples",
    "rows": "rows of data",
    "drawn": "drawn anew",
    "gradient_steps": "gradient steps",
    "seconds": "seconds",
}
"""What an arm is charged, and how reports call it; see `regimen.iteration.Counters`."""

Settings = Any
"""A paper's own frozen dataclass of numbers; a scale is an instance of it."""

_NAME = re.compile(r"[A-Za-z0-9_-]+")


class ExperimentError(ValueError):
    """An experiment cannot be run or reported as it was asked for; the message says why and what to do."""


@dataclass(frozen=True)
class Arm:
    """One way to train, repeated over seeds.

    Attributes:
        name: short, unique within the paper, of letters, digits, `-` and `_`; names folders and keys.
        title: how reports call it.
        build: `(seed, settings) -> Regimen`, the whole of the arm's own training.
        start: another arm whose final cast this one starts from; what that arm spent is charged to this one too.
        extended: trained only when asked for by name, or at scale "full".
        cached: keep what it trains for later experiments with the same configuration, see `regimen.lab.cache`; for
            an arm that others start from and that starts from none itself.
        ignores: settings that a cached arm does not depend on, nor its evaluations.
    """

    name: str
    title: str
    build: Callable[[int, Settings], Regimen]
    start: str | None = None
    extended: bool = False
    cached: bool = False
    ignores: Sequence[str] = ()

    def __post_init__(self) -> None:
        if (self.cached and self.start is not None) or (self.ignores and not self.cached):
            raise ValueError(
                f"arm '{self.name}': cached={self.cached}, start={self.start!r}, ignores={list(self.ignores)}; "
                "expected a cached arm to have no start, and `ignores` of a cached arm only"
            )


@dataclass(frozen=True)
class ArmResult:
    """What one arm did with one seed.

    Attributes:
        evaluations: the records of `metrics.jsonl` of kind "evaluation", in order; each has `stage`, `step`,
            `iterations` and `metrics`. The first, of stage "start", is of the cast it started from.
        samples, rows, gradient_steps, seconds, drawn: spent by the arm and the arms that it starts from, see `SPENT`.
        warnings: health warnings with counts.
        gradients: by update, the largest norm that a gradient of the arm's own training had, before it was limited.
    """

    evaluations: Sequence[Mapping[str, Any]]
    samples: int
    rows: int
    gradient_steps: int
    seconds: float
    drawn: int = 0
    warnings: Mapping[str, int] = field(default_factory=dict)
    gradients: Mapping[str, float] = field(default_factory=dict)

    @property
    def final(self) -> Mapping[str, float]:
        """Metrics after the last stage."""
        metrics: Mapping[str, float] = self.evaluations[-1]["metrics"]
        return metrics

    def after(self, stage: str) -> Mapping[str, float]:
        """Metrics at the end of a stage ("start": before any)."""
        for record in reversed(self.evaluations):
            if record["stage"] == stage:
                metrics: Mapping[str, float] = record["metrics"]
                return metrics
        raise KeyError(f"no evaluation after stage '{stage}'; there are: {[r['stage'] for r in self.evaluations]}")


SeedResults = Mapping[str, ArmResult]
"""One seed's results, by arm."""


@dataclass(frozen=True)
class Claim:
    """A number per seed, computed from that seed's arms (so that it is paired), and where it should lie.

    The claim *holds* if the whole 95 % interval of its mean over seeds lies above `above`, *does not hold* if all
    of it lies below, and is *unclear* otherwise. One that is not `judged` is printed with its interval and takes
    no part in the verdict.

    Attributes:
        name: short, unique.
        text: the sentence that is claimed.
        value: `SeedResults -> float`.
        arms: the arms that it needs.
        above: the threshold.
        judged: whether it decides the verdict.
    """

    name: str
    text: str
    value: Callable[[SeedResults], float]
    arms: Sequence[str]
    above: float = 0.0
    judged: bool = True


@dataclass(frozen=True)
class Paper:
    """A paper as the library runs it, or an experiment of one's own.

    Attributes:
        slug, title: which paper.
        claim: what it claims, in a sentence or two.
        arms: in the order in which reports list them.
        claims: what the verdict is computed from.
        metrics: evaluated metrics to show, name to label, the most important first.
        scales: settings by name; at least "quick" and "default".
        arxiv: its number there; of an experiment of one's own, nothing.
        verb: where its idea lives; policy: the kind it trains.
        requires: extras that scales need, such as {"full": "diffusers"}; an extra is named after the package it brings.
    """

    slug: str
    title: str
    claim: str
    arms: Sequence[Arm]
    claims: Sequence[Claim]
    metrics: Mapping[str, str]
    scales: Mapping[str, Settings]
    arxiv: str = ""
    verb: str = ""
    policy: str = ""
    requires: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        for name in [*names, *(claim.name for claim in self.claims)]:
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"{self.slug}: '{name}' names a folder or a key; expected letters, digits, '-' and '_'"
                )
        if len(set(names)) < len(names):
            raise ValueError(f"{self.slug}: arms {', '.join(names)}; expected each name once")
        for position, arm in enumerate(self.arms):
            if arm.start is not None and arm.start not in names[:position]:
                raise ValueError(
                    f"{self.slug}: arm '{arm.name}' starts from '{arm.start}'; expected an arm listed before it: "
                    f"{', '.join(names[:position]) or 'none'}"
                )
        fields = {field.name for settings in self.scales.values() for field in dataclasses.fields(settings)}
        for arm in self.arms:
            if absent := sorted(set(arm.ignores) - fields):
                raise ValueError(
                    f"{self.slug}: arm '{arm.name}' ignores settings that there are not: {', '.join(absent)}"
                )
        for claim in self.claims:
            if absent := sorted(set(claim.arms) - set(names)):
                raise ValueError(
                    f"{self.slug}: claim '{claim.name}' needs arms that there are not: {', '.join(absent)}"
                )

    @property
    def method(self) -> str:
        """The arm that the paper is about: the first one that its first judged claim needs."""
        judged = [claim for claim in self.claims if claim.judged and claim.arms]
        return judged[0].arms[0] if judged else self.arms[-1].name

    def arm(self, name: str) -> Arm:
        """The arm of that name; `ExperimentError` if there is none."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise ExperimentError(f"{self.slug} has no arm '{name}'{nearest(name, [a.name for a in self.arms])}")

    def settings(self, scale: str) -> Settings:
        """The settings of a scale; `ExperimentError` if there is none, or it needs an extra that is not installed."""
        if scale not in self.scales:
            raise ExperimentError(f"{self.slug} has no scale '{scale}'{nearest(scale, self.scales)}")
        extra = self.requires.get(scale)
        if extra is not None and importlib.util.find_spec(extra.replace("-", "_")) is None:
            raise ExperimentError(
                f"scale '{scale}' of {self.slug} needs {extra}, which is not installed: "
                f"pip install 'regimen-rl[{extra}]'"
            )
        return self.scales[scale]

    def selected(self, names: Sequence[str] | None, scale: str) -> list[Arm]:
        """The arms asked for, with those that they start from; all but the extended ones if none are asked for."""
        if names is None:
            names = [arm.name for arm in self.arms if scale == "full" or not arm.extended]
        if not names:
            raise ExperimentError(
                f"no arm of {self.slug} is named; expected some of {', '.join(arm.name for arm in self.arms)}"
            )
        wanted: set[str] = set()
        for name in names:
            arm: Arm | None = self.arm(name)
            while arm is not None:
                wanted.add(arm.name)
                arm = None if arm.start is None else self.arm(arm.start)
        return [arm for arm in self.arms if arm.name in wanted]


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the nearest one, and all there are."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"{f'; did you mean {near[0]!r}?' if near else '.'} There are: {', '.join(known) or 'none'}"


Verdict = Literal["holds", "unclear", "does not hold"]
