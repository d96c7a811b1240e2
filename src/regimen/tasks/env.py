"""Environments as tasks: a policy acts, step by step, in many copies at once."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from regimen.knobs import Knob
from regimen.policies.acting import Act, Actor
from regimen.policies.action import acting
from regimen.rollout import Rollout
from regimen.tasks.base import Evaluation
from regimen.tasks.environments.base import MakeEnv, Observations, VectorEnv
from regimen.tasks.stretch import Record, Step


class EnvTask:
    """A policy acts in copies of an environment; a sample is a stretch of `steps` steps of one copy.

    With `episodes` a sample is a whole episode from its start, of at most `steps` steps. Otherwise copies go on from
    iteration to iteration, and a sample may hold the end of one episode and the start of the next.

    Besides the fields of every rollout, with `discount` 0 where an episode terminated, there are these step columns:

    - `env_reward [B, T]`, what the environment paid;
    - `start` bool `[B, T]`, steps that begin an episode;
    - `cut` bool `[B, T]`, steps after which the row does not go on although the value does: an episode was cut off, by
      a time limit or by the end of the sample;
    - `next_observations [B, T, ...]`: what came after each step, an episode's own last one where it ended;
    - `knob/<name> [B, T]`: of every knob that the environment reads, the value at the start of the step's episode;
    - what the environment tells (`success`, say), `[B, T, ...]`;

    and the columns `copy` int64 `[B]`, whose stretch it is (several of one copy stand in the order of time), and
    `memory [B, ...]`, what a policy with memory remembered before the first step.
    """

    generates = True

    def __init__(
        self,
        name: str,
        make: MakeEnv,
        *,
        copies: int = 8,
        steps: int = 128,
        episodes: bool = False,
        discount: Knob | float | None = 0.99,
        siblings: int | None = None,
        evaluation_episodes: int = 16,
        evaluation_steps: int = 1000,
        member: str = "policy",
        evaluated: str | None = None,
    ) -> None:
        """Make a task of an environment.

        Args:
            name: unique within a regimen.
            make: a number of copies to a `VectorEnv`.
            copies: that step together.
            steps: per sample.
            episodes: whether a sample is a whole episode.
            discount: what a following step's value is multiplied by; a `Knob` to move it. `None` records only what
                terminated (0, else 1), for objectives that multiply by a discount of their own when samples are drawn.
            siblings: with `episodes`, that many of them start from the same seed and form a group; by default each
                has a start of its own, and the samples of all copies are one group.
            evaluation_episodes, evaluation_steps: how many episodes evaluate, and their limit.
            member: the cast member that acts; `evaluated`: the one that is evaluated, `member` by default.

        Raises:
            ValueError: a number below 1, or siblings that do not divide the copies or are not whole episodes.
        """
        if min(copies, steps, evaluation_episodes, evaluation_steps) < 1:
            raise ValueError(
                f"task '{name}': copies={copies}, steps={steps}, evaluation_episodes={evaluation_episodes}, "
                f"evaluation_steps={evaluation_steps}; expected every number to be at least 1"
            )
        if siblings is not None and (not episodes or siblings < 1 or copies % siblings):
            raise ValueError(
                f"task '{name}': siblings={siblings} with copies={copies}, episodes={episodes}; siblings are whole "
                "episodes, and their number must divide the copies"
            )
        self.name, self.make, self.copies = name, make, copies
        self.steps, self.episodes, self.siblings = steps, episodes, siblings
        self.group_size = siblings or copies
        self.discount = Knob("discount", discount, 0.0, 1.0) if isinstance(discount, float | int) else discount
        self.evaluation_episodes, self.evaluation_steps = evaluation_episodes, evaluation_steps
        self.member, self.evaluated = member, evaluated or member
        self._stand = _Stand(make(copies), name)

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The discount, and what the environment reads at a reset."""
        return (*(() if self.discount is None else (self.discount,)), *self._stand.env.knobs)

    @property
    def spaces(self) -> tuple[Any, Any]:
        """Of the observations and of the actions of one copy, as gymnasium describes them."""
        return self._stand.env.observation_space, self._stand.env.action_space

    @torch.no_grad()
    def collect(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator, size: int) -> Rollout:
        """`size` samples, in groups of `group_size`.

        Raises:
            ValueError: `size` is not a multiple of `group_size`, or the member does not act step by step.
        """
        if size < 1 or size % self.group_size:
            raise ValueError(
                f"task '{self.name}' was asked for {size} samples; expected a multiple of {self.group_size}, its "
                f"{'siblings' if self.siblings else 'copies'}"
            )
        policy = self._actor(cast, self.member)
        rows = [min(self.copies, size - begun) for begun in range(0, size, self.copies)]
        return Rollout.cat([self._stretch(policy, knobs, rng, count) for count in rows])

    def _actor(self, cast: Mapping[str, Any], member: str) -> Actor:
        policy = cast[member]
        if not isinstance(policy, Actor):
            raise ValueError(
                f"task '{self.name}': member '{member}' is a {type(policy).__name__}, which does not act step by step; "
                "expected an ActionPolicy, or a policy with a method `act` like its own"
            )
        return policy

    def _stretch(self, policy: Actor, knobs: Mapping[str, float], rng: torch.Generator, rows: int) -> Rollout:
        """One sample of each of the first `rows` copies."""
        started, stand = time.time(), self._stand
        if self.episodes:
            stand.restart(knobs, rng, self.siblings or 1)
        memory = stand.memory
        record = stand.play(policy, knobs, rng, self.steps, rows, whole=self.episodes)
        if memory is None and stand.memory is not None:
            # A policy that has not acted yet remembers nothing.
            memory = torch.zeros_like(stand.memory)
        times = {"started_at": started, "finished_at": time.time()}
        rollout = Rollout.create(
            task=self.name,
            group=torch.arange(rows) // self.group_size,
            knobs=knobs,
            version=torch.full((rows,), getattr(policy, "version", 0)),
            columns={"copy": torch.arange(rows)} | ({} if memory is None else {"memory": memory[:rows]}),
            **{name: torch.full((rows,), value, dtype=torch.float64) for name, value in times.items()},
            **record.fields(rows, 1.0 if self.discount is None else knobs[self.discount.name], rng.device),
        )
        return rollout.to(rng.device)

    @torch.no_grad()
    def evaluate(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator) -> Evaluation:
        """Means over whole episodes: `return`, `length`, and what the environment told in their last step."""
        policy, count = self._actor(cast, self.evaluated), self.evaluation_episodes
        stand = _Stand(self.make(count), self.name)
        stand.restart(knobs, rng, 1)
        record = stand.play(policy, knobs, rng, self.evaluation_steps, count, whole=True)
        stand.env.close()
        return Evaluation(record.summary())

    def state_dict(self) -> dict[str, Any]:
        """Where every copy is, and what the policy remembers of it; nothing for whole episodes."""
        return {} if self.episodes else self._stand.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._stand.load_state_dict(state)


class _Stand:
    """Where the copies of an environment stand.

    Attributes:
        seen: what each copy saw last; `None` before the first start.
        ended: bool `[N]`, copies whose episode has ended, or has never begun; begins: those about to take the first
            step of theirs.
        memory: what the policy remembers of each.
        episode: the values of the environment's knobs in each one's episode.
    """

    def __init__(self, env: VectorEnv, owner: str) -> None:
        self.env, self.owner = env, owner
        self._clear()

    def _clear(self) -> None:
        self.seen: Observations | None = None
        self.ended = torch.ones(self.env.count, dtype=torch.bool, device=self.env.device)
        self._none = torch.zeros_like(self.ended)
        self.begins = self.ended
        self.memory: Tensor | None = None
        self.episode = {
            f"knob/{knob.name}": torch.zeros(self.env.count, device=self.env.device) for knob in self.env.knobs
        }

    def restart(self, knobs: Mapping[str, float], rng: torch.Generator, siblings: int) -> None:
        """Start an episode in every copy; as many neighbours as are siblings from the same seed."""
        self._clear()
        self._start(knobs, _seeds(self.env.count // siblings, rng).repeat_interleave(siblings))

    def _start(self, knobs: Mapping[str, float], seeds: Tensor) -> None:
        """Start an episode in every copy whose last one has ended."""
        self.seen = self.env.reset(self.ended, seeds, knobs)
        self._insist_finite(self.seen)
        in_force = {f"knob/{knob.name}": knobs[knob.name] for knob in self.env.knobs}
        self.episode = {name: torch.where(self.ended, in_force[name], old) for name, old in self.episode.items()}
        self.begins, self.ended = self.ended, self._none

    def play(
        self,
        policy: Actor,
        knobs: Mapping[str, float],
        rng: torch.Generator,
        steps: int,
        rows: int,
        whole: bool,
    ) -> Record:
        """Up to `steps` steps of the first `rows` copies; of `whole` episodes only up to their ends."""
        record, alive = Record(), torch.arange(self.env.count, device=self.env.device) < rows
        act = acting(policy, self.env.count, knobs, rng)
        for _ in range(steps):
            if bool(self.ended.any()):
                self._start(knobs, _seeds(self.env.count, rng))
            record.add(self._step(act, alive))
            if whole:
                alive = alive & ~self.ended
                if not bool(alive.any()):
                    break
        return record

    def _step(self, act: Act, alive: Tensor) -> Step:
        """One step of every copy."""
        seen, begins = self.seen, self.begins
        assert seen is not None, "all have started"
        acted = act(seen, self.memory, begins)
        change = self.env.step(acted.actions)
        self._insist_finite(change.observations)
        self.seen, self.memory = change.observations, acted.memory
        self.ended, self.begins = change.terminated | change.truncated, self._none
        return Step(alive, begins, seen, acted, change, self.episode)

    def _insist_finite(self, observations: Observations) -> None:
        parts = observations.values(True, True) if isinstance(observations, TensorDict) else [observations]
        for value in parts:
            # A sum is finite where all its terms are, but for one that overflows: a glance before the look.
            if value.is_floating_point() and not (math.isfinite(value.sum()) or bool(value.isfinite().all())):
                row = int((~value.isfinite()).nonzero()[0, 0])
                raise ValueError(
                    f"task '{self.owner}': the environment gave observations that are not finite in copy {row} "
                    f"({value[row].tolist()!s:.200}); mend the environment, or end the episode before they arise"
                )

    def state_dict(self) -> dict[str, Any]:
        """Where they are; nothing before the first start."""
        if self.seen is None:
            return {}
        return {
            "env": self.env.state_dict(),
            "seen": self.seen.to_dict() if isinstance(self.seen, TensorDict) else self.seen,
            "ended": self.ended,
            "memory": self.memory,
            "episode": dict(self.episode),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put them back there."""
        self._clear()
        if not state:
            return
        device, seen = self.env.device, state["seen"]
        self.env.load_state_dict(state["env"])
        self.seen = (seen if isinstance(seen, Tensor) else TensorDict(seen, [self.env.count])).to(device)
        self.ended = state["ended"].to(device)
        self.begins = torch.zeros_like(self.ended)
        self.memory = state["memory"]
        self.episode = {name: value.to(device) for name, value in state["episode"].items()}


def _seeds(count: int, rng: torch.Generator) -> Tensor:
    return torch.randint(2**31, (count,), generator=rng, device=rng.device).cpu()
