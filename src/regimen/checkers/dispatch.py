"""Which checks a part is given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from regimen.checkers.controllers import check_controller
from regimen.checkers.credit import check_credit
from regimen.checkers.findings import Abandoned, CheckResult, Findings
from regimen.checkers.objectives import check_objective
from regimen.checkers.policies import check_policy
from regimen.checkers.regimens import check_regimen
from regimen.checkers.rewards import check_reward
from regimen.checkers.setting import Setting
from regimen.checkers.tasks import check_task
from regimen.objectives.base import Objective
from regimen.regimen import Regimen
from regimen.rewards.base import Expression
from regimen.rollout import Rollout


@dataclass(frozen=True)
class Interface:
    """A kind of part: how it is recognised, what it must have, and who checks it.

    Attributes:
        name: of the kind.
        check: the checks.
        base: a class that its parts inherit from, if any.
        signs: for kinds without a base class, attributes by which a part of this kind is told.
        needs: further attributes that such a part must have.
        remedy: for what only looks like a part of this kind, what to do.
    """

    name: str
    check: Callable[[Any, Setting, Findings], None]
    base: type | None = None
    signs: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    remedy: str = ""

    def fits(self, part: Any) -> bool:
        """Whether a part (or a class of parts) is meant to be of this kind."""
        if self.base is None:
            return all(hasattr(part, sign) for sign in self.signs)
        return issubclass(part, self.base) if inspect.isclass(part) else isinstance(part, self.base)


_STATE = ("state_dict", "load_state_dict")
_TASK = ("name", "group_size", "generates", "knobs", "evaluate", *_STATE)
INTERFACES = (
    Interface("Regimen", check_regimen, base=Regimen),
    Interface("Reward", check_reward, base=Expression),
    Interface("Objective", check_objective, base=Objective),
    Interface("Task", check_task, signs=("collect",), needs=_TASK),
    Interface("Policy", check_policy, signs=("distribution",), needs=("knobs", "sample")),
    Interface("Controller", check_controller, signs=("moves",), needs=("moment", "__call__", *_STATE)),
    Interface("Reward", check_reward, signs=("score",), remedy="subclass regimen.rewards.Reward"),
    Interface("Objective", check_objective, signs=("loss",), remedy="subclass regimen.objectives.Objective"),
    Interface("Credit", check_credit, signs=("knobs", "__call__")),
)


def interface_of(part: Any) -> Interface | None:
    """The kind that a part, or a class of parts, is meant to be; `None` if it is none."""
    return next((interface for interface in INTERFACES if interface.fits(part)), None)


def check(
    part: Any,
    rollout: Rollout | None = None,
    *,
    cast: Mapping[str, Any] | None = None,
    knobs: Mapping[str, float] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> CheckResult:
    """Try a policy, task, reward, credit, objective, controller or regimen, and explain each failure.

    Nothing is trained: weights, positions in data and remembered state are as they were.

    Args:
        part: what to check.
        rollout: one that your task collects, for parts that read columns or contexts of its own; a small stand-in
            (`stand_in_rollout`) otherwise.
        cast: the members that the part asks; two stand-in policies, `policy` and `reference`, otherwise.
        knobs: values that replace the declared defaults.
        metrics: for controllers that read some.
    """
    setting = Setting.of(rollout, cast, knobs, metrics)
    findings = Findings(_label(part), setting.hint)
    interface = interface_of(part)
    try:
        if interface is None:
            findings.insist(
                False,
                f"a {type(part).__name__} is no part that can be checked; expected a policy (distribution), a task "
                "(collect), a reward (a subclass of Reward), a credit (knobs and a call), an objective (a subclass of "
                "Objective), a controller (moves) or a Regimen",
            )
        else:
            _check_complete(part, interface, findings)
            interface.check(part, setting, findings)
    except Abandoned:
        pass
    except Exception as error:  # Its knobs, its name, its state: a part may raise wherever it is touched.
        findings.messages.append(f"while it was checked, {type(error).__name__} was raised: {error}{setting.hint}")
    return findings.result()


def assert_ok(part: Any, rollout: Rollout | None = None, **options: Any) -> None:
    """`check`, for test-suites: `AssertionError` with everything that was found."""
    result = check(part, rollout, **options)
    assert result.ok, str(result)


def _check_complete(part: Any, interface: Interface, findings: Findings) -> None:
    told = f"it looks like a {interface.name} (it has {' and '.join(interface.signs)})"
    findings.insist(not interface.remedy, f"{told} and is none; {interface.remedy}")
    missing = [name for name in interface.needs if not hasattr(part, name)]
    findings.insist(
        not missing, f"{told} but lacks {', '.join(missing)}; see the docstring of that protocol for what each is"
    )


def _label(part: Any) -> str:
    kind = type(part).__name__
    name = getattr(part, "term_name" if isinstance(part, Expression | Objective) else "name", None)
    return f"{kind} '{name}'" if isinstance(name, str) else kind
