"""Modular arithmetic: chains worked out on a scratchpad, and answers given at once.

Generators are pure and seeded. Every text is made of words with one space between them, so that a tokenizer over a
family's vocabulary reads it word by word. Answers are single numbers: `exact_match` verifies them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from random import Random
from typing import Any

Range = int | tuple[int, int]
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
APPLY: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}


def chained_arithmetic(
    count: int, seed: int, *, digits: Range = 4, modulus: int = 5, restate: Range = (1, 4), operations: str = "+-"
) -> list[dict[str, Any]]:
    """Chains of digits worked out from left to right on a scratchpad.

    `question` is `"3 + 4 - 1"`. `solution` is the trace, then the end of the thinking and the answer:
    `"3 + 4 = 2 ; 2 - 1 = 1 ; </think> <answer> 1 </answer>"`. A prompt opens with `<think>`. A step is 6 words and
    the end is 4, so a compact trace (`restate=1`) of 4 digits has 22.
    Source: "Train Long, Think Short", experiment at small scale.

    Args:
        count: rows.
        seed: equal seeds give equal rows.
        digits: operands, or the range that their number is drawn from.
        modulus: of all values, at least 2; digits are drawn below it.
        restate: how often each step is stated, or the range that it is drawn from per step. A verbose trace is
            (1, 4).
        operations: of `+ - *`.

    Returns:
        Rows with `question`, `solution`, `answer` (texts) and `operands`.

    Raises:
        ValueError: a setting is out of range.
    """
    check(count >= 1 and modulus >= 2, "chained_arithmetic", f"count {count}, modulus {modulus}; expected 1, 2 or more")
    low, high = range_of(digits, 2, "digits")
    said = range_of(restate, 1, "restate")
    check_operations(operations, "+-*")
    random = Random(seed)
    return [_chain(random, random.randint(low, high), modulus, said, operations) for _ in range(count)]


def _chain(random: Random, digits: int, modulus: int, restate: tuple[int, int], operations: str) -> dict[str, Any]:
    value = random.randrange(modulus)
    question, steps = [str(value)], list[str]()
    for _ in range(digits - 1):
        operation, operand = random.choice(operations), random.randrange(modulus)
        result = APPLY[operation](value, operand) % modulus
        steps += [f"{value} {operation} {operand} = {result} ;"] * random.randint(*restate)
        question += [operation, str(operand)]
        value = result
    solution = " ".join([*steps, f"</think> <answer> {value} </answer>"])
    return {"question": " ".join(question), "solution": solution, "answer": str(value), "operands": digits}


def chained_vocabulary(modulus: int = 5, operations: str = "+-") -> tuple[str, ...]:
    """The words of `chained_arithmetic`, tags included."""
    return (*_digits(modulus), *operations, "=", ";", *TAGS)


def modular_facts(modulus: int = 5, operations: str = "+-") -> list[dict[str, Any]]:
    """Every fact `"a + b = c ;"` below a modulus, once: what a small model must know before it can follow a chain.

    Rows have `question` (`"a + b"`), `solution` (`"= c ;"`) and `answer`.
    """
    check(modulus >= 2, "modular_facts", f"modulus {modulus}; expected 2 or more")
    check_operations(operations, "+-*")
    return [
        {"question": f"{a} {op} {b}", "solution": f"= {(c := APPLY[op](a, b) % modulus)} ;", "answer": str(c)}
        for op in operations
        for a in range(modulus)
        for b in range(modulus)
    ]


def modular_arithmetic(
    count: int, seed: int, *, modulus: Range = 97, terms: Range = 2, operations: str = "+-*"
) -> list[dict[str, Any]]:
    """Sums, differences and products modulo n, answered at once: `"12 * 40 mod 97"`.

    Terms are worked out from left to right.

    Args:
        count: rows.
        seed: equal seeds give equal rows.
        modulus: n, or the range that it is drawn from.
        terms: operands, or the range that their number is drawn from.
        operations: of `+ - *`.

    Returns:
        Rows with `question`, `answer` (texts), `modulus` and `operands`.

    Raises:
        ValueError: a setting is out of range.
    """
    check(count >= 1, "modular_arithmetic", f"count {count}; expected 1 or more")
    moduli, numbers = range_of(modulus, 2, "modulus"), range_of(terms, 2, "terms")
    check_operations(operations, "+-*")
    random = Random(seed)
    rows = []
    for _ in range(count):
        n = random.randint(*moduli)
        row = _chain(random, random.randint(*numbers), n, (0, 0), operations)
        question = f"{row['question']} mod {n}"
        rows.append({"question": question, "answer": row["answer"], "modulus": n, "operands": row["operands"]})
    return rows


def modular_vocabulary(modulus: Range = 97, operations: str = "+-*") -> tuple[str, ...]:
    """The words of `modular_arithmetic`, tags included; every number is one word."""
    return (*_digits(range_of(modulus, 2, "modulus")[1] + 1), *operations, "mod", "=", *TAGS)


def _digits(end: int) -> tuple[str, ...]:
    return tuple(str(value) for value in range(end))


def check(good: bool, owner: str, why: str) -> None:
    if not good:
        raise ValueError(f"{owner}: {why}")


def range_of(value: Range, least: int, name: str) -> tuple[int, int]:
    low, high = (value, value) if isinstance(value, int) else value
    check(least <= low <= high, name, f"range {low} to {high}; expected {least} or more, in order")
    return low, high


def check_operations(operations: str, known: str) -> None:
    check(bool(operations) and set(operations) <= set(known), "operations", f"'{operations}'; expected some of {known}")
