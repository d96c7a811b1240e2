"""What a check finds, and how it compares what it found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from regimen.knobs import Knobs
from regimen.rollout import Rollout
from regimen.storage import pack_tree, unpack_tree

Result = TypeVar("Result")


@dataclass(frozen=True)
class CheckResult:
    """What a check found.

    Attributes:
        part: which part was checked.
        ok: whether nothing was found wrong.
        messages: one per failure: what was returned, what was expected, what to do.
    """

    part: str
    ok: bool
    messages: list[str]

    def __str__(self) -> str:
        return "\n".join([f"{self.part}: {'ok' if self.ok else 'not ok'}", *(f"  - {text}" for text in self.messages)])


class Abandoned(Exception):
    """The check of a part cannot go on; why is among its messages."""


@dataclass
class Findings:
    """Collects the failures of one part.

    Attributes:
        part: which part.
        hint: added to every exception that the part raised.
        messages: so far.
    """

    part: str
    hint: str = ""
    messages: list[str] = field(default_factory=list)

    def need(self, good: bool, message: str) -> bool:
        """Note a failure unless `good`; returns `good`."""
        if not good:
            self.messages.append(message)
        return good

    def attempt(self, what: str, call: Callable[[], Result]) -> Result:
        """A call's result; an exception is noted, and the part's check ends there."""
        try:
            return call()
        except Exception as error:
            # The text of a KeyError is its key's repr.
            text = error.args[0] if isinstance(error, KeyError) and error.args else error
            self.messages.append(f"{what} raised {type(error).__name__}: {text}{self.hint}")
            raise Abandoned from error

    def insist(self, good: bool, message: str) -> None:
        """Note a failure that ends the part's check unless `good`."""
        if not self.need(good, message):
            raise Abandoned

    def result(self) -> CheckResult:
        """The result so far, each message once."""
        return CheckResult(self.part, not self.messages, list(dict.fromkeys(self.messages)))


class DeclaredKnobs(Knobs):
    """A board that holds what a part declares, and says so when it reads another knob."""

    def unknown(self, name: str) -> str:
        """The sentence that says that the knob was not declared."""
        return (
            f"knob '{name}' is read but not declared (declared: {', '.join(sorted(self)) or 'none'}); "
            f"add Knob('{name}', ...) to the part's knobs (a reward's `reads`), so that it can be set and moved"
        )


def declared_knobs(parts: Mapping[str, Any], values: Mapping[str, float] | None) -> DeclaredKnobs:
    """The board of some parts, by owner, with the values given for those knobs that they declare."""
    declared = [(owner, knob) for owner, part in parts.items() for knob in getattr(part, "knobs", ())]
    names = {knob.name for _, knob in declared}
    return DeclaredKnobs(declared, {name: value for name, value in (values or {}).items() if name in names})


def copied(rollout: Rollout) -> Rollout:
    """A rollout that shares no memory with the original."""
    return Rollout(rollout.data.clone(), rollout.task_names)


def differing(a: Rollout, b: Rollout, ignore: tuple[str, ...] = ()) -> list[str]:
    """Names of the entries in which two rollouts differ (NaN equals NaN)."""
    left, right = dict(_leaves(a.data)), dict(_leaves(b.data))
    names = [*left, *(name for name in right if name not in left)]
    kept = [name for name in names if name.split("/")[0] not in ignore]
    return [name for name in kept if name not in left or name not in right or not _same(left[name], right[name])]


def close(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding; NaN equals NaN."""
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-5, equal_nan=True)


def weights(cast: Mapping[str, Any]) -> dict[str, Tensor]:
    """Copies of all tensors of all modules of a cast."""
    modules = {name: member for name, member in cast.items() if isinstance(member, nn.Module)}
    return {f"{name}.{key}": value.clone() for name, m in modules.items() for key, value in _tensors(m)}


def moved(before: Mapping[str, Tensor], cast: Mapping[str, Any]) -> list[str]:
    """Names of the tensors that changed since `weights`."""
    after = weights(cast)
    return [name for name, value in before.items() if not _same(value, after.get(name))]


def storable(state: Any) -> str:
    """Why a state cannot be stored and read again; empty if it can."""
    try:
        unpack_tree(pack_tree(state))
    except Exception as error:
        return str(error)
    return ""


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _leaves(table: TensorDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, TensorDict):
            yield from _leaves(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.shape == b.shape and a.dtype == b.dtype
        return same and bool(((a == b) | ((a != a) & (b != b))).all())
    return type(a) is type(b) and not isinstance(a, Tensor) and a.tolist() == b.tolist()
