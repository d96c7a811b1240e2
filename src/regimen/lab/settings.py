"""Settings from text: `--set name=value` changes a field of the paper's settings, or else a knob."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from regimen.lab.experiment import Arm, ExperimentError, Paper, Settings, nearest
from regimen.regimen import Regimen, Stage

MAX_SEEDS = 1000
_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def override(
    paper: Paper, scale: str, assignments: Mapping[str, str], arms: Sequence[Arm], seed: int
) -> tuple[Settings, dict[str, float]]:
    """The settings of a scale with some fields replaced, and the values of the knobs that were named.

    Args:
        paper: whose settings.
        scale: which of its scales.
        assignments: texts by name of a settings field or, failing that, of a knob that an arm reads.
        arms: those to be trained; they are built once, to see their knobs, only if a knob is named.
        seed: to build them with.

    Raises:
        ExperimentError: nothing has that name, its value is of another kind, no arm would heed it, or the settings
            name a device that this machine does not have.
    """
    settings = paper.settings(scale)
    hints = get_type_hints(type(settings))
    fields = [field.name for field in dataclasses.fields(settings)]
    changed = {name: parse(text, hints[name], name) for name, text in assignments.items() if name in fields}
    knobs = {name: parse(text, float, name) for name, text in assignments.items() if name not in fields}
    try:
        settings = dataclasses.replace(settings, **changed)
        _check_device(getattr(settings, "device", "cpu"))
        if knobs:
            _check_knobs(knobs, (build(arm, seed, settings, knobs) for arm in arms), fields)
    except ExperimentError:
        raise
    except ValueError as error:
        raise ExperimentError(f"these settings do not fit: {error}") from error
    return settings, knobs


def build(arm: Arm, seed: int, settings: Settings, knobs: Mapping[str, float]) -> Regimen:
    """An arm's regimen with the knobs among `knobs` that it reads set to those values."""
    regimen = arm.build(seed, settings)
    boards = [stage.board(regimen.cast, regimen.knobs) for stage in regimen.stages]
    mine = {name: value for name, value in knobs.items() if any(name in board for board in boards)}
    return dataclasses.replace(regimen, knobs={**regimen.knobs, **mine}) if mine else regimen


def parse(text: str, kind: Any, name: str) -> Any:
    """The value that a text means for a field of some type.

    Raises:
        ExperimentError: it means none; the field, the text and what is expected are named.
    """
    try:
        return _parse(text.strip(), kind)
    except (ValueError, KeyError):
        expected = f"a value of type {kind.__name__ if isinstance(kind, type) else str(kind).replace('typing.', '')}"
        if get_origin(kind) is Literal:
            expected = f"one of {', '.join(map(str, get_args(kind)))}"
        raise ExperimentError(f"--set {name}={text}: expected {expected}") from None


def _parse(text: str, kind: Any) -> Any:
    origin, options = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if type(None) in options and text.lower() == "none":
            return None
        return _first(text, [option for option in options if option is not type(None)])
    if origin is Literal:
        return {str(option): option for option in options}[text]
    if origin in (tuple, list):
        parts = [_parse(part.strip(), options[0]) for part in text.strip("()[]").split(",") if part.strip()]
        return origin(parts)
    if kind is bool:
        return _TRUTH[text.lower()]
    if kind is int:
        return int(text.replace("_", ""))
    if kind is str:
        return text
    if kind is float and not math.isnan(value := float(text)):
        return value
    raise ValueError(text)


def _first(text: str, kinds: Sequence[Any]) -> Any:
    for kind in kinds:
        try:
            return _parse(text, kind)
        except (ValueError, KeyError):
            continue
    raise ValueError(text)


def _check_device(name: str) -> None:
    """Whether settings that name a device can be trained here; better said once than by every job."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ExperimentError(f"device '{name}' is none that torch knows: {error}") from error
    if device.type == "cuda" and torch.cuda.device_count() <= (device.index or 0):
        raise ExperimentError(
            f"these settings train on device '{name}', and this machine has {torch.cuda.device_count()} CUDA devices "
            "that torch can use; run them on another machine, or choose another with --set device=..."
        )


def _check_knobs(knobs: Mapping[str, float], regimens: Iterable[Regimen], fields: Sequence[str]) -> None:
    """Every knob is read somewhere, and somewhere its value is not overruled."""
    overruled: dict[str, set[str]] = {}
    for regimen in regimens:
        for stage in regimen.stages:
            for name in stage.board(regimen.cast, regimen.knobs):
                overruled.setdefault(name, set()).add(_overruled(name, stage))
    for name in knobs:
        if name not in overruled:
            there = [*fields, *sorted(overruled)]
            near = nearest(name, there).split(" There are")[0].rstrip(".")
            raise ExperimentError(
                f"--set {name}=...: no setting or knob has that name{near} The settings are {', '.join(fields)}; "
                f"the knobs are {', '.join(sorted(overruled))}"
            )
        if "" not in overruled[name]:
            reasons = " or ".join(sorted(overruled[name]))
            raise ExperimentError(f"--set {name}=...: no arm would heed it, for in every stage it is {reasons}")


def _overruled(name: str, stage: Stage) -> str:
    """Why a regimen's value of a knob does not matter in a stage that has it; empty if it does."""
    if name in stage.knobs:
        return "set by the stage itself"
    movers = [type(controller).__name__ for controller in stage.controllers if name in controller.moves]
    return f"moved by a {movers[0]}" if movers else ""


def parse_seeds(text: str) -> list[int]:
    """Seeds from a text such as "0-4" or "7,8,100-102"; `ExperimentError` if it is none."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or int(last or first) < int(first):
            raise ExperimentError(
                f"--seeds {text}: '{part.strip()}' is no seed or range; expected a text like 0-4 or 7,8,9"
            )
        if int(last or first) - int(first) >= MAX_SEEDS:
            raise ExperimentError(f"--seeds {text}: '{part.strip()}' is over {MAX_SEEDS} seeds; expected fewer")
        seeds.extend(range(int(first), int(last or first) + 1))
    return sorted(set(seeds))


def format_seeds(seeds: Sequence[int]) -> str:
    """The shortest text for some seeds that `parse_seeds` reads."""
    runs: list[list[int]] = []
    for seed in sorted(set(seeds)):
        if runs and runs[-1][-1] == seed - 1:
            runs[-1].append(seed)
        else:
            runs.append([seed])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
