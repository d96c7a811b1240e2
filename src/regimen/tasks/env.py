"""Environments as tasks: a policy acts, step by step, in many copies at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from tensordict import TensorDict
from torch import Tensor

from regimen.knobs import Knob
from regimen.rollout import Rollout
from regimen.tasks.base import Evaluation
from regimen.tasks.environments.base import Observations, VectorEnv


class Acting(Protocol):
    """A policy's answer to one step of every copy."""

    @property
    def actions(self) -> Tensor:
        """`[N, ...]`."""
        ...

    @property
    def logprobs(self) -> Tensor | None:
        """`[N]`, or none where the policy is deterministic."""
        ...

    @property
    def memory(self) -> Tensor | None:
        """`[N, ...]`, what a recurrent policy keeps for its next step."""
        ...


class EnvTask:
    """A policy acts in copies of an environment; a sample is a stretch of `steps` steps of one copy.

    With `episodes` a sample is a whole episode from its start, of at most `steps` steps. Otherwise copies go on from
    iteration to iteration, and a sample may hold the end of one episode and the start of the next.

    Besides the fields of every rollout, with `discount` 0 where an episode terminated, there are these columns:

    - `env_reward [B, T]`, what the environment paid;
    - `start` bool `[B, T]`, steps that begin an episode; `cut` bool `[B, T]`, steps after which one was cut off;
    - `next_observations [B, T, ...]`: what came after each step, an episode's own last one where it ended;
    - `memory [B, ...]`: what a recurrent policy remembered before the first step;
    - what the environment tells (`success`, say), `[B, T, ...]`.
    """

    generates = True

    def __init__(
        self,
        name: str,
        make: Callable[[int], VectorEnv],
        *,
        copies: int = 8,
        steps: int = 128,
        episodes: bool = False,
        discount: Knob | float = 0.99,
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
            copies: samples per collection.
            steps: per sample.
            episodes: whether a sample is a whole episode.
            discount: what a following step's value is multiplied by; a `Knob` to move it.
            siblings: with `episodes`, that many of them start from the same seed and form a group; by default each
                has a start of its own, and all are one group.
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
        self.name, self.make, self.group_size = name, make, copies
        self.steps, self.episodes, self.siblings = steps, episodes, siblings
        self.discount = discount if isinstance(discount, Knob) else Knob("discount", discount, 0.0, 1.0)
        self.evaluation_episodes, self.evaluation_steps = evaluation_episodes, evaluation_steps
        self.member, self.evaluated = member, evaluated or member
        self._copies = _Copies(make(copies))

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The discount, and what the environment reads at a reset."""
        return (self.discount, *self._copies.env.knobs)

    @torch.no_grad()
    def collect(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator, size: int) -> Rollout:
        """`size` samples, a multiple of `copies`.

        Raises:
            ValueError: `size` is not such a multiple.
        """
        copies = self._copies.env.count
        if size < 1 or size % copies:
            raise ValueError(
                f"task '{self.name}' was asked for {size} samples; expected a multiple of its {copies} copies"
            )
        return Rollout.cat([self._stretch(cast[self.member], knobs, rng) for _ in range(size // copies)])

    def _stretch(self, policy: Any, knobs: Mapping[str, float], rng: torch.Generator) -> Rollout:
        """One sample of every copy."""
        started, copies, record = time.time(), self._copies, _Record()
        if self.episodes:
            copies.restart(knobs, rng, self.siblings or 1)
        memory = copies.memory
        self._play(copies, record, policy, knobs, rng, self.steps, whole=self.episodes)
        rows = copies.env.count
        group = torch.arange(rows) // self.siblings if self.siblings else torch.zeros(rows, dtype=torch.int64)
        times = {"started_at": started, "finished_at": time.time()}
        rollout = Rollout.create(
            task=self.name,
            group=group,
            knobs=knobs,
            version=torch.full((rows,), getattr(policy, "version", 0)),
            **{name: torch.full((rows,), value, dtype=torch.float64) for name, value in times.items()},
            **record.fields(knobs[self.discount.name], memory),
        )
        return rollout.to(rng.device)

    @staticmethod
    def _play(
        copies: _Copies,
        record: _Record,
        policy: Any,
        knobs: Mapping[str, float],
        rng: torch.Generator,
        steps: int,
        whole: bool,
    ) -> None:
        """Up to `steps` steps, recorded; of whole episodes only up to their ends."""
        alive = torch.ones(copies.env.count, dtype=torch.bool)
        for _ in range(steps):
            record.add(alive, copies.step(policy, knobs, rng))
            if whole:
                alive = alive & ~copies.ended
                if not bool(alive.any()):
                    return

    @torch.no_grad()
    def evaluate(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator) -> Evaluation:
        """Mean `return` and `length` of whole episodes, and of what the environment told in their last step."""
        copies, record = _Copies(self.make(self.evaluation_episodes)), _Record()
        copies.restart(knobs, rng, 1)
        self._play(copies, record, cast[self.evaluated], knobs, rng, self.evaluation_steps, whole=True)
        return Evaluation(record.summary())

    def state_dict(self) -> dict[str, Any]:
        """Where every copy is, and what the policy remembers of it; nothing for whole episodes."""
        return {} if self.episodes else self._copies.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        if state:
            self._copies.load_state_dict(state)


class _Copies:
    """Where the copies of an environment are.

    Attributes:
        observations: what each saw last; `None` before the first start.
        ended: bool `[N]`, copies whose episode has ended, or has never begun.
        memory: what a recurrent policy remembers of each.
    """

    def __init__(self, env: VectorEnv) -> None:
        self.env = env
        self.observations: Observations | None = None
        self.ended = torch.ones(env.count, dtype=torch.bool)
        self.memory: Tensor | None = None
        self._begins = self.ended.clone()

    def restart(self, knobs: Mapping[str, float], rng: torch.Generator, siblings: int) -> None:
        """Start an episode in every copy; as many neighbours as are siblings from the same seed."""
        self.ended[:] = True
        self._start(knobs, _seeds(self.env.count // siblings, rng).repeat_interleave(siblings))

    def _start(self, knobs: Mapping[str, float], seeds: Tensor) -> None:
        """Start an episode in every copy whose last one has ended."""
        self.observations = self.env.reset(self.ended, seeds, knobs)
        self._begins = self.ended
        self.ended = torch.zeros_like(self.ended)

    def step(self, policy: Any, knobs: Mapping[str, float], rng: torch.Generator) -> dict[str, Any]:
        """One step of every copy, after a new start where one is due; what is to be recorded."""
        if bool(self.ended.any()):
            self._start(knobs, _seeds(self.env.count, rng))
        seen, begins = self.observations, self._begins
        acting: Acting = policy.act(seen, self.memory, begins, knobs, rng)
        change = self.env.step(acting.actions)
        self.observations, self.memory = change.observations, acting.memory
        self.ended = change.terminated | change.truncated
        self._begins = torch.zeros_like(begins)
        return {
            "observations": seen,
            "actions": acting.actions,
            "logprobs": acting.logprobs,
            "next_observations": change.observations,
            "env_reward": change.reward,
            "start": begins,
            "terminated": change.terminated,
            "cut": change.truncated & ~change.terminated,
            **change.info,
        }

    def state_dict(self) -> dict[str, Any]:
        """Where they are."""
        if self.observations is None:
            return {}
        seen = self.observations.to_dict() if isinstance(self.observations, TensorDict) else self.observations
        return {
            "env": self.env.state_dict(),
            "observations": seen,
            "ended": self.ended,
            "begins": self._begins,
            "memory": self.memory,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put them back there."""
        if not state:
            return
        self.env.load_state_dict(state["env"])
        seen = state["observations"]
        self.observations = seen if isinstance(seen, Tensor) else TensorDict(seen, batch_size=[self.env.count])
        self.ended, self._begins, self.memory = state["ended"], state["begins"], state["memory"]


class _Record:
    """What happened, step by step."""

    def __init__(self) -> None:
        self._mask: list[Tensor] = []
        self._steps: list[dict[str, Any]] = []

    def add(self, alive: Tensor, step: dict[str, Any]) -> None:
        """Take in a step of every copy, of which those `alive` count."""
        self._mask.append(alive)
        self._steps.append(step)

    def _stacked(self, name: str) -> Any:
        return torch.stack([step[name] for step in self._steps], 1)

    def fields(self, discount: float, memory: Tensor | None) -> dict[str, Any]:
        """The fields and columns of a rollout."""
        mask, first = torch.stack(self._mask, 1), self._steps[0]
        column = {name: self._stacked(name) for name, value in first.items() if value is not None}
        over = column.pop("terminated")
        # An episode that is still under way at the last step is cut off there.
        column["cut"] = mask & column["cut"]
        fields: dict[str, Any] = {
            name: column.pop(name) for name in ("observations", "actions", "logprobs") if name in column
        }
        return {
            **fields,
            "mask": mask,
            "discount": torch.where(over, 0.0, discount),
            "step_columns": column,
            "columns": {} if memory is None else {"memory": memory},
        }

    def summary(self) -> dict[str, float]:
        """Means over episodes: return, length, and what the environment told in their last step."""
        mask = torch.stack(self._mask, 1)
        last = mask.sum(1) - 1
        found = {"return": (self._stacked("env_reward") * mask).sum(1), "length": mask.sum(1)}
        for name in self._steps[0].keys() - _STEP:
            values = self._stacked(name)
            if values.ndim == 2:
                found[name] = values.gather(1, last[:, None]).squeeze(1)
        return {name: float(value.double().mean()) for name, value in found.items()}


_STEP = {"observations", "actions", "logprobs", "next_observations", "env_reward", "start", "terminated", "cut"}


def _seeds(count: int, rng: torch.Generator) -> Tensor:
    return torch.randint(2**31, (count,), generator=rng, device=rng.device).cpu()
