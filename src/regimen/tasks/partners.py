"""Who a policy talks with: environments of texts, made of Python objects or batched, and tools beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from random import Random
from typing import Any, Protocol


@dataclass(frozen=True)
class Reply:
    """What the other side makes of one turn of the policy.

    Attributes:
        text: what the policy reads next; after the end it is only written into the transcript.
        reward: of the turn that is answered.
        done: nothing of value comes after (a time limit that is part of the game counts as such an end).
        success: whether the aim is reached as things stand.
        role: who speaks, in the policy's chat template: `"user"`, `"tool"`.
        facts: further numbers about the turn that is answered, for the columns that a task names.
        failure: why there is no answer; the dialogue then leaves training. Empty where there is one.
    """

    text: str = ""
    reward: float = 0.0
    done: bool = False
    success: bool = False
    role: str = "user"
    facts: Mapping[str, float] = field(default_factory=dict)
    failure: str = ""


class DialogueEnv(Protocol):
    """The other side of many dialogues at once. It keeps nothing between calls: what it must know is in the state."""

    def reset(self, starts: Sequence[int], seeds: Sequence[int]) -> tuple[Sequence[Reply], Any]:
        """Begin dialogues: their openings (the texts of replies to nothing), and the state that `step` is given back.

        Args:
            starts: equal numbers are equal starts: the same opening and the same aim.
            seeds: of whatever else is random in each dialogue.
        """
        ...

    def step(self, state: Any, rows: Sequence[int], texts: Sequence[str]) -> Sequence[Reply]:
        """Answer the turns `texts` of the dialogues `rows`; the others are over. The state may be changed in place."""
        ...


class Partner(Protocol):
    """The other side of one dialogue: a simulated user, a game, a tool."""

    @property
    def opening(self) -> str:
        """The prompt with which the dialogue begins."""
        ...

    def reply(self, text: str) -> Reply:
        """Answer the policy's turn."""
        ...


@dataclass(frozen=True)
class OneByOne:
    """An environment of Python objects, one for each dialogue. One that raises fails alone.

    Attributes:
        make: `(start, random) -> Partner`; equal starts are equal, all else is drawn from `random`.
    """

    make: Callable[[int, Random], Partner]

    def reset(self, starts: Sequence[int], seeds: Sequence[int]) -> tuple[list[Reply], list[Partner | None]]:
        """Make the partners."""
        partners: list[Partner | None] = [None] * len(starts)

        def begin(row: int) -> Reply:
            partner = partners[row] = self.make(starts[row], Random(seeds[row]))
            return Reply(partner.opening)

        return [attempt("the environment, when it began,", begin, row) for row in range(len(starts))], partners

    def step(self, state: list[Partner | None], rows: Sequence[int], texts: Sequence[str]) -> list[Reply]:
        """Ask each partner."""

        def ask(row: int, text: str) -> Reply:
            partner = state[row]
            assert partner is not None, "a dialogue that failed to begin has no turns"
            return partner.reply(text)

        return [attempt("the environment", ask, row, text) for row, text in zip(rows, texts, strict=True)]


Tool = Callable[[str], str | None]
"""The result of a turn that calls the tool, or `None` for a turn that does not; a bad call has a result, too."""


class WithTools:
    """A partner with tools beside it: they answer the turns that call them, the partner all others."""

    def __init__(self, partner: Partner, tools: Sequence[Tool], cost: float = 0.0) -> None:
        """Put tools beside a partner.

        Args:
            partner: who the policy talks with.
            tools: the first that takes a turn answers it, in the role `"tool"`.
            cost: of a call, taken off the turn's reward.
        """
        self.partner, self.tools, self.cost = partner, tuple(tools), cost

    @property
    def opening(self) -> str:
        """The partner's."""
        return self.partner.opening

    def reply(self, text: str) -> Reply:
        """The result of the tool that is called, or the partner's answer."""
        results = (tool(text) for tool in self.tools)
        result = next((result for result in results if result is not None), None)
        return self.partner.reply(text) if result is None else Reply(result, -self.cost, role="tool")


def attempt(who: str, ask: Callable[..., Reply], *arguments: Any) -> Reply:
    """An answer, or the failure to give one."""
    try:
        return ask(*arguments)
    except Exception as error:
        return failed(who, error)


def failed(who: str, error: Exception) -> Reply:
    """The reply of an environment that raised."""
    return Reply(failure=f"{who} raised {type(error).__name__}: {error}")


def checked(reply: Any) -> Reply:
    """A reply as it is, or as a failure if it is none, its text is no text, or a number is not finite."""
    if not isinstance(reply, Reply):
        return Reply(failure=f"the environment answered a {type(reply).__name__}, expected a Reply")
    if not isinstance(reply.text, str):
        return Reply(failure=f"the environment answered a {type(reply.text).__name__}, expected a text")
    for name, value in {"reward": reply.reward, **reply.facts}.items():
        if not isinstance(value, Real) or not math.isfinite(value):
            return Reply(failure=f"the environment gave {name} {value!r}, expected a finite number")
    return reply
