"""Modular arithmetic, verified by working every question out again."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from regimen.tasks.arithmetic import (
    chained_arithmetic,
    chained_vocabulary,
    modular_arithmetic,
    modular_facts,
    modular_vocabulary,
)


def worked_out(question: str, modulus: int) -> list[tuple[str, int]]:
    """Every step from left to right as `("3 + 4", 2)`, by Python's own arithmetic."""
    first, *rest = question.split()
    value, steps = int(first), []
    for operation, operand in zip(rest[::2], rest[1::2], strict=True):
        step = f"{value} {operation} {operand}"
        value = eval(step) % modulus
        steps.append((step, value))
    return steps


def test_compact_trace_of_four_digits_has_22_words() -> None:
    for row in chained_arithmetic(50, 0, restate=1):
        steps = worked_out(row["question"], 5)
        trace = " ".join(f"{step} = {value} ;" for step, value in steps)
        assert row["solution"] == f"{trace} </think> <answer> {steps[-1][1]} </answer>"
        assert row["answer"] == str(steps[-1][1])
        assert len(row["solution"].split()) == 22
        assert row["operands"] == len(row["question"].split()[::2]) == 4


def test_verbose_trace_states_each_step_one_to_four_times() -> None:
    rows = chained_arithmetic(400, 1)
    counts = []
    for row in rows:
        thought, _, _ = row["solution"].partition(" </think>")
        told = [text.strip() for text in thought.split(" ;")[:-1]]
        said = [(text, len(list(same))) for text, same in itertools.groupby(told)]
        counts += [count for _, count in said]
        # Two steps in a row may be the same one ("0 + 0 = 0"), and then they are one run.
        expected = [text for text, _ in itertools.groupby(f"{s} = {v}" for s, v in worked_out(row["question"], 5))]
        assert [text for text, _ in said] == expected
    assert set(counts) >= {1, 2, 3, 4}
    lengths = [len(row["solution"].split()) for row in rows]
    assert max(lengths) <= 76
    # Three steps of 2.5 times 6 words and an end of 4: 49.
    assert sum(lengths) / len(lengths) == pytest.approx(49, abs=2)


@pytest.mark.parametrize("seed", [0, 1])
def test_answers_of_modular_arithmetic_are_right(seed: int) -> None:
    rows = modular_arithmetic(200, seed, modulus=(2, 97), terms=(2, 5))
    for row in rows:
        question, _, modulus = row["question"].partition(" mod ")
        assert int(modulus) == row["modulus"]
        assert 2 <= row["modulus"] <= 97
        assert 2 <= row["operands"] == len(question.split()[::2]) <= 5
        assert all(int(word) < row["modulus"] for word in question.split()[::2])
        assert row["answer"] == str(worked_out(question, row["modulus"])[-1][1])
    assert {operation for row in rows for operation in row["question"].split()[1:-2:2]} == set("+-*")
    assert len({row["modulus"] for row in rows}) > 50


def test_facts_are_all_there_once_and_right() -> None:
    facts = modular_facts(7, "+-*")
    assert {fact["question"] for fact in facts} == {f"{a} {op} {b}" for a in range(7) for b in range(7) for op in "+-*"}
    assert len(facts) == 3 * 49
    for fact in facts:
        value = eval(fact["question"]) % 7
        assert fact["solution"] == f"= {value} ;"
        assert fact["answer"] == str(value)


def test_equal_seeds_give_equal_rows_and_others_do_not() -> None:
    for make in (chained_arithmetic, modular_arithmetic):
        assert make(20, 5) == make(20, 5) != make(20, 6)
        assert make(20, 5)[:8] == make(8, 5)


def test_every_word_is_in_the_vocabulary() -> None:
    def words(rows: list[dict[str, Any]]) -> set[str]:
        return {word for row in rows for field in ("question", "solution") for word in row.get(field, "").split()}

    chained = chained_arithmetic(300, 0, digits=(2, 6), modulus=6) + modular_facts(6)
    vocabulary = chained_vocabulary(6)
    assert words(chained) | {"<think>", "<answer>"} == set(vocabulary)
    assert len(set(vocabulary)) == len(vocabulary)
    modular = modular_vocabulary((5, 11), "+*")
    assert words(modular_arithmetic(600, 0, modulus=(5, 11), operations="+*")) <= set(modular)
    assert "11" in modular


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "count 0, modulus 5; expected 1, 2 or more"),
        ({"modulus": 1}, "modulus 1"),
        ({"digits": 1}, "digits: range 1 to 1; expected 2 or more, in order"),
        ({"digits": (5, 3)}, "digits: range 5 to 3"),
        ({"restate": 0}, "restate: range 0 to 0; expected 1 or more"),
        ({"operations": "+/"}, r"operations: '\+/'; expected some of \+-\*"),
        ({"operations": ""}, "operations: ''"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chained_arithmetic(**{"count": 3, "seed": 0, **settings})


def test_settings_out_of_range_are_named_by_the_others() -> None:
    with pytest.raises(ValueError, match="modular_facts: modulus 1"):
        modular_facts(1)
    with pytest.raises(ValueError, match="modular_arithmetic: count 0"):
        modular_arithmetic(0, 0)
    with pytest.raises(ValueError, match="modulus: range 1 to 9"):
        modular_arithmetic(1, 0, modulus=(1, 9))
