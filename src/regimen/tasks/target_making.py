"""Target-making (Countdown, Game of 24): an expression over given numbers that reaches a target."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from random import Random
from typing import Any, Literal

from regimen.tasks.arithmetic import APPLY, TAGS, Range, check, check_operations, range_of

Notation = Literal["infix", "postfix"]
# A number, or (operation, left, right).
Tree = int | tuple[str, "Tree", "Tree"]
_BINDS = {"+": 1, "-": 1, "*": 2, "/": 2}


def target_making(
    count: int,
    seed: int,
    *,
    numbers: Range = 4,
    largest: int = 9,
    target: tuple[int, int] = (10, 30),
    operations: str = "+-*",
    notation: Notation = "infix",
) -> list[dict[str, Any]]:
    """Make a target from some numbers, each used exactly once: `"4 7 1 3 -> 24"`.

    A question is made from a random expression, whose value becomes the target, so every question has a solution.

    Args:
        count: rows.
        seed: equal seeds give equal rows.
        numbers: how many, or the range that it is drawn from.
        largest: numbers are drawn from 1 to this.
        target: smallest and largest target.
        operations: of `+ - * /`; quotients may be fractions on the way.
        notation: of `answer`, one solution: `"( 4 + 7 ) * 3"` or `"4 7 + 3 *"`.

    Returns:
        Rows with `question`, `answer` (texts), `target` and `operands`. Other answers may be as right: verify with
        `reaches_target` against the question.

    Raises:
        ValueError: a setting is out of range, or no target in the range was met in 10,000 tries.
    """
    check(count >= 1 and largest >= 1, "target_making", f"count {count}, largest {largest}; expected 1 or more")
    sizes = range_of(numbers, 2, "numbers")
    check_operations(operations, "+-*/")
    random = Random(seed)
    return [_target(random, random.randint(*sizes), largest, target, operations, notation) for _ in range(count)]


def _target(
    random: Random, size: int, largest: int, target: tuple[int, int], operations: str, notation: Notation
) -> dict[str, Any]:
    for _ in range(10_000):
        values = [random.randint(1, largest) for _ in range(size)]
        tree = _random_tree(random, values, operations)
        value = _value(postfix := _postfix(tree))
        if value is not None and value.denominator == 1 and target[0] <= value <= target[1]:
            answer = " ".join(postfix if notation == "postfix" else _infix(tree))
            question = f"{' '.join(map(str, random.sample(values, size)))} -> {value}"
            return {"question": question, "answer": answer, "target": int(value), "operands": size}
    raise ValueError(
        f"target_making: {size} numbers up to {largest} with {operations} met no target in {list(target)} in 10,000 "
        "tries; widen the range of targets or raise `largest`"
    )


def target_vocabulary(largest: int = 9, target: tuple[int, int] = (10, 30), operations: str = "+-*") -> tuple[str, ...]:
    """The words of `target_making`, tags included; every number is one word."""
    values = sorted({*range(1, largest + 1), *range(target[0], target[1] + 1)})
    return (*map(str, values), *operations, "(", ")", "->", "=", *TAGS)


def target_fault(answer: str, question: object) -> Literal["syntax", "numbers", "value"] | None:
    """What is wrong with an answer to a `target_making` question, or `None` if it is right.

    Infix and postfix are both understood. Values are exact fractions; nothing is evaluated as code.

    Returns:
        `"syntax"`: not an expression; `"numbers"`: does not use exactly the numbers given; `"value"`: misses the
        target.
    """
    given, _, target = str(question).partition("->")
    words = re.findall(r"\d+|\S", answer)
    if len(words) > 6 * len(given.split()) or len(answer) > 1000:
        return "syntax"
    postfix = words if _is_postfix(words) else _from_infix(words)
    if postfix is None:
        return "syntax"
    if sorted(int(word) for word in postfix if word.isdecimal()) != sorted(map(int, given.split())):
        return "numbers"
    return None if _value(postfix) == Fraction(target.strip()) else "value"


def reaches_target(answer: str, question: object) -> bool:
    """Whether an expression makes the target of a `target_making` question: a verifier against the question."""
    return target_fault(answer, question) is None


def _random_tree(random: Random, values: Sequence[int], operations: str) -> Tree:
    """Two random neighbours are joined until one tree is left."""
    trees: list[Tree] = list(values)
    while len(trees) > 1:
        at = random.randrange(len(trees) - 1)
        trees[at : at + 2] = [(random.choice(operations), trees[at], trees[at + 1])]
    return trees[0]


def _postfix(tree: Tree) -> list[str]:
    if isinstance(tree, int):
        return [str(tree)]
    operation, left, right = tree
    return [*_postfix(left), *_postfix(right), operation]


def _infix(tree: Tree) -> list[str]:
    """With the brackets that are needed, and no others."""
    if isinstance(tree, int):
        return [str(tree)]
    operation, left, right = tree
    words = []
    for side, tight in ((left, 0), (right, operation in "-/")):
        inner = _infix(side)
        bare = isinstance(side, int) or _BINDS[side[0]] >= _BINDS[operation] + tight
        words += [*inner] if bare else ["(", *inner, ")"]
        words.append(operation)
    return words[:-1]


def _value(postfix: Sequence[str]) -> Fraction | None:
    """The value of a well-formed postfix expression; `None` for a division by zero."""
    stack: list[Fraction] = []
    for word in postfix:
        if word.isdecimal():
            stack.append(Fraction(int(word)))
            continue
        right, left = stack.pop(), stack.pop()
        if word == "/" and right == 0:
            return None
        stack.append(APPLY[word](left, right))
    return stack[0]


def _is_postfix(words: Sequence[str]) -> bool:
    depth = 0
    for word in words:
        depth += 1 if word.isdecimal() else -1
        if depth < 1 or not (word.isdecimal() or word in _BINDS):
            return False
    return depth == 1


def _from_infix(words: Sequence[str]) -> list[str] | None:
    """Postfix by Dijkstra's shunting yard; `None` if it is not an expression."""
    output, waiting, operand_next = list[str](), list[str](), True
    for word in words:
        if word.isdecimal() and operand_next:
            output.append(word)
            operand_next = False
        elif word == "(" and operand_next:
            waiting.append(word)
        elif word == ")" and not operand_next:
            while waiting and waiting[-1] != "(":
                output.append(waiting.pop())
            if not waiting:
                return None
            waiting.pop()
        elif word in _BINDS and not operand_next:
            while waiting and waiting[-1] != "(" and _BINDS[waiting[-1]] >= _BINDS[word]:
                output.append(waiting.pop())
            waiting.append(word)
            operand_next = True
        else:
            return None
    if operand_next or "(" in waiting:
        return None
    return [*output, *reversed(waiting)]
