"""Statistics over seeds: intervals, claims, verdicts. Seeds are the unit; comparisons are made within a seed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from regimen.lab.experiment import ArmResult, Claim, Verdict

REPETITIONS = 10_000
RANDOM_STATE = 20_509
FEW_SEEDS = 5
"""With fewer seeds than this, even if all agree, a sign test does not reach 95 %."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its 95 % interval; `low` and `high` are NaN where there is none (fewer than two seeds)."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class JudgedClaim:
    """A claim with its number for each seed, their mean and interval, and what follows.

    Attributes:
        values: by seed; NaN where a seed has none.
        missing: why a seed has no value, by seed; a claim with a gap is unclear.
        interval: over the seeds that have a value.
        note: what the gaps are, in a sentence; empty if there are none.
    """

    claim: Claim
    values: Mapping[int, float]
    missing: Mapping[int, str]
    interval: Interval
    verdict: Verdict
    note: str = ""


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % bootstrap interval of one value per seed; see `intervals`."""
    return intervals([[value] for value in values])[0]


def intervals(table: Sequence[Sequence[float]]) -> list[Interval]:
    """Mean and 95 % percentile-bootstrap interval of every column of a table `[seeds][columns]`.

    rliable draws whole seeds with replacement, `REPETITIONS` times from a fixed random state, so that the same values
    always give the same interval. A column with a value that is not finite gives NaN; one seed gives NaN for `low`
    and `high`.

    Raises:
        ValueError: the table has no row, or its rows differ in length.
    """
    if not table or len({len(row) for row in table}) > 1:
        raise ValueError(f"rows of lengths {[len(row) for row in table]}; expected one row or more, of one length")
    return list(_intervals(tuple(tuple(map(float, row)) for row in table)))


@lru_cache(maxsize=256)
def _intervals(table: tuple[tuple[float, ...], ...]) -> tuple[Interval, ...]:
    values = np.where(np.isfinite(table), table, math.nan)
    if len(values) < 2 or values.shape[1] == 0:
        return tuple(Interval(float(mean), math.nan, math.nan) for mean in values.mean(0))
    from rliable import library as rly

    with _global_random_state(RANDOM_STATE):
        means, bounds = rly.get_interval_estimates(
            {"seeds": np.arange(len(values))[:, None]},
            lambda drawn: values[drawn[:, 0]].mean(0),
            reps=REPETITIONS,
        )
    columns = zip(means["seeds"], *bounds["seeds"], strict=True)
    return tuple(Interval(float(mean), float(low), float(high)) for mean, low, high in columns)


@contextmanager
def _global_random_state(seed: int) -> Iterator[None]:
    """rliable draws from numpy's global generator, whatever `random_state` it is given."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)


def judge_claim(claim: Claim, seeds: Sequence[int], results: Mapping[int, Mapping[str, ArmResult]]) -> JudgedClaim:
    """Compute a claim for every seed of the experiment and judge it.

    Args:
        claim: what is claimed.
        seeds: all seeds that were asked for; one without results for the claim's arms is a gap, not left out.
        results: by seed and arm.
    """
    values, missing = {}, {}
    for seed in seeds:
        values[seed], trouble = _value(claim, results.get(seed, {}))
        if trouble:
            missing[seed] = trouble
    present = [value for seed, value in values.items() if seed not in missing]
    found = interval(present) if present else Interval(math.nan, math.nan, math.nan)
    verdict = "unclear" if missing else position(found, claim.above)
    return JudgedClaim(claim, values, missing, found, verdict, _note(missing, len(seeds)))


def position(found: Interval, above: float) -> Verdict:
    """Where an interval lies: all above the threshold, all below, or neither."""
    if found.low > above:
        return "holds"
    return "does not hold" if found.high < above else "unclear"


def verdict(claims: Sequence[JudgedClaim], left_out: bool = False) -> Verdict:
    """The paper's verdict: every judged claim holds, one does not, or neither.

    Args:
        claims: those that were computed.
        left_out: whether a judged claim was not, because its arms were not trained.
    """
    judged = [claim.verdict for claim in claims if claim.claim.judged]
    if "does not hold" in judged:
        return "does not hold"
    return "holds" if judged and not left_out and set(judged) == {"holds"} else "unclear"


def caution(seeds: int) -> str:
    """How intervals over so many seeds are to be taken, in a sentence; empty if there is nothing to say."""
    if seeds == 1:
        return "One seed has no interval, so nothing can be judged."
    return f"With {seeds} seeds an interval is rough: take {FEW_SEEDS} or more." if seeds < FEW_SEEDS else ""


def _value(claim: Claim, seed: Mapping[str, ArmResult]) -> tuple[float, str]:
    """The claim's number for one seed, and the sentence that says why there is none."""
    if absent := [arm for arm in claim.arms if arm not in seed]:
        return math.nan, f"no result of {', '.join(absent)}"
    try:
        value = float(claim.value(seed))
    except Exception as error:
        return math.nan, f"it cannot be computed ({type(error).__name__}: {error})"
    return value, "" if math.isfinite(value) else f"its value is {value}"


def _note(missing: Mapping[int, str], seeds: int) -> str:
    if not missing:
        return ""
    gaps = "; ".join(f"seed {seed}: {why}" for seed, why in missing.items())
    return f"unclear, for {len(missing)} of {seeds} seeds have no value ({gaps})"
