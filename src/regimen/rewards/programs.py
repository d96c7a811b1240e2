"""Rewards on programs that a policy wrote: each is run, confined, against tests that came with its task."""

from __future__ import annotations

import json
import os
import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from regimen.functions.answers import code_block, tag_text
from regimen.rewards.base import Reward, Scene, Score
from regimen.rewards.sandbox import PROTECT_ALL, Limits, Outcome, Protected, run_python
from regimen.rewards.text import Failure, field_of, score_each
from regimen.rollout import Rollout

# The script lies in no file beside the program, and the word that tells of its end is drawn for each run: a program
# that ends the interpreter with exit code 0 has passed nothing.
_SCRIPT_RUNNER = """
import sys

def run(word, script, out):
    import solution
    exec(compile(script, "script.py", "exec"), vars(solution))
    out.write(word)

run(sys.stdin.readline().strip(), sys.stdin.read(), sys.stdout)
"""


def same_lines(given: str, expected: str) -> bool:
    """Whether two outputs agree line by line, up to blanks at the end of a line and empty lines at the end."""
    one, other = ([line.rstrip() for line in text.rstrip().splitlines()] for text in (given, expected))
    return one == other


@dataclass(frozen=True)
class Exchange:
    """A test of a whole program: what it reads from standard input, and what it must write to standard output.

    The program never has the expected output within its reach. It must end with exit code 0.
    """

    stdin: str
    stdout: str
    same: Callable[[str, str], bool] = same_lines

    def attempt(self, program: str, run: Callable[..., Outcome]) -> tuple[bool, Outcome]:
        """Whether a program passes, and how it ended; `run` is `run_python` with limits."""
        outcome = run(program, stdin=self.stdin)
        return outcome.ok and self.same(outcome.stdout, self.stdout), outcome


@dataclass(frozen=True)
class Script:
    """A test of what a program defines (`assert solve(2) == 4`): it passes if it runs to its end.

    It runs after the program, in the same interpreter and under the same names, so that a program which sets out to
    cheat can do so: prefer an `Exchange` where there is a choice. `__name__` is not `__main__`.
    """

    source: str

    def attempt(self, program: str, run: Callable[..., Outcome]) -> tuple[bool, Outcome]:
        """Whether a program passes, and how it ended; `run` is `run_python` with limits."""
        word = secrets.token_hex(16)
        outcome = run(_SCRIPT_RUNNER, files={"solution.py": program}, stdin=f"{word}\n{self.source}")
        return outcome.ok and word in outcome.stdout, outcome


Test = Exchange | Script


def read_tests(entry: Any, same: Callable[[str, str], bool] = same_lines) -> list[Test]:
    """The tests in a column's entry: a list, or the JSON of one, as `text_table` stores it.

    Its items are pairs `[stdin, stdout]`, mappings with these two keys, or texts, which are scripts.

    Args:
        entry: of a column.
        same: whether an output `(given, expected)` is the expected one.

    Raises:
        ValueError: it is none of this, or there are no tests.
    """
    try:
        items = json.loads(entry) if isinstance(entry, str) else entry
    except json.JSONDecodeError as error:
        raise ValueError(f"tests {entry!r:.60} are not the JSON of a list ({error}); give a list, or read=") from error
    if not isinstance(items, list | tuple) or not items:
        raise ValueError(f"tests are {items!r:.60}, expected a list with at least one test")
    return [_test(item, same) for item in items]


def _test(item: Any, same: Callable[[str, str], bool]) -> Test:
    match item:
        case str():
            return Script(item)
        case [str(given), str(wanted)] | {"stdin": str(given), "stdout": str(wanted)}:
            return Exchange(given, wanted, same)
    raise ValueError(
        f"test {item!r:.60} is neither a pair of texts [stdin, stdout], nor a mapping with these keys, nor a script"
    )


class ProgramReward(Reward):
    """Share of its tests that a generated Python program passes, `[B]` in [0, 1], component `passed`.

    A text without a program passes nothing, and neither does a program that raises, crashes or prints something
    else. A program that breaks a limit (it hangs, or takes too much memory) says nothing about its tests, which it
    might pass under another limit: its sample has *failed* and leaves its group. A policy can learn to get out of a
    bad grade this way; with `on_breach="wrong"` it has not passed that test. Tests that cannot be read, and what is
    the sandbox's own fault (a machine that cannot protect its files, say), are failures in any case.

    Programs are confined as `run_limited` says, each test in a fresh process, several samples at a time; the order
    in which they end changes nothing.
    """

    def __init__(
        self,
        tag: str | Callable[[str], str | None] = code_block,
        tests: str = "tests",
        *,
        limits: Limits | None = None,
        on_breach: Literal["failed", "wrong"] = "failed",
        read: Callable[[Any], Sequence[Test]] = read_tests,
        readable: Sequence[str | Path] = (),
        require: Sequence[Protected] = PROTECT_ALL,
        at_once: int | None = None,
        name: str = "passed",
    ) -> None:
        """Make the reward.

        Args:
            tag: the tag whose first occurrence in the column `text` holds the program; or a function that finds it,
                by default in the last fenced block.
            tests: column or context entry with the tests of each sample.
            limits: what a program may take in one test.
            on_breach: what a broken limit makes of its sample or test.
            read: turns an entry of the column into tests.
            readable: more paths that programs may read.
            require: what must be protected for a program to be run; see `run_limited`.
            at_once: samples whose programs run at one time; as many as there are processors by default.
            name: of the component.

        Raises:
            ValueError: an `on_breach` that is neither, or `at_once` below 1.
        """
        if on_breach not in ("failed", "wrong"):
            raise ValueError(f"ProgramReward: on_breach is '{on_breach}', expected 'failed' or 'wrong'")
        if at_once is not None and at_once < 1:
            raise ValueError(f"ProgramReward: at_once is {at_once}, expected at least 1")
        self.tag, self.tests, self.limits, self.on_breach = tag, tests, limits or Limits(), on_breach
        self.read, self.require, self.name = read, tuple(require), name
        # Not described in a run's settings: they belong to the machine, on which a resumed run may have another.
        self._readable, self._at_once = tuple(readable), at_once or os.cpu_count() or 1

    def score(self, rollout: Rollout, scene: Scene) -> Score:
        """The share for each sample."""
        texts, entries = field_of(rollout, "text"), field_of(rollout, self.tests)
        stop = threading.Event()
        run = partial(run_python, limits=self.limits, readable=self._readable, require=self.require, stop=stop)
        with ThreadPoolExecutor(self._at_once) as pool:
            try:
                values = list(pool.map(partial(self._value, run), texts, entries))
            finally:
                # If a time limit ended the wait, the programs end too.
                stop.set()
        return score_each(values, self.name, rollout.mask.device)

    def _value(self, run: Callable[..., Outcome], text: str, entry: Any) -> float | Failure:
        try:
            tests = self.read(entry)
        except ValueError as error:
            return Failure(str(error))
        program = self.program_in(text)
        if program is None:
            return 0.0
        passed = 0
        for number, test in enumerate(tests):
            right, outcome = test.attempt(program, run)
            if outcome.trouble or (outcome.breach and self.on_breach == "failed"):
                return Failure(f"in test {number} the program {outcome.why}")
            passed += right
        return passed / len(tests)

    def program_in(self, text: str) -> str | None:
        """The program that a text gives, if it gives one."""
        return tag_text(text, self.tag) if isinstance(self.tag, str) else self.tag(text)
