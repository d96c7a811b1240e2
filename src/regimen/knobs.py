"""Knobs: the named numbers that a paper anneals, schedules, balances or gates.

A component *declares* the knobs it reads; a controller says which it *moves*; a `Knobs` board, built with the
regimen, holds the values in force. Everything reads them through one mapping, `knobs["kl_weight"]`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self


@dataclass(frozen=True)
class Knob:
    """A number that a component reads and a controller may move.

    Attributes:
        name: what the value is called everywhere: in logs, on the command line, in a rollout.
        default: the value until a regimen, a stage or a controller sets another.
        low: smallest value allowed.
        high: largest value allowed.
        integer: whether the value is floored to an integer when it is set.
        evaluation: the value forced while a task evaluates (a training aid switched off), if any.
        doc: one line for help texts.

    `Knob("kl_weight", 0.01) * ReferenceKL()` weights a reward or an objective by the knob, and `(1 - knob) * other` by
    what is left of it.
    """

    name: str
    default: float
    low: float = -math.inf
    high: float = math.inf
    integer: bool = False
    evaluation: float | None = None
    doc: str = ""

    def __post_init__(self) -> None:
        self.checked(self.default, "its default")
        if self.evaluation is not None:
            self.checked(self.evaluation, "its evaluation value")

    def __rsub__(self, other: float) -> Weight:
        return Weight(self, -1.0, float(other))

    def checked(self, value: float, source: str) -> float:
        """The value as this knob holds it; `ValueError` if it is not finite or outside the range."""
        if not math.isfinite(value) or not self.low <= value <= self.high:
            raise ValueError(
                f"knob '{self.name}': {source} gave {value}, expected a finite number in [{self.low}, {self.high}]"
            )
        # 1e-9 keeps float error (86.9999999) from losing a whole unit.
        return float(math.floor(value + 1e-9)) if self.integer else float(value)


class Knobs(Mapping[str, float]):
    """The board of all knobs of a regimen, with the values in force."""

    def __init__(
        self,
        declared: Iterable[tuple[str, Knob]] = (),
        overrides: Mapping[str, float] | None = None,
    ) -> None:
        """Collect declarations `(owner, knob)`; `overrides` replace defaults.

        Raises:
            ValueError: two owners declare one knob with different defaults and no override settles it, or with
                different evaluation values; an override names a knob that nobody reads; a value is out of range.
        """
        overrides = dict(overrides or {})
        self._knobs: dict[str, Knob] = {}
        self._owners: dict[str, list[str]] = {}
        for owner, knob in declared:
            known = self._knobs.get(knob.name)
            if known is not None:
                owners = f"({self._owners[knob.name][0]})", f"({owner})"
                _check_agree(known, knob, owners, settled=knob.name in overrides)
            self._knobs[knob.name] = knob if known is None else _narrower(known, knob)
            self._owners.setdefault(knob.name, []).append(owner)
        self._values = {name: knob.checked(knob.default, "its default") for name, knob in self._knobs.items()}
        for name, value in overrides.items():
            self.set(name, value, by="the regimen's own setting")

    @classmethod
    def of(cls, *parts: Any, **overrides: float) -> Self:
        """The board of some parts, each with `knobs`: for parts that are used outside a regimen."""
        return cls(((type(part).__name__, knob) for part in parts for knob in part.knobs), overrides)

    def __getitem__(self, name: str) -> float:
        try:
            return self._values[name]
        except KeyError:
            raise KeyError(self.unknown(name)) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def unknown(self, name: str) -> str:
        """The sentence that says that a knob does not exist, which is nearest, and which there are."""
        near = difflib.get_close_matches(name, self._values, n=1)
        hint = f" did you mean '{near[0]}'?" if near else ""
        return f"no component reads a knob '{name}';{hint} knobs here: {', '.join(sorted(self._values)) or 'none'}"

    def owners(self, name: str) -> list[str]:
        """Who reads the knob."""
        return list(self._owners[name])

    def set(self, name: str, value: float, by: str) -> None:
        """Give a knob a new value; `by` says who, for the error if the value is not allowed."""
        if name not in self._knobs:
            raise ValueError(f"{by}: {self.unknown(name)}")
        self._values[name] = self._knobs[name].checked(float(value), by)

    def snapshot(self) -> dict[str, float]:
        """A plain copy of the values in force."""
        return dict(self._values)

    def for_evaluation(self) -> dict[str, float]:
        """The values in force with every training aid at its evaluation value."""
        forced = {n: k.checked(k.evaluation, n) for n, k in self._knobs.items() if k.evaluation is not None}
        return {**self._values, **forced}

    def state_dict(self) -> dict[str, Any]:
        """The values in force, for a checkpoint."""
        return self.snapshot()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the values of a checkpoint."""
        for name, value in state.items():
            self.set(name, value, by="the checkpoint")


def _check_agree(a: Knob, b: Knob, owners: tuple[str, str], settled: bool) -> None:
    if a.default != b.default and not settled:
        raise ValueError(
            f"knob '{a.name}' has two defaults: {a.default} {owners[0]} and {b.default} {owners[1]}; "
            f"settle it with Regimen(knobs={{'{a.name}': ...}})"
        )
    if a.evaluation is not None and b.evaluation is not None and a.evaluation != b.evaluation:
        raise ValueError(
            f"knob '{a.name}' has two evaluation values: {a.evaluation} {owners[0]} and {b.evaluation} {owners[1]}; "
            "give both owners the same"
        )


def _narrower(a: Knob, b: Knob) -> Knob:
    """One knob that satisfies both declarations."""
    return replace(
        a,
        low=max(a.low, b.low),
        high=min(a.high, b.high),
        integer=a.integer or b.integer,
        evaluation=b.evaluation if a.evaluation is None else a.evaluation,
    )


@dataclass(frozen=True)
class Weight:
    """The factor before a term of a reward or an objective: `offset + scale * knob`, with two constants.

    `0.2 * format` declares the knob `weight/format` with default 0.2, so that a controller may move it, and so
    does `-0.2 * format`, whose sign is constant; `Knob("kl_weight", 0.01) * ReferenceKL()` takes the knob it is
    given, and `(1 - knob) * term` the rest of one.
    """

    knob: Knob
    scale: float = 1.0
    offset: float = 0.0

    @classmethod
    def of(cls, value: float | Knob | Weight, component: str) -> Weight:
        """The weight that stands before `component`."""
        if isinstance(value, Weight):
            return value
        if isinstance(value, Knob):
            return cls(value)
        return cls(Knob(f"weight/{component}", abs(float(value))), math.copysign(1.0, value))

    def times(self, factor: float) -> Weight:
        """The weight with its constants multiplied."""
        return replace(self, scale=self.scale * factor, offset=self.offset * factor)

    def value(self, knobs: Mapping[str, float]) -> float:
        """The factor under the knobs in force."""
        return self.offset + self.scale * knobs[self.knob.name]
