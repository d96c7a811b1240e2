"""Bonuses that count visits, in all of training or in the episode under way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from regimen.models.torsos import Observations
from regimen.rewards.base import Reward, Scene
from regimen.rewards.states import Stretch, Visits, earlier, stretches
from regimen.rollout import Rollout

Scope = Literal["global", "episodic"]
Form = Literal["sqrt", "first"]
Key = Callable[[Observations], Tensor]


def count_visits(known: Tensor, counts: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The number of each visit among those to the same key, and what is known afterwards.

    Args:
        known: int64 `[K]`, keys visited before, ascending, each once.
        counts: int64 `[K]`, how often.
        keys: int64 `[R]`, of new visits, in the order of time.

    Returns:
        `[R]`, each visit's number, itself included (1 for the first); then `known` and `counts` with them.
    """
    distinct = keys.unique()
    fresh = distinct[~_is_in(distinct, known)]
    spots = torch.searchsorted(known, fresh) + torch.arange(len(fresh), device=keys.device)
    merged, totals = keys.new_empty(len(known) + len(fresh)), counts.new_zeros(len(known) + len(fresh))
    old = torch.ones(len(merged), dtype=torch.bool, device=keys.device)
    old[spots] = False
    merged[old], merged[spots], totals[old] = known, fresh, counts
    where = torch.searchsorted(merged, keys)
    number = totals[where] + earlier(keys) + 1
    return number, merged, totals.index_add(0, where, torch.ones_like(where))


def _is_in(values: Tensor, ascending: Tensor) -> Tensor:
    if not len(ascending):
        return torch.zeros_like(values, dtype=torch.bool)
    return ascending[torch.searchsorted(ascending, values).clamp(max=len(ascending) - 1)] == values


def row_key(states: Observations) -> Tensor:
    """A 64-bit key of whole observations: equal rows have equal keys, others do not (but by a chance of 2^-64).

    Args:
        states: `[R, ...]`, of numbers.

    Returns:
        int64 `[R]`.

    Raises:
        TypeError: a table of observations, of which an entry must be chosen.
        ValueError: NaN, which equals nothing.
    """
    if not isinstance(states, Tensor):
        raise TypeError(
            f"row_key was given a table with {', '.join(states.keys())}; choose what tells states apart, as in "
            "key=lambda seen: row_key(seen['position'])"
        )
    rows = states.reshape(len(states), -1)
    if states.is_floating_point():
        if bool(rows.isnan().any()):
            raise ValueError("row_key: an observation holds NaN, which equals nothing, so its visits cannot be counted")
        rows = (rows.double() + 0.0).view(torch.int64)  # The 0 makes -0 and 0 the same bits.
    place = torch.arange(1, rows.shape[1] + 1, device=rows.device)
    return _mixed(_mixed(rows.long() + _mixed(place)).sum(1))


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 64-bit integers in which every bit depends on all (the finaliser of SplitMix64)."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ _shifted(x, shift)) * factor
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """A shift to the right that fills with 0, which torch has not."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def value_variance(values: Tensor) -> Tensor:
    """How much the value of reaching a feature differs between contexts: the population variance.

    Where it is small for every feature, what was found in other contexts tells what matters, and a global count is
    informative; where it is large, only novelty within the episode is (Henaff et al. 2023, section 3.3).

    Args:
        values: `[F, C]`, the value of each of `F` features in each of `C` contexts.

    Returns:
        `[F]`.

    Raises:
        ValueError: another shape.
    """
    if values.ndim != 2 or not values.shape[1]:
        raise ValueError(f"value_variance: values have shape {list(values.shape)}, expected [features, contexts]")
    return values.var(1, correction=0)


@dataclass(frozen=True)
class _Visited:
    """Visits of one stretch in the order of time.

    Attributes:
        stretch: of `N` copies; begun: `[N]`, episodes that each began.
        copy, episode, key: `[R]`, which copy visited which state, and in which of its episodes (0 is the one that
            goes on from before).
    """

    stretch: Stretch
    begun: Tensor
    copy: Tensor
    episode: Tensor
    key: Tensor


class _Memory(Protocol):
    def count(self, visited: _Visited) -> Tensor:
        """`[R]`, each visit's number."""
        ...

    def save(self) -> dict[str, Any]:
        """What was counted."""
        ...

    def load(self, state: Mapping[str, Any]) -> None:
        """Count on from there."""
        ...


class _Training:
    """Counts of all of training."""

    def __init__(self) -> None:
        self._keys, self._counts = torch.zeros(2, 0, dtype=torch.int64)

    def count(self, visited: _Visited) -> Tensor:
        """`[R]`, each visit's number."""
        keys, counts = self._keys.to(visited.key.device), self._counts.to(visited.key.device)
        number, self._keys, self._counts = count_visits(keys, counts, visited.key)
        return number

    def save(self) -> dict[str, Any]:
        """What was counted."""
        return {"keys": self._keys, "counts": self._counts}

    def load(self, state: Mapping[str, Any]) -> None:
        """Count on from there."""
        self._keys, self._counts = state["keys"], state["counts"]


class _Episodes:
    """Counts of every copy's episode under way: by task, a table `[3, K]` of copies, keys and counts."""

    def __init__(self) -> None:
        self._tables: dict[str, Tensor] = {}

    def count(self, visited: _Visited) -> Tensor:
        """`[R]`, each visit's number."""
        task, nothing = visited.stretch.task, torch.zeros(3, 0, dtype=torch.int64)
        copy, key, counts = self._tables.get(task, nothing).to(visited.key.device)
        distinct, place = torch.cat([key, visited.key]).unique(return_inverse=True)
        # One number for each (copy, episode, key); the episode that goes on from before is its copy's 0th.
        span, keys = int(visited.begun.max()) + 1, max(len(distinct), 1)
        before, order = (copy * span * keys + place[: len(key)]).sort()
        now = (visited.copy * span + visited.episode) * keys + place[len(key) :]
        number, known, counts = count_visits(before, counts[order], now)
        copy, episode, key = known // keys // span, known // keys % span, distinct[known % keys]
        table = torch.stack([copy, key, counts])
        self._tables[task] = table[:, episode == _at(copy, visited.stretch.copies, visited.begun)]
        return number

    def save(self) -> dict[str, Any]:
        """What was counted."""
        return {"tables": dict(self._tables)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Count on from there."""
        self._tables = dict(state["tables"])


def _at(wanted: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """The values that stand at some places, for each place that is wanted; 0 where there is none."""
    size = int(torch.cat([wanted, places]).max()) + 1
    return values.new_zeros(size).index_copy(0, places, values)[wanted]


class CountBonus(Reward):
    """A bonus for states that were seldom visited, `[B, T]`: that of a step is of the state that it led to.

    With `N` the visits to a state's key so far, this one included, it is `1 / sqrt(N)` or `1[N = 1]` (Henaff et al.
    2023, section 3). An episode's first state is counted too, once. Within a time step the copies of an
    environment are counted in order, each reading its number at once.

    Global counts go on through all of training, over all tasks. Episodic ones start afresh with every episode, and
    go on where an episode is cut by the end of a rollout. Reads `observations` and the columns `next_observations`,
    `start` and `copy` of an `EnvTask`.
    """

    stateful = True

    def __init__(
        self, scope: Scope = "global", key: Key = row_key, form: Form = "sqrt", name: str | None = None
    ) -> None:
        """Make the bonus.

        Args:
            scope: what is counted.
            key: observations `[R, ...]` to integers `[R]`, equal for states that are to count as one; `row_key` of
                an entry or of a part of the observations, or what an entry already holds.
            form: `"sqrt"` or `"first"`.
            name: of the component; `global_count` or `episodic_count` by default.

        Raises:
            ValueError: an unknown scope or form.
        """
        if scope not in get_args(Scope) or form not in get_args(Form):
            raise ValueError(
                f"CountBonus: scope '{scope}', form '{form}'; expected one of {', '.join(get_args(Scope))} and one of "
                f"{', '.join(get_args(Form))}"
            )
        self.scope, self.key, self.form, self.name = scope, key, form, name or f"{scope}_count"
        self._memory: _Memory = _Training() if scope == "global" else _Episodes()

    def score(self, rollout: Rollout, scene: Scene) -> Tensor:
        """The bonus of every step.

        Raises:
            TypeError: keys that are no integers.
            ValueError: other than one per state.
        """
        visits = Visits.of(rollout)
        keys, numbers = visits.spread(self._keys(visits.states)), torch.ones_like(rollout.mask, dtype=torch.int64)
        for stretch in stretches(rollout):
            numbers[stretch.rows] = self._count(stretch, visits, keys)
        bonus = (numbers == 1).float() if self.form == "first" else numbers.float().rsqrt()
        return torch.where(rollout.mask, bonus, 0)

    def _count(self, stretch: Stretch, visits: Visits, keys: Tensor) -> Tensor:
        """Count one stretch's visits; their numbers `[N, T]`, 1 at steps that do not exist."""
        # By time, a start before the step from it, then by copy: the order in which environments are stepped.
        exists, key = (slots[stretch.rows].permute(1, 2, 0) for slots in (visits.exists, keys))
        begun = visits.starts[stretch.rows].cumsum(1)
        copy = stretch.copies.expand(exists.shape)[exists]
        episode = begun.T[:, None].expand(exists.shape)[exists]
        found = self._memory.count(_Visited(stretch, begun[:, -1], copy, episode, key[exists]))
        return torch.ones_like(key).masked_scatter(exists, found)[:, 1].T

    def _keys(self, states: Observations) -> Tensor:
        keys: Any = self.key(states)
        if not isinstance(keys, Tensor) or keys.is_floating_point() or keys.is_complex():
            kind = keys.dtype if isinstance(keys, Tensor) else type(keys).__name__
            raise TypeError(
                f"{self.name}: the key function gave {kind}, expected a tensor of integers [R], one per state; "
                "row_key makes them of rows of numbers"
            )
        if list(keys.shape) != [len(states)]:
            raise ValueError(
                f"{self.name}: the key function gave shape {list(keys.shape)} for {len(states)} states, expected "
                f"[{len(states)}]; row_key makes one key of a row of numbers"
            )
        return keys.long()

    def save_state(self) -> dict[str, Any]:
        """What was counted."""
        return self._memory.save()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Count on from there."""
        self._memory.load(state)
