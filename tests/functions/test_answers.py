"""Answers in texts: where they stand, and whether they are right."""

from __future__ import annotations

import sys

import pytest

from regimen.functions.answers import (
    boxed_text,
    choice_match,
    code_block,
    exact_match,
    hash_answer,
    last_number,
    math_match,
    numeric_match,
    tag_format,
    tag_spans,
    tag_text,
    to_choice,
    to_number,
)

WEIGHTS = {"think": 0.5, "answer": 0.5}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think> a </think> <answer> 1 </answer>", 1.0),
        ("so: <think></think><answer></answer> done", 1.0),
        ("<think> a </think> 1", 0.5),
        ("a </think> <answer> 1 </answer>", 0.5),
        ("<answer> 1 </answer>", 0.5),
        ("", 0.0),
        ("<think> a <answer> 1", 0.0),
        # Twice, or closed before it is opened: not well formed.
        ("<think> a </think> <think> b </think> <answer> 1 </answer>", 0.5),
        ("<think> a </think> </think> <answer> 1 </answer>", 0.5),
        ("</think> a <think> <answer> 1 </answer>", 0.5),
        ("<THINK> a </THINK> <answer> 1 </answer>", 0.5),
        # Nested or crossing spans are neither's.
        ("<think> a <answer> 1 </answer> </think>", 0.0),
        ("<think> a <answer> b </think> 1 </answer>", 0.0),
        ("<answer> 1 </answer> <think> a </think>", 0.0),
    ],
)
def test_format_is_worth_the_tags_that_are_in_order(text: str, value: float) -> None:
    assert tag_format(text, WEIGHTS) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think> a </think>\n<answer> 1 </answer>\n", 1.0),
        ("<think> a </think> so <answer> 1 </answer>", 0.0),
        ("hm <think> a </think><answer> 1 </answer>", 0.0),
        ("<think> a </think><answer> 1 </answer>.", 0.0),
        ("<think> a </think>", 0.0),
        ("<answer> 1 </answer><think> a </think>", 0.0),
    ],
)
def test_whole_format_is_all_or_nothing(text: str, value: float) -> None:
    assert tag_format(text, WEIGHTS, whole=True) == value


def test_content_must_match_its_schema_in_full() -> None:
    schema = {"answer": r"\d+"}
    for text, value in (("12", 1.0), ("\n 12 \n", 1.0), ("12 apples", 0.5), ("", 0.5)):
        full = f"<think> a </think><answer>{text}</answer>"
        assert tag_format(full, WEIGHTS, schema=schema) == value
        assert tag_format(full, WEIGHTS, whole=True, schema=schema) == float(value == 1)
    assert tag_format("<think>a\nb</think>", WEIGHTS, schema={"think": "a.b"}) == 0.5


def test_weights_add_up_without_rounding() -> None:
    weights = dict.fromkeys("abcdefghij", 0.1)
    assert tag_format("".join(f"<{tag}></{tag}>" for tag in weights), weights) == 1.0


def test_spans_hold_their_brackets() -> None:
    text = "x<a>1</a> <b>2</b>"
    spans = tag_spans(text, ["a", "b", "c"])
    assert {tag: text[slice(*span)] for tag, span in spans.items()} == {"a": "<a>1</a>", "b": "<b>2</b>"}
    # The third overlaps the second only, so the first stands.
    assert tag_spans("<a></a><b><c></b></c>", ["a", "b", "c"]) == {"a": (0, 7)}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<answer> 12 </answer>", "12"),
        ("<answer>1</answer> <answer>2</answer>", "1"),
        ("</answer> <answer>3</answer>", "3"),
        ("<answer>4", None),
        ("5</answer>", None),
        ("<answer></answer>", ""),
    ],
)
def test_tag_text_is_between_the_first_pair(text: str, found: str | None) -> None:
    assert tag_text(text, "answer") == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so \boxed{4}", "4"),
        (r"\boxed{1} then \boxed {2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{", None),
        ("4", None),
    ],
)
def test_boxed_text_is_the_last_closed_box(text: str, found: str | None) -> None:
    assert boxed_text(text) == found


def test_hash_answer_is_the_rest_of_the_line() -> None:
    assert hash_answer("48/2 = 24\n#### 72") == "72"
    assert hash_answer("#### 1\n#### 2 \nmore") == "2"
    assert hash_answer("####") == ""
    assert hash_answer("72") is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("12 apples and 7 pears", "7"),
        ("it costs $1,234.50.", "$1,234.50"),
        ("x = -3", "-3"),
        ("3/4", "3/4"),
        ("v1.2 beta3", None),
        ("none", None),
        ("about 1,23", "23"),
    ],
)
def test_last_number(text: str, found: str | None) -> None:
    assert last_number(text) == found


def test_code_block_is_the_last_one_of_its_language() -> None:
    text = "```python\na = 1\n```\n```text\nno\n```\n```\nb = 2\n```\n```python\nopen"
    assert code_block(text) == "b = 2\n"
    assert code_block(text, "text") == "b = 2\n"
    assert code_block("```Python\na\n```") == "a\n"
    assert code_block("```js\na\n```") is None
    assert code_block("a = 1") is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12), (" 12 ", 12), ("-3", -3), ("+3", 3), ("- 3", -3), ("1,234", 1234), ("1,234,567.5", 1234567.5),
        (".5", 0.5), ("3.", 3), ("1e3", 1000), ("1.5E-2", 0.015), ("3/4", 0.75), ("-3 / 4", -0.75), ("$5", 5),
        (r"\$5", 5), ("$-5", -5), ("-$5", -5), ("€ 7", 7), ("50%", 50), (r"50\%", 50), ("12 apples", 12),
        ("12 cm²", 12), ("3 km/h", 3),
        ("", None), ("apples", None), ("12 and 3", None), ("1,23", None), ("12,34,567", None), ("1/0", None),
        ("1e999", None), ("1.2.3", None), (".", None), ("-", None), ("e5", None), ("/4", None),
        ("3/", None), ("3/e5", None), ("nan", None),
        ("inf", None), ("= 4", None), ("4 x 2", None),
    ],
)  # fmt: skip
def test_a_quantity_is_read_or_is_none(text: str, value: float | None) -> None:
    found = to_number(text)
    assert found == (None if value is None else pytest.approx(value))


def test_exact_match_ignores_outer_space_only() -> None:
    assert exact_match(" 4 ", "4\n")
    assert exact_match("4", 4)
    assert not exact_match("a", "A")
    assert not exact_match("4.0", 4)


def test_numeric_match_compares_quantities() -> None:
    assert numeric_match("$1,000", 1000)
    assert numeric_match("0.3333333", "1/3", tolerance=1e-6)
    assert not numeric_match("0.333", "1/3")
    assert numeric_match("1000000.5", "1,000,000")
    assert not numeric_match("1000002", "1,000,000")
    assert numeric_match("0.0000001", 0)
    assert not numeric_match("four", 4)
    with pytest.raises(ValueError, match="expected answer 'x = 4' is not a number; verify it with exact_match or"):
        numeric_match("4", "x = 4")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("(B)", "B"), (" B ", "B"), ("B. Paris", "B"), ("B) Paris", "B"), ("(B) Paris", "B"),
        ("B: Paris", "B"), ("[B]", None), ("The answer is B", "B"), ("answer: (C) because", "C"), ("Option D.", "D"),
        ("choice A", "A"),
        ("option A or option B", None), ("A or B", None), ("b", None), ("Because of it", None), ("", None),
        ("The answer is Because", None),
    ],
)  # fmt: skip
def test_the_letter_that_an_answer_names(text: str, letter: str | None) -> None:
    assert to_choice(text) == letter


def test_choice_match_knows_its_choices() -> None:
    assert choice_match("(B) Paris", "B")
    assert not choice_match("A", "B")
    assert not choice_match("Paris", "B")
    assert choice_match("2", "2", choices="1234")
    assert choice_match("]", "]", choices="]^-")
    with pytest.raises(ValueError, match="expected answer 'Paris' names none of the choices ABCD"):
        choice_match("A", "Paris", choices="ABCD")


@pytest.mark.parametrize(
    ("given", "expected", "right"),
    [
        ("1/2", "0.5", True),
        (r"\frac{1}{2}", "1/2", True),
        (r"$\frac{2}{4}$", r"\frac12", True),
        (r"\boxed{12}", 12, True),
        ("2*x + 2", "2*(x+1)", True),
        (r"\sqrt{8}", r"2\sqrt{2}", True),
        ("(1, 2)", "(1,2)", True),
        ("3", "4", False),
        ("x + 1", "x - 1", False),
        ("nothing to read here", "4", False),
    ],
)
def test_mathematics_is_compared_by_value(given: str, expected: object, right: bool) -> None:
    pytest.importorskip("math_verify")
    assert math_match(given, expected) is right


def test_expected_mathematics_that_cannot_be_read_is_a_fault_of_the_data() -> None:
    pytest.importorskip("math_verify")
    with pytest.raises(ValueError, match=r"expected answer ' ' cannot be read as mathematics"):
        math_match("4", " ")


def test_math_verify_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r"math_match needs math-verify: pip install 'regimen-rl\[math-verify\]'$"):
        math_match("4", "4")
