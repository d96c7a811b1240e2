"""Generated programs against their tests: the share that they pass, and what does not count as wrong."""

from __future__ import annotations

import json
import random
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from regimen.checkers import check
from regimen.knobs import Knobs
from regimen.rewards import FAILED, SCORED, Expression, JudgeReport, Limits, Outcome, ProgramReward, Scene, judge
from regimen.rewards.programs import Exchange, Script, read_tests, same_lines
from regimen.rewards.sandbox import run_python
from regimen.rollout import Rollout
from regimen.runs import describe
from regimen.tasks.text import text_table

Build = Callable[..., Rollout]

# Where user namespaces are not allowed the tests run with what is left.
REQUIRE: tuple[Any, ...] = ("files", "network", "processes") if run_python("").ok else ()
pytestmark = pytest.mark.skipif(not run_python("", require=()).ok, reason="programs cannot be confined here")

DOUBLES = [["1\n", "2\n"], ["4\n", "8\n"], ["-3\n", "-6\n"]]
RIGHT = "print(2 * int(input()))"
Reward = partial(ProgramReward, require=REQUIRE)


def fenced(program: str) -> str:
    return f"I think:\n```python\n{program}\n```\nThat is it."


@pytest.fixture
def scored(tiny_rollout: Build) -> Callable[..., tuple[list[Any], JudgeReport]]:
    """`scored(reward, texts, tests)`: the values, with "failed" where a sample failed; all are one group."""

    def score(reward: Expression, texts: Sequence[str], tests: Any) -> tuple[list[Any], JudgeReport]:
        tests = tests if isinstance(tests, dict) else {"tests": tests}
        rollout = tiny_rollout(len(texts), columns={"text": list(texts), **tests})
        judged, report = judge(reward, rollout, Scene(knobs=Knobs.of(reward)))
        outcomes = zip(judged.rewards["passed"].tolist(), judged.status["passed"].tolist(), strict=True)
        return [value if status == SCORED else "failed" for value, status in outcomes], report

    return score


def test_the_value_is_the_share_of_passed_tests(scored: Any) -> None:
    programs = [
        RIGHT,
        "print(abs(2 * int(input())))",
        "print(2)",
        "print(",
        "print(1 / 0)",
        f"{RIGHT}\nraise SystemExit(1)",
    ]
    values, report = scored(Reward(), [fenced(program) for program in programs], [json.dumps(DOUBLES)] * 6)
    assert values == pytest.approx([1.0, 2 / 3, 1 / 3, 0.0, 0.0, 0.0])
    assert report.failed == 0


def test_a_text_without_a_program_passes_nothing_and_runs_nothing(scored: Any) -> None:
    values, _ = scored(Reward(require=("files",)), ["no program", ""], [json.dumps(DOUBLES)] * 2)
    assert values == [0.0, 0.0]


def test_a_tag_or_a_function_finds_the_program(scored: Any) -> None:
    texts, tests = [f"<answer>\n{RIGHT}\n</answer>", RIGHT], [json.dumps(DOUBLES[:1])] * 2
    assert scored(Reward("answer"), texts, tests)[0] == [1.0, 0.0]
    assert scored(Reward(str.strip), texts, tests)[0] == [0.0, 1.0]


def test_scripts_use_what_the_program_defines(scored: Any) -> None:
    tests = json.dumps(["assert double(2) == 4", "assert double(-1) == -2", "import math\nassert double(math.pi) < 7"])
    programs = [
        "def double(x): return x + x",
        "def double(x): return x * x",
        "double = 3",
        # A data class looks its module up, and the main block is not the test's business.
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n"
        "def double(x): return 2 * A(x).x\nif __name__ == '__main__': raise SystemExit(double('no'))",
    ]
    values, _ = scored(Reward(), [fenced(program) for program in programs], [tests] * 4)
    assert values == pytest.approx([1.0, 1 / 3, 0.0, 1.0])


@pytest.mark.parametrize(
    "trick",
    [
        "import os; os._exit(0)",
        "raise SystemExit(0)",
        "import atexit, os; atexit.register(os._exit, 0); double = lambda x: 0",
        "import sys; print(sys.stdin.read()); double = lambda x: 0",
        "import os; print(os.listdir('.'), [open(name).read() for name in os.listdir('.')]); raise SystemExit(0)",
    ],
)
def test_a_program_that_ends_before_its_script_has_not_passed(scored: Any, trick: str) -> None:
    assert scored(Reward(), [fenced(trick)], [json.dumps(["assert double(2) == 4"])])[0] == [0.0]


def test_the_expected_output_is_out_of_reach(scored: Any) -> None:
    source = (
        "import gc, os, sys\n"
        "seen = [open(name).read() for name in os.listdir('.') if os.path.isfile(name)] + sys.argv + list(os.environ)\n"
        "print('found' if any('expect' 'ed' in text for text in seen + [sys.stdin.read()]) else 'nothing')"
    )
    assert scored(Reward(), [fenced(source)], [json.dumps([["", "nothing"], ["", "expected"]])])[0] == [0.5]


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("while True: pass", "did not end within 1 s (wall_s)"),
        ("x = bytearray(10 << 30)", "needed more than 128 MB of memory (memory_mb)"),
        ("while True: print('x' * 9999)", "filled its standard output with 1 MB (file_mb)"),
    ],
)
def test_a_broken_limit_fails_its_sample_or_its_test_as_was_chosen(scored: Any, program: str, why: str) -> None:
    limits = Limits(wall_s=1, memory_mb=128, file_mb=1)
    texts = [fenced(f"if input() != '1':\n    {program}\nprint(2)"), fenced(RIGHT)]
    tests = [json.dumps(DOUBLES[:2])] * 2
    values, report = scored(Reward(limits=limits), texts, tests)
    assert values == ["failed", 1.0]
    assert report.errors == (f"reward 'passed', sample 0: in test 1 the program {why}",)
    values, report = scored(Reward(limits=limits, on_breach="wrong"), texts, tests)
    assert values == [0.5, 1.0]
    assert report.errors == ()


def test_what_the_sandbox_cannot_do_is_never_held_against_a_program(
    scored: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    values, report = scored(Reward(on_breach="wrong"), [fenced(RIGHT)], [json.dumps(DOUBLES)])
    assert values == ["failed"]
    assert "in test 0 the program was not run: programs are confined on Linux" in report.errors[0]


@pytest.mark.parametrize(
    ("tests", "why"),
    [
        ("not JSON", "tests 'not JSON' are not the JSON of a list"),
        ("[]", "tests are [], expected a list with at least one test"),
        ('{"stdin": ""}', "tests are {'stdin': ''}, expected a list"),
        ('[["1"]]', "test ['1'] is neither a pair of texts [stdin, stdout]"),
        ('[["1", 2]]', "test ['1', 2] is neither a pair"),
    ],
)
def test_unreadable_tests_fail_their_sample_only(scored: Any, tests: str, why: str) -> None:
    values, report = scored(Reward(on_breach="wrong"), [fenced(RIGHT)] * 2, [json.dumps(DOUBLES), tests])
    assert values == [1.0, "failed"]
    assert f"reward 'passed', sample 1: {why}" in report.errors[0]


def test_tests_are_read_from_every_form() -> None:
    pair = Exchange("1", "2")
    assert read_tests([["1", "2"], ("1", "2"), {"stdin": "1", "stdout": "2"}, "assert True"]) == [
        *[pair] * 3,
        Script("assert True"),
    ]
    row = {"tests": [["1", "2"]]}
    assert read_tests(text_table([row])["tests"].tolist()[0]) == [pair]


def test_a_column_of_lists_and_a_reader_of_ones_own(scored: Any) -> None:
    assert scored(Reward(), [fenced(RIGHT)] * 2, [DOUBLES, DOUBLES[:1]])[0] == [1.0, 1.0]

    def close(given: str, expected: str) -> bool:
        return abs(float(given) - float(expected)) < 0.1

    reward = Reward(tests="wanted", read=lambda entry: [Exchange("1", entry, close)])
    assert scored(reward, [fenced(RIGHT)] * 2, {"wanted": ["2.01", "2.5"]})[0] == [1.0, 0.0]


def test_outputs_are_compared_by_lines() -> None:
    assert same_lines("a \nb\n\n", "a\nb")
    assert same_lines("", "\n")
    assert not same_lines("a\n\nb", "a\nb")
    assert not same_lines(" a", "a")


def test_samples_run_at_the_same_time_but_not_too_many_and_keep_their_order(
    scored: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    meeting, lock, running = threading.Barrier(3), threading.Lock(), [0, 0]

    def run(program: str, **settings: Any) -> Outcome:
        with lock:
            running[:] = running[0] + 1, max(running[1], running[0] + 1)
        meeting.wait(20)
        time.sleep(0.01 * (5 - int(program)))
        with lock:
            running[0] -= 1
        return Outcome(0, stdout=program)

    monkeypatch.setattr("regimen.rewards.programs.run_python", run)
    texts, wanted = [str(i) for i in range(6)], ["0", "1", "x", "3", "x", "x"]
    values, _ = scored(Reward(str.strip, at_once=3), texts, [json.dumps([["", text]]) for text in wanted])
    assert values == [1.0, 1.0, 0.0, 1.0, 0.0, 0.0]
    assert running == [0, 3]


def test_a_time_limit_of_the_stage_ends_the_programs_too(
    tiny_rollout: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    texts = [fenced(f"import time; time.sleep({60 + i})") for i in range(6)]
    rollout = tiny_rollout(columns={"text": texts, "tests": [json.dumps(DOUBLES)] * 6})
    reward, started = Reward(at_once=2, limits=Limits(wall_s=50)), time.monotonic()
    score = reward.judge(rollout, Scene(timeout_s=0.5)).components["passed"]
    assert score.status.tolist() == [FAILED] * 6
    assert score.errors == ("reward 'passed' did not return within 0.5 s",)
    assert time.monotonic() - started < 20
    assert not list(tmp_path.iterdir())


def test_passes_the_checker_and_draws_no_random_numbers(tiny_rollout: Build) -> None:
    texts = [fenced(RIGHT), fenced("print(2)"), "nothing", fenced("print(-6)"), fenced(RIGHT), fenced("1 / 0")]
    rollout = tiny_rollout(columns={"text": texts, "tests": [json.dumps(DOUBLES[:1])] * 6})
    random.seed(0)
    before = random.getstate(), torch.get_rng_state()
    result = check(Reward(), rollout)
    assert result.ok, str(result)
    Reward().score(rollout, Scene())
    assert random.getstate() == before[0]


def test_settings_are_those_that_matter_for_the_values() -> None:
    described = describe(ProgramReward(at_once=3, readable=["/opt"]))
    assert json.loads(json.dumps(described)) == described
    assert described["limits"]["wall_s"] == 10.0
    assert described["read"] == "regimen.rewards.programs.read_tests"
    assert not {"_at_once", "_readable"} & described.keys()


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="on_breach is 'zero', expected 'failed' or 'wrong'"):
        ProgramReward(on_breach="zero")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at_once is 0, expected at least 1"):
        ProgramReward(at_once=0)
