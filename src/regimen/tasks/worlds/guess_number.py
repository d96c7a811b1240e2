"""A hidden number to be guessed from the answers higher and lower, and a calculator: the smallest dialogue and tool."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from regimen.tasks.partners import Reply

_APPLY: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
LONGEST = 200


@dataclass(frozen=True)
class GuessNumber:
    """Games in which the policy guesses a hidden number and is told whether it is higher or lower.

    The right guess earns 1 and ends the game, and so does, for 0, the last guess. A turn that is no number in the range
    counts as a guess; the fact `valid` tells them apart. With `g` guesses, halving the range finds each of `2^g - 1`
    numbers.

    Used as the environment `OneByOne(GuessNumber())`. The start `s` hides the number `low + s mod (high - low + 1)`.

    Attributes:
        low, high: the range, both ends included.
        guesses: how many there are.
    """

    low: int = 1
    high: int = 7
    guesses: int = 3

    def __post_init__(self) -> None:
        if self.low > self.high or self.guesses < 1:
            raise ValueError(
                f"GuessNumber: low={self.low}, high={self.high}, guesses={self.guesses}; expected low <= high and at "
                "least one guess"
            )

    def __call__(self, start: int, random: Random) -> GuessingGame:
        """A game."""
        return GuessingGame(self, self.low + start % (self.high - self.low + 1))

    @property
    def words(self) -> tuple[str, ...]:
        """Every word of a game, for a tokenizer of words."""
        numbers = [str(number) for number in range(self.low, self.high + 1)]
        return (*numbers, "guess", "from", "to", "higher", "lower", "right", "over")


class GuessingGame:
    """One game, a `Partner`."""

    def __init__(self, settings: GuessNumber, hidden: int) -> None:
        self.settings, self.hidden, self.guessed = settings, hidden, 0

    @property
    def opening(self) -> str:
        """The range."""
        return f"guess from {self.settings.low} to {self.settings.high}"

    def reply(self, text: str) -> Reply:
        """`higher`, `lower` or `right`; `over` with the last wrong guess; the task again if it is no number."""
        self.guessed += 1
        number = int(text) if re.fullmatch(r"\s*-?\d{1,18}\s*", text) else None
        valid = number is not None and self.settings.low <= number <= self.settings.high
        facts = {"valid": float(valid)}
        if number == self.hidden:
            return Reply("right", reward=1.0, done=True, success=True, facts=facts)
        if self.guessed == self.settings.guesses:
            return Reply("over", done=True, facts=facts)
        if number is None or not valid:
            return Reply(self.opening, facts=facts)
        return Reply("higher" if number < self.hidden else "lower", facts=facts)


def calculator(text: str) -> str | None:
    """The value of `calc <expression>`, a `Tool`: numbers, `+ - * / //` and brackets.

    An expression that it cannot work out, or of over 200 characters, has the result `error`; a text that does not begin
    with `calc` has none.
    """
    call, _, expression = text.strip().partition(" ")
    if call != "calc":
        return None
    if len(expression) > LONGEST:
        return "error"
    try:
        return f"{_value(ast.parse(expression.strip(), mode='eval').body):.12g}"
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return "error"


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.BinOp) and type(node.op) in _APPLY:
        return _APPLY[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    raise ValueError(f"'{ast.dump(node)[:40]}' is no arithmetic")
