"""Tasks that make fresh rows at every draw, as hard as their knobs say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from regimen.knobs import Knob
from regimen.rollout import Rollout
from regimen.tasks.prompts import Evaluator
from regimen.tasks.text import Row, Template, TextPromptTask


class GeneratedTask(TextPromptTask):
    """Fresh rows of a family at every draw, as hard as its knobs say."""

    def __init__(
        self,
        name: str,
        make: Callable[..., Sequence[Row]],
        template: Template = "{question}",
        *,
        difficulty: Mapping[str, Knob] | None = None,
        reads: Sequence[Knob] = (),
        group_size: int = 1,
        evaluate: Evaluator | None = None,
        member: str = "policy",
        evaluated: str | None = None,
    ) -> None:
        """Make a task of a generator.

        Args:
            name: unique within a regimen.
            make: `(count, seed, **difficulty) -> rows`, such as `chained_arithmetic`; use `functools.partial` for
                settings that stay.
            template: turns a row into a prompt, see `render`.
            difficulty: settings of `make` that are whole-numbered knobs:
                `{"digits": Knob("digits", 4, low=2, high=8, integer=True)}`.
            reads: the knobs that the template reads.
            group_size, evaluate, member, evaluated: as in `PromptTask`.

        Raises:
            ValueError: a template that names what is not there.
        """
        self.make, self.difficulty = make, dict(difficulty or {})
        settings = {setting: knob.default for setting, knob in self.difficulty.items()}
        super().__init__(
            name,
            self._rows(1, 0, settings),
            template,
            reads=reads,
            group_size=group_size,
            evaluate=evaluate,
            member=member,
            evaluated=evaluated,
        )

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The knobs of the difficulty, and those that the template reads."""
        return (*self.difficulty.values(), *self.reads)

    def collect(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator, size: int) -> Rollout:
        """`size // group_size` new rows, each answered `group_size` times."""
        seed = int(torch.randint(2**62, (1,), generator=rng, device=rng.device))
        settings = {setting: knobs[knob.name] for setting, knob in self.difficulty.items()}
        rows = self._rows(max(1, size // self.group_size), seed, settings)
        fresh = TextPromptTask(
            self.name,
            rows,
            self.template,
            reads=self.reads,
            group_size=self.group_size,
            order="sequential",
            member=self.member,
        )
        return fresh.collect(cast, knobs, rng, size)

    def _rows(self, count: int, seed: int, settings: Mapping[str, float]) -> Sequence[Row]:
        return self.make(count, seed, **{setting: int(value) for setting, value in settings.items()})

    def state_dict(self) -> dict[str, Any]:
        """Nothing: rows come from the regimen's random stream."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore."""
