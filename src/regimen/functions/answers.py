"""Answers in a text: where they stand, and whether they are right.

Extractors take a text and give the answer in it, or `None`. Verifiers take an answer and the expected one and give
whether it is right; they raise `ValueError` where the *expected* answer cannot be read, because that is a fault of
the data and not of the answer.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Mapping, Sequence

_NUMBER = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
_QUANTITY = re.compile(
    rf"([-+]?)\s*\\?[$€£¥]?\s*([-+]?)({_NUMBER})(?:\s*/\s*({_NUMBER}))?(?:\s*\\?%|\s*[^\W\d][^\d]*|\s*\.)?"
)
_IN_TEXT = re.compile(r"(?<![\w.])[-+]?\\?[$€£¥]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s*/\s*\d+(?:\.\d+)?)?")


def tag_spans(text: str, tags: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Where each well-formed tag pair begins and ends, its brackets included.

    A pair is well formed if there is exactly one `<tag>`, exactly one `</tag>`, and the first stands before the
    second. Two pairs that overlap, or stand in another order than `tags` gives, are both left out.

    Args:
        text: any text.
        tags: names without brackets, in the order that they should have.
    """
    spans = {tag: span for tag in tags if (span := _span(text, tag)) is not None}
    found = [tag for tag in tags if tag in spans]
    clash = {
        tag
        for i, first in enumerate(found)
        for second in found[i + 1 :]
        if spans[first][1] > spans[second][0]
        for tag in (first, second)
    }
    return {tag: span for tag, span in spans.items() if tag not in clash}


def _span(text: str, tag: str) -> tuple[int, int] | None:
    start, end = f"<{tag}>", f"</{tag}>"
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        return None
    return text.index(start), text.index(end) + len(end)


def tag_text(text: str, tag: str) -> str | None:
    """What stands between the first `<tag>` and the `</tag>` after it, stripped; `None` without such a pair."""
    _, start, rest = text.partition(f"<{tag}>")
    inner, end, _ = rest.partition(f"</{tag}>")
    return inner.strip() if start and end else None


def tag_format(
    text: str,
    weights: Mapping[str, float],
    whole: bool = False,
    schema: Mapping[str, str] | None = None,
) -> float:
    """How much of the wanted tag format a text has: the weights of the tags whose pair is in order, added up.

    Args:
        text: any text.
        weights: weight per tag, the tags in the order that they should have; see `tag_spans`.
        whole: ask for the whole format: everything in order and nothing but white space outside the tags; then
            the value is the sum of all weights, or 0.
        schema: per tag a regular expression that its stripped content must match in full; `.` matches new lines.
    """
    spans = tag_spans(text, list(weights))
    for tag, pattern in (schema or {}).items():
        if tag in spans and not re.fullmatch(pattern, tag_text(text, tag) or "", re.DOTALL):
            del spans[tag]
    if whole:
        edges = [0, *(edge for tag in weights if tag in spans for edge in spans[tag]), len(text)]
        outside = "".join(text[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True))
        if len(spans) < len(weights) or outside.strip():
            return 0.0
    return math.fsum(weights[tag] for tag in spans)


def boxed_text(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`, nested braces included; `None` without a closed one."""
    for start in reversed([match.end() for match in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for end in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[start:end].strip()
    return None


def hash_answer(text: str) -> str | None:
    """What follows the last `####` on its line, as GSM8K ends its solutions; `None` without one."""
    _, mark, rest = text.rpartition("####")
    return (rest.strip().splitlines() or [""])[0].strip() if mark else None


def last_number(text: str) -> str | None:
    """The last number written in a text, with its sign, currency mark and thousands commas."""
    found = _IN_TEXT.findall(text)
    return found[-1] if found else None


def code_block(text: str, language: str = "python") -> str | None:
    """The content of the last fenced block of a language, or of none; `None` if no closed block is there."""
    blocks = re.findall(r"```([^\n`]*)\n(.*?)```", text, re.DOTALL)
    wanted = [body for tag, body in blocks if tag.strip().lower() in ("", language)]
    return wanted[-1] if wanted else None


def to_number(text: str) -> float | None:
    """The quantity that a text consists of; `None` if it is not one quantity.

    Read are signs, `$ € £ ¥`, thousands commas (`1,234`), fractions (`3/4`), exponents, a trailing `%` (which does
    not scale) and trailing units without digits (`12 apples`).
    """
    match = _QUANTITY.fullmatch(text.strip())
    if match is None:
        return None
    sign = -1.0 if "-" in match[1] + match[2] else 1.0
    below = _plain(match[4]) if match[4] else 1.0
    value = sign * _plain(match[3]) / below if below else math.inf
    return value if math.isfinite(value) else None


def _plain(digits: str) -> float:
    return float(digits.replace(",", ""))


def exact_match(given: str, expected: object) -> bool:
    """Whether the stripped texts are equal, case included."""
    return given.strip() == str(expected).strip()


def numeric_match(given: str, expected: object, tolerance: float = 1e-6) -> bool:
    """Whether two quantities are equal up to a relative (below 1: absolute) tolerance; see `to_number`.

    Raises:
        ValueError: the expected answer is not a number.
    """
    right = to_number(str(expected))
    if right is None:
        raise ValueError(f"expected answer {expected!r:.60} is not a number; verify it with exact_match or math_match")
    value = to_number(given)
    return value is not None and abs(value - right) <= tolerance * max(1.0, abs(right))


def choice_match(given: str, expected: object, choices: str = string.ascii_uppercase) -> bool:
    """Whether an answer names the expected choice: `B`, `(B)`, `B. Paris`, `option B`, `The answer is B`.

    Raises:
        ValueError: the expected answer names no choice.
    """
    right = to_choice(str(expected), choices)
    if right is None:
        raise ValueError(f"expected answer {expected!r:.60} names none of the choices {choices}")
    return to_choice(given, choices) == right


def to_choice(text: str, choices: str = string.ascii_uppercase) -> str | None:
    """The letter that an answer names; `None` if it names none or several."""
    letter = f"([{re.escape(choices)}])"
    text = text.strip()
    if match := re.match(rf"\(?{letter}(?:$|[).:,\]]|\s*$)", text):
        return match[1]
    named = {found for found in re.findall(rf"(?:[Aa]nswer(?: is|:)?|[Oo]ption|[Cc]hoice)\s*\(?{letter}\b", text)}
    return named.pop() if len(named) == 1 else None


def math_match(given: str, expected: object) -> bool:
    """Whether two mathematical answers are equal as sympy sees them (LaTeX or plain); extra `math-verify`.

    It may take long on hostile input: judge with it under a stage's `reward_timeout_s` or in an `IsolatedReward`.

    Raises:
        ImportError: `math-verify` is not installed.
        ValueError: the expected answer cannot be read.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError("math_match needs math-verify: pip install 'regimen-rl[math-verify]'") from error
    # math-verify's own time limits use SIGALRM, which belongs to the judge's time limit.
    right, answer = (parse(_as_math(text), parsing_timeout=None) for text in (str(expected), given))
    if not right:
        raise ValueError(f"expected answer {expected!r:.60} cannot be read as mathematics")
    return bool(verify(right, answer, timeout_seconds=None))


def _as_math(text: str) -> str:
    return text if any(mark in text for mark in ("$", "\\boxed", "\\(", "\\[")) else f"${text}$"
