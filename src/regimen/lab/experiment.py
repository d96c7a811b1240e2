"""What a paper is to the library: arms that differ in what it adds, claims about them, and scales."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from regimen.regimen import Regimen

Settings = Any
"""A paper's own frozen dataclass of numbers; a scale is an instance of it."""


@dataclass(frozen=True)
class Arm:
    """One way to train, repeated over seeds.

    Attributes:
        name: short, unique within the paper; names folders and keys.
        title: how reports call it.
        build: `(seed, settings) -> Regimen`, the whole of the arm's own training.
        start: another arm whose final cast this one starts from; what that arm spent is charged to this one too.
        extended: trained only when asked for by name, or at scale "full".
    """

    name: str
    title: str
    build: Callable[[int, Settings], Regimen]
    start: str | None = None
    extended: bool = False


@dataclass(frozen=True)
class ArmResult:
    """What one arm did with one seed.

    Attributes:
        evaluations: the records of `metrics.jsonl` of kind "evaluation", in order; each has `stage`, `step`,
            `iterations` and `metrics`. The first is of the cast it started from.
        samples, rows, gradient_steps, seconds: spent by the arm and the arms that it starts from.
        warnings: health warnings with counts.
    """

    evaluations: Sequence[Mapping[str, Any]]
    samples: int
    rows: int
    gradient_steps: int
    seconds: float
    warnings: Mapping[str, int] = field(default_factory=dict)

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
    """A paper as the library runs it.

    Attributes:
        slug, title, arxiv: which paper.
        verb: where its idea lives; policy: the kind it trains.
        claim: what it claims, in a sentence or two.
        arms: in the order in which reports list them.
        claims: what the verdict is computed from.
        metrics: evaluated metrics to show, name to label, the most important first.
        scales: settings by name; at least "quick" and "default".
        requires: extras that scales need, such as {"full": "diffusers"}.
    """

    slug: str
    title: str
    arxiv: str
    verb: str
    policy: str
    claim: str
    arms: Sequence[Arm]
    claims: Sequence[Claim]
    metrics: Mapping[str, str]
    scales: Mapping[str, Settings]
    requires: Mapping[str, str] = field(default_factory=dict)

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise KeyError(f"{self.slug} has no arm '{name}'; its arms are {', '.join(a.name for a in self.arms)}")


Verdict = Literal["holds", "unclear", "does not hold"]
