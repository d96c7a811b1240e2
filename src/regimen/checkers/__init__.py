"""Checkers: try a part of your own, and explain each failure.

`check(part)` knows policies, tasks, rewards, credits, objectives, controllers and whole regimens; `check_file`
checks every part that a file defines; `assert_ok` is for test-suites.
"""

from regimen.checkers.dispatch import assert_ok, check
from regimen.checkers.files import FileError, check_file
from regimen.checkers.findings import CheckResult
from regimen.checkers.stand_ins import StandInPolicy, stand_in_rollout

__all__ = ["CheckResult", "FileError", "StandInPolicy", "assert_ok", "check", "check_file", "stand_in_rollout"]
