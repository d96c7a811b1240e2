"""The checker of files: which names count as parts, on what they are tried, and what cannot be checked."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from regimen.checkers import FileError, check_file

Write = Callable[[str], Path]

PARTS = """
from dataclasses import dataclass
import torch
from regimen.checkers import StandInPolicy, stand_in_rollout
from regimen.rewards import Reward, reward_from
from regimen.objectives import ClippedSurrogateObjective
from neighbour import borrowed

@reward_from
def ink(rollout):
    return rollout["mine"]

same = ink
own = stand_in_rollout().with_columns(mine=torch.ones(6))
_private = reward_from(lambda rollout: None)

class Plain(Reward):
    name = "plain"
    def score(self, rollout, scene):
        return rollout["mine"]

class NeedsMore(Plain):
    def __init__(self, size):
        self.size = size

class Made(Plain):
    name = "made"

@dataclass
class Explodes(Plain):
    size: int = 0
    def __post_init__(self):
        raise OSError("no such model")

class Odd(Made):
    name = "two words"

class Scorer:
    def score(self):
        return 1

made, number, surrogate, borrower = Made(), 3, ClippedSurrogateObjective(), Scorer()
"""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_file(text: str, name: str = "parts.py") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return to_file


def test_instances_and_classes_of_the_file_are_checked_each_once(write: Write) -> None:
    write("from regimen.rewards import reward_from\nborrowed = reward_from(lambda r: None)\n", name="neighbour.py")  # type: ignore[call-arg]
    results = check_file(write(PARTS))
    found = {result.part.split(" ")[0]: result for result in results}
    # Not Plain, of which `made` is one, nor NeedsMore, which only its author can make.
    assert set(found) == {"ink", "made", "surrogate", "borrower", "Explodes", "Odd"}
    assert len(results) == len(found)
    assert {name for name, result in found.items() if result.ok} == {"ink", "made", "surrogate"}
    assert found["ink"].part == "ink (FunctionReward 'ink')"
    assert "two words" in found["Odd"].part
    assert found["Explodes"].messages == ["Explodes() raised OSError: no such model"]
    assert "subclass regimen.rewards.Reward" in str(found["borrower"])


def test_a_cast_at_the_top_level_is_what_parts_ask(write: Write) -> None:
    text = """
from regimen import Cast
from regimen.checkers import StandInPolicy
from regimen.objectives import Objective

class Likelihood(Objective):
    name = "likelihood"
    def loss(self, batch):
        return -(batch.distribution("mine").logprob * batch.weights("token")).sum()
"""
    assert "the cast has no member 'mine'" in str(check_file(write(text))[0])
    assert check_file(write(text + "members = Cast(mine=StandInPolicy(2))\n"))[0].ok


def test_the_import_leaves_no_trace(write: Write) -> None:
    path, modules = list(sys.path), set(sys.modules)
    with pytest.raises(FileError):
        check_file(write("import json\nraise ValueError('no')\n"))
    assert sys.path == path
    assert not [name for name in set(sys.modules) - modules if "regimen_checked" in name]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = (\n", r"parts.py cannot be imported: SyntaxError at line 1: '\(' was never closed; a file of parts must"),
        ("\n\nimport no_such_module\n", "ModuleNotFoundError at line 3: No module named 'no_such_module'"),
        ("def f():\n    return 1 / 0\nf()\n", "ZeroDivisionError at line 2"),
        ("import sys\nsys.exit(4)\n", "SystemExit at line 2: 4"),
        ("x = 1\n\0", "cannot be imported: .*null bytes"),
        ("x = 1\n", "parts.py defines no part that can be checked; put instances"),
        ("from regimen.credit import GroupRelativeAdvantage\n", "defines no part"),
    ],
)
def test_a_file_that_cannot_be_checked_says_why(write: Write, text: str, message: str) -> None:
    with pytest.raises(FileError, match=message):
        check_file(write(text))


def test_what_is_no_python_file_is_refused(tmp_path: Path, write: Write) -> None:
    for path in (tmp_path, tmp_path / "nowhere.py"):
        with pytest.raises(FileError, match="is not a file; expected a Python file with parts to check"):
            check_file(path)
    with pytest.raises(FileError, match=r"notes.txt cannot be imported: ImportError: its name does not end with .py"):
        check_file(write("", name="notes.txt"))  # type: ignore[call-arg]
