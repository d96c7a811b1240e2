"""The cast: the named modules that a regimen trains or uses, and the rules that refresh its frozen copies."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import nn

from regimen.knobs import Knob

CopyKind = Literal["snapshot", "fork", "reference"]


class Cast(Mapping[str, Any]):
    """Named members: `policy`, and where a paper needs them `reference`, `critic`, `reward_model`, ...

    A member is usually an `nn.Module`; anything with `state_dict` and `load_state_dict` is checkpointed too.
    Members may share modules (a connector that is also part of the policy).
    """

    def __init__(self, **members: Any) -> None:
        self._members = dict(members)
        self._copies: dict[str, tuple[CopyKind, str]] = {}
        self._starts: dict[str, str] = {}
        # The parameters themselves, not their ids only: the id of one that is gone is given to another.
        self._trainable = {id(p): p for m in self._modules() for p in m.parameters() if p.requires_grad}

    def __getitem__(self, name: str) -> Any:
        if name not in self._members:
            raise KeyError(f"the cast has no member '{name}'; it has: {', '.join(self._members) or 'none'}")
        return self._members[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, name: object) -> bool:
        return name in self._members

    @property
    def device(self) -> torch.device:
        """Where the first member with weights is."""
        for module in self._modules():
            for parameter in module.parameters():
                return parameter.device
        return torch.device("cpu")

    @property
    def knobs(self) -> Iterator[tuple[str, Knob]]:
        """(member, knob) for every knob that a member reads."""
        for name, member in self._members.items():
            if name not in self._copies:
                for knob in getattr(member, "knobs", ()):
                    yield f"{type(member).__name__} '{name}'", knob

    def trainable(self, names: Iterable[str]) -> list[nn.Parameter]:
        """The parameters of some members that may be trained, each once.

        Raises:
            ValueError: a member has none (it is frozen, or a copy).
        """
        found: dict[int, nn.Parameter] = {}
        for name in names:
            member = self[name]
            mine = [p for p in member.parameters() if id(p) in self._trainable] if isinstance(member, nn.Module) else []
            if not mine:
                raise ValueError(f"member '{name}' has no trainable parameters: it is frozen, a copy, or not a module")
            found.update((id(p), p) for p in mine)
        return list(found.values())

    def train_only(self, names: Iterable[str]) -> None:
        """Let gradients flow into some members and no others."""
        names = list(names)
        wanted = {id(p) for p in self.trainable(names)}
        for module in self._modules():
            for parameter in module.parameters():
                parameter.requires_grad_(id(parameter) in wanted)

    def snapshot(self, name: str, as_: str) -> None:
        """Keep a frozen copy of a member under another name (replacing the one that was there)."""
        frozen = copy.deepcopy(self[name])
        if isinstance(frozen, nn.Module):
            frozen.requires_grad_(False).eval().zero_grad(set_to_none=True)
        self._put(as_, frozen, "snapshot", name)

    def adopt(self, name: str, member: Any, of: str) -> None:
        """Add a frozen member that derives from another, as that one's `reference()` gives it."""
        self._put(name, member, "reference", of)

    def fork(self, name: str, as_: str) -> None:
        """Add a trainable copy of a member under another name."""
        child = copy.deepcopy(self[name])
        self._put(as_, child, "fork", name)
        if isinstance(child, nn.Module):
            twins = zip(self[name].parameters(), child.parameters(), strict=True)
            self._trainable |= {id(new): new for old, new in twins if id(old) in self._trainable}

    def restore(self, name: str, source: str) -> None:
        """Copy the weights of one member into another of the same shape."""
        self[name].load_state_dict(self[source].state_dict())

    def start(self, name: str, of: str) -> None:
        """Give a member the weights of another, now and whenever a state is loaded that has none for it.

        For one that is trained while the other stays, from where another regimen has left that one. The two are of one
        architecture, or the member takes the other's state all the same (a `MultiHeadPolicy` that of a `TokenPolicy`).
        """
        self._starts[name] = of
        self.restore(name, of)

    def state_dict(self) -> dict[str, Any]:
        """Every member's state and version, and where copies came from."""
        return {
            "members": {n: m.state_dict() for n, m in self._members.items() if hasattr(m, "state_dict")},
            "versions": {n: m.version for n, m in self._members.items() if hasattr(m, "version")},
            "copies": {name: list(origin) for name, origin in self._copies.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore members in place; copies that do not exist yet are made first.

        Raises:
            ValueError: a member has another architecture than the one saved; the tensor and both shapes are named.
        """
        for name, (kind, source) in state["copies"].items():
            if name not in self._members:
                self._copy_again(name, kind, source)
        for name, saved in state["members"].items():
            member = self[name]
            if isinstance(member, nn.Module):
                _check_architecture(name, member, saved)
            member.load_state_dict(saved)
        for name, version in state["versions"].items():
            self[name].version = version
        for name, source in self._starts.items():
            if name not in state["members"]:
                self.restore(name, source)

    def _put(self, name: str, member: Any, kind: CopyKind, source: str) -> None:
        self._members[name], self._copies[name] = member, (kind, source)
        present = {id(p) for module in self._modules() for p in module.parameters()}
        self._trainable = {key: p for key, p in self._trainable.items() if key in present}

    def _copy_again(self, name: str, kind: CopyKind, source: str) -> None:
        if kind == "fork":
            self.fork(source, name)
        elif kind == "reference":
            self.adopt(name, self[source].reference(), of=source)
        else:
            self.snapshot(source, name)

    def _modules(self) -> list[nn.Module]:
        return [member for member in self._members.values() if isinstance(member, nn.Module)]


def _check_architecture(name: str, member: nn.Module, saved: Mapping[str, Any]) -> None:
    mine = member.state_dict()
    for key in mine.keys() | saved.keys():
        ours = list(mine[key].shape) if key in mine else "absent"
        theirs = list(saved[key].shape) if key in saved else "absent"
        if ours != theirs:
            raise ValueError(
                f"the checkpoint is of another architecture: '{key}' of member '{name}' is {theirs} in the file and "
                f"{ours} here; build the cast with the settings of the run that saved it"
            )


@runtime_checkable
class CastRule(Protocol):
    """Refreshes members of the cast as a stage goes on; it moves no knob."""

    def start(self, cast: Cast) -> None:
        """Act before the stage's first iteration."""
        ...

    def after_step(self, cast: Cast, step: int) -> None:
        """Act after iteration `step` (1, 2, ...), or after that gradient step, as a rule of an update."""
        ...


RefreshMode = Literal["fixed", "copy", "ema"]


@dataclass(frozen=True)
class ReferenceRefresh:
    """Keeps a frozen copy of a member.

    Attributes:
        member: name of the copy; `of`: name of the member copied.
        mode: `"fixed"` keeps the copy of the regimen's first stage (or the base weights under adapters),
            `"copy"` takes a fresh one at the stage's start and then every `every` iterations if given, `"ema"`
            lets it follow as an exponential average with `decay`.
        decay: of the average, in [0, 1).
        every: iterations between refreshes.
    """

    member: str = "reference"
    of: str = "policy"
    mode: RefreshMode = "copy"
    decay: float = 0.99
    every: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(RefreshMode):
            raise ValueError(f"ReferenceRefresh: mode '{self.mode}' is not one of {', '.join(get_args(RefreshMode))}")
        if not 0 <= self.decay < 1 or (self.every is not None and self.every < 1):
            raise ValueError(f"ReferenceRefresh: decay={self.decay}, every={self.every}; expected [0, 1) and >= 1")

    def start(self, cast: Cast) -> None:
        """Make the copy."""
        if self.mode == "fixed" and self.member in cast:
            return
        if self.mode == "fixed" and hasattr(cast[self.of], "reference"):
            cast.adopt(self.member, cast[self.of].reference(), of=self.of)
        else:
            cast.snapshot(self.of, self.member)

    def after_step(self, cast: Cast, step: int) -> None:
        """Refresh it if it is time."""
        if self.mode == "fixed" or step % (self.every or 1) or (self.mode == "copy" and self.every is None):
            return
        if self.mode == "copy":
            cast.restore(self.member, self.of)
            return
        self._follow(cast[self.member], cast[self.of])

    @torch.no_grad()
    def _follow(self, copied: nn.Module, source: nn.Module) -> None:
        # Not by `state_dict`, which lists tied weights twice.
        pairs = list(zip(copied.parameters(), source.parameters(), strict=True))
        pairs += list(zip(copied.buffers(), source.buffers(), strict=True))  # type: ignore[arg-type]
        floats = [(old, new) for old, new in pairs if old.is_floating_point()]
        if floats:
            torch._foreach_lerp_([old for old, _ in floats], [new for _, new in floats], 1 - self.decay)
        for old, new in pairs:
            if not old.is_floating_point():
                old.copy_(new)
