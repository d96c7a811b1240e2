"""A discount that grows with what an imitator has mastered of its demonstrations."""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from regimen.controllers.base import Moment, Needs, Probe, Situation
from regimen.models.frame_costs import FrameCosts


def longest_increasing_subsequence(values: Sequence[int]) -> int:
    """Length of the longest strictly increasing subsequence (Schensted 1961), in `n log n`."""
    ends: list[int] = []  # The least last value of an increasing subsequence of each length.
    for value in values:
        place = bisect_left(ends, value)
        ends[place : place + 1] = [value]
    return len(ends)


def match_score(cost: Tensor, k: int) -> int:
    """How much of a demonstration's first `k` frames a sample's first `k` frames go through in their order.

    The length of the longest increasing subsequence of `a_i = argmin_{j <= k} C_ij`, `i = 1..k`; the first of equal
    costs (Liu et al. 2024, section 4.2).

    Args:
        cost: `[H, H]`, from frame `i` of the sample to frame `j` of the demonstration.
        k: from 1 to `H`.

    Raises:
        ValueError: another `k`, or a cost that is NaN.
    """
    if cost.ndim != 2 or not 1 <= k <= min(cost.shape):
        raise ValueError(f"match_score: k={k} of a cost of shape {list(cost.shape)}; expected [H, H], k from 1 to H")
    if bool(cost.isnan().any()):
        raise ValueError("match_score: the cost holds NaN, which is nearest to nothing; look at the frames' features")
    return longest_increasing_subsequence(cost[:k, :k].argmin(1).tolist())


def discount_from_progress(k: int, alpha: float = 0.2) -> float:
    """`alpha ** (1 / k)`: the reward `k` steps ahead counts `alpha` (Liu et al. 2024, section 4.3).

    Raises:
        ValueError: `k` below 1, or `alpha` outside (0, 1).
    """
    if k < 1 or not 0 < alpha < 1:
        raise ValueError(f"discount_from_progress: k={k}, alpha={alpha}; expected k at least 1, and alpha in (0, 1)")
    return float(alpha ** (1 / k))


class AutomaticDiscountScheduler:
    """Moves the discount with `k`, the number of a demonstration's frames that samples go through (Liu et al. 2024).

    In every `every`-th iteration it takes the samples of a probe. As long as the `agent_percentile` of their match
    scores, over samples and demonstrations, reaches `threshold` times that of the demonstrations with each other (their
    `reference_percentile`; with itself, if there is only one), rounded down, `k` grows by 1; up to
    `max_progress_delta` times. It never falls. With `threshold=0` it is a schedule of time alone.

    It sees costs, and neither rewards nor success. `k` is logged as `adapt/progress`: one that stays at its start means
    that nothing is recognised, and that training goes on with a small discount.

    Attributes:
        progress: `k`.
    """

    moment: Moment = "before_learn"

    def __init__(
        self,
        costs: FrameCosts,
        probe: Probe,
        *,
        every: int,
        alpha: float = 0.2,
        threshold: float = 0.9,
        progress_start: float = 0.2,
        max_progress_delta: int = 5,
        reference_percentile: float = 50.0,
        agent_percentile: float = 90.0,
        knob: str = "discount",
    ) -> None:
        """Make the scheduler.

        Args:
            costs: from frames of the probe's samples to those of the demonstrations.
            probe: samples of the policy as it is evaluated.
            every: iterations from one probe to the next.
            alpha: what the reward `k` steps ahead counts, in (0, 1).
            threshold, max_progress_delta, reference_percentile, agent_percentile: see above.
            progress_start: the part of the demonstrations' length that `k` starts from, rounded down, at least 1.
            knob: the discount's; give the stage its first value, `knobs={"discount": scheduler.discount}`.

        Raises:
            ValueError: a setting is out of range.
        """
        if every < 1 or max_progress_delta < 1 or threshold < 0 or not 0 < progress_start <= 1:
            raise ValueError(
                f"AutomaticDiscountScheduler: every={every}, max_progress_delta={max_progress_delta}, "
                f"threshold={threshold}, progress_start={progress_start}; expected at least 1 of the first two, not "
                "below 0, and in (0, 1]"
            )
        if not (0 <= reference_percentile <= 100 and 0 <= agent_percentile <= 100):
            raise ValueError(
                f"AutomaticDiscountScheduler: reference_percentile={reference_percentile}, "
                f"agent_percentile={agent_percentile}; expected from 0 to 100"
            )
        self.costs, self.needs, self.every = costs, Needs(probe=probe), every
        self.alpha, self.threshold, self.max_progress_delta = alpha, threshold, max_progress_delta
        self.reference_percentile, self.agent_percentile, self.knob = reference_percentile, agent_percentile, knob
        self.progress_start = progress_start
        self.progress = int(progress_start * costs.horizon + 1e-9)
        if not self.progress:
            warnings.warn(
                f"AutomaticDiscountScheduler: progress_start={progress_start} of {costs.horizon} frames is none; it "
                "starts from 1",
                stacklevel=2,
            )
            self.progress = 1
        discount_from_progress(self.progress, alpha)
        self._references: dict[int, float] = {}

    @property
    def moves(self) -> tuple[str, ...]:
        """The discount."""
        return (self.knob,)

    @property
    def discount(self) -> float:
        """What it sets now."""
        return discount_from_progress(self.progress, self.alpha)

    def __call__(self, situation: Situation) -> Mapping[str, float]:
        """The discount, after a look at the probe's samples when it is time."""
        if situation.step and situation.step % self.every == 0:
            assert situation.insight is not None, "it declares what it needs"
            self.advance(self.costs.of(situation.insight.probe()))
        situation.notes["progress"] = self.progress
        return {self.knob: self.discount}

    def advance(self, costs: Tensor) -> None:
        """Raise `k` as far as samples with the costs `[B, N, H, H]` go through the demonstrations."""
        pairs = costs.flatten(0, 1).cpu()
        for _ in range(self.max_progress_delta):
            if self.progress >= self.costs.horizon:
                return
            score = _percentile([match_score(cost, self.progress) for cost in pairs], self.agent_percentile)
            # The small number keeps float error from costing a whole frame.
            if score + 1e-6 < int(self.threshold * self._reference(self.progress) + 1e-9):
                return
            self.progress += 1

    def _reference(self, k: int) -> float:
        """How demonstrations match each other."""
        if k not in self._references:
            between = self.costs.of_demonstrations().cpu()
            others = ~torch.eye(len(between), dtype=torch.bool) if len(between) > 1 else slice(None)
            scores = [match_score(cost, k) for cost in between[others].flatten(0, -3)]
            self._references[k] = _percentile(scores, self.reference_percentile)
        return self._references[k]

    def state_dict(self) -> dict[str, Any]:
        """`k`."""
        return {"progress": self.progress}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from it."""
        self.progress = int(state["progress"])


def _percentile(scores: Sequence[int], percent: float) -> float:
    """Interpolated linearly between the two nearest."""
    return float(torch.tensor(scores, dtype=torch.float64).quantile(percent / 100))
