"""Target-making: every question can be reached, and answers are judged as Python would evaluate them."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regimen.tasks.target_making import reaches_target, target_fault, target_making, target_vocabulary


def value_of(infix: str) -> Fraction:
    """By Python's parser, with every number a fraction."""
    words = [f"Fraction({word})" if word.isdecimal() else word for word in infix.split()]
    return eval(" ".join(words), {"Fraction": Fraction})


def value_of_postfix(answer: str) -> Fraction:
    stack: list[Fraction] = []
    for word in answer.split():
        if word.isdecimal():
            stack.append(Fraction(word))
        else:
            right, left = stack.pop(), stack.pop()
            stack.append(eval(f"left {word} right", {"left": left, "right": right}))
    assert len(stack) == 1
    return stack[0]


@pytest.mark.parametrize("operations", ["+-*", "+-*/"])
def test_every_question_has_the_solution_that_its_row_gives(operations: str) -> None:
    rows = target_making(150, 0, numbers=(2, 5), operations=operations, target=(-5, 40))
    for row in rows:
        numbers, _, target = row["question"].partition(" -> ")
        assert int(target) == row["target"]
        assert -5 <= row["target"] <= 40
        assert len(numbers.split()) == row["operands"]
        assert Counter(word for word in row["answer"].split() if word.isdecimal()) == Counter(numbers.split())
        assert value_of(row["answer"]) == row["target"]
        assert reaches_target(row["answer"], row["question"])
    used = {word for row in rows for word in row["answer"].split() if not word.isdecimal()}
    assert used - {"(", ")"} == set(operations)
    assert used & {"("}


def test_postfix_answers_are_the_same_solutions() -> None:
    infix = target_making(60, 4, operations="+-*/")
    postfix = target_making(60, 4, operations="+-*/", notation="postfix")
    for one, other in zip(infix, postfix, strict=True):
        assert one["question"] == other["question"]
        assert value_of_postfix(other["answer"]) == value_of(one["answer"]) == one["target"]
        assert reaches_target(other["answer"], other["question"])


def test_brackets_are_only_where_they_change_the_value() -> None:
    for row in target_making(200, 1, operations="+-*/", numbers=4):
        words = row["answer"].split()
        for start in [i for i, word in enumerate(words) if word == "("]:
            depth, end = 0, start
            for end in range(start, len(words)):
                depth += {"(": 1, ")": -1}.get(words[end], 0)
                if depth == 0:
                    break
            without = " ".join(words[:start] + words[start + 1 : end] + words[end + 1 :])
            # One value may come out either way by chance (2 * 2, 2 + 2); other numbers in the same places tell.
            assert differs(" ".join(words), without), row["answer"]


def differs(one: str, other: str) -> bool:
    random = Random(0)
    for _ in range(20):
        fresh = {str(i): str(random.randint(2, 99)) for i in range(10)}
        try:
            changed = [" ".join(fresh.get(word, word) for word in text.split()) for text in (one, other)]
            if value_of(changed[0]) != value_of(changed[1]):
                return True
        except ZeroDivisionError:
            continue
    return False


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ("( 4 + 7 + 1 ) * 2", None),
        ("(4+7+1)*2", None),
        ("4 7 + 1 + 2 *", None),
        ("2 * (1 + (7 + 4))", None),
        ("4 * 7 - 2 * 1", "value"),
        ("4 + 7 * 2 + 1", "value"),
        ("4 + 7 + 1 + 12", "numbers"),
        ("4 + 7 + 1", "numbers"),
        ("4 + 7 + 1 * 2 * 2", "numbers"),
        ("47 + 1 * 2", "numbers"),
        ("24", "numbers"),
        ("4 / (1 - 1) + 7 + 2", "numbers"),
        ("", "syntax"),
        ("4 +", "syntax"),
        ("( 4 + 7 + 1 * 2", "syntax"),
        ("4 + 7 + 1 ) * 2", "syntax"),
        ("4 7 + 1 2", "syntax"),
        ("4 7 + + 1 2 *", "syntax"),
        ("-4 + 7 + 1 * 2", "syntax"),
        ("4 ** 2 + 7 + 1", "syntax"),
        ("4 ( 7 + 1 ) 2", "syntax"),
        ("__import__('os')", "syntax"),
        ("24 = (4 + 7 + 1) * 2", "syntax"),
        ("(" * 400 + "4" + ")" * 400, "syntax"),
        ("1" * 2000, "syntax"),
    ],
)
def test_faults_of_answers(answer: str, fault: str | None) -> None:
    assert target_fault(answer, "4 7 1 2 -> 24") == fault
    assert reaches_target(answer, "4 7 1 2 -> 24") == (fault is None)


def test_fractions_on_the_way_are_exact_and_division_by_zero_misses() -> None:
    assert reaches_target("8 / (3 - 8 / 3)", "3 3 8 8 -> 24")
    assert target_fault("8 / (3 - 3) * 8", "3 3 8 8 -> 24") == "value"
    assert reaches_target("2 - 5", "5 2 -> -3")


def nested(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    joined = st.tuples(parts, st.sampled_from("+-*/"), parts).map(" ".join)
    return joined | joined.map(lambda text: f"( {text} )")


EXPRESSIONS = st.recursive(st.integers(0, 12).map(str), nested, max_leaves=6)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(EXPRESSIONS)
def test_an_expression_is_right_exactly_where_python_finds_the_target(text: str) -> None:
    numbers = " ".join(word for word in text.split() if word.isdecimal())
    try:
        value = value_of(text)
    except ZeroDivisionError:
        assert target_fault(text, f"{numbers} -> 0") == "value"
        return
    assert target_fault(text, f"{numbers} -> {value}") is None
    assert target_fault(text, f"{numbers} -> {value + 1}") == "value"
    assert target_fault(text, f"{numbers} 1 -> {value}") == "numbers"


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([*"12+-*/()"]), max_size=8))
def test_what_python_cannot_read_is_no_expression(words: list[str]) -> None:
    text = " ".join(words)
    try:
        value_of(text)
    except (SyntaxError, TypeError):
        fault = target_fault(text, "1 2 -> 1")
        assert fault == "syntax" or all(word.isdecimal() for word in words[:2]), "only postfix may be read"
    except ZeroDivisionError:
        pass


def test_every_word_is_in_the_vocabulary() -> None:
    settings: dict[str, Any] = {"largest": 6, "target": (-2, 12), "operations": "+-/"}
    words = set()
    for notation in ("infix", "postfix"):
        for row in target_making(200, 0, **settings, notation=notation):
            words |= {*row["question"].split(), *row["answer"].split()}
    vocabulary = target_vocabulary(**settings)
    assert words <= set(vocabulary)
    assert len(set(vocabulary)) == len(vocabulary)


def test_equal_seeds_give_equal_rows_and_others_do_not() -> None:
    assert target_making(10, 5) == target_making(10, 5) != target_making(10, 6)
    assert target_making(10, 5)[:4] == target_making(4, 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "count 0, largest 9; expected 1 or more"),
        ({"largest": 0}, "largest 0"),
        ({"numbers": 1}, "numbers: range 1 to 1; expected 2 or more"),
        ({"operations": "+%"}, "operations: '\\+%'"),
        (
            {"numbers": 2, "operations": "+", "target": (100, 200)},
            r"2 numbers up to 9 with \+ met no target in \[100, 200\] in 10,000 tries; widen",
        ),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        target_making(**{"count": 3, "seed": 0, **settings})
