"""Checks of all parts that a file defines."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import itertools
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from regimen.cast import Cast
from regimen.checkers.dispatch import check, interface_of
from regimen.checkers.findings import CheckResult
from regimen.rollout import Rollout

_NUMBER = itertools.count()


class FileError(ValueError):
    """A file has no parts to check, or cannot be imported; the message says why."""


def check_file(path: Path | str) -> list[CheckResult]:
    """Import a file and check every part defined in it: instances at its top level, and classes that need no arguments.

    A `Rollout` or a `Cast` at the file's top level is what the parts are tried on. Names that begin with `_` and
    names that the file imports are left out.

    Raises:
        FileError: there is no such file, it cannot be imported, or it defines no part.
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise FileError(f"{path} is not a file; expected a Python file with parts to check")
    try:
        module = _imported(path)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # A file may also exit.
        raise FileError(_import_failure(path, error)) from error
    names = _own_names(module, path)
    rollout = next((value for value in names.values() if isinstance(value, Rollout)), None)
    cast = next((value for value in names.values() if isinstance(value, Cast)), None)
    results = []
    for name, make in _parts(module, names):
        try:
            found = check(make(), rollout, cast=cast)
        except Exception as error:
            found = CheckResult("class", False, [f"{name}() raised {type(error).__name__}: {error}"])
        results.append(CheckResult(f"{name} ({found.part})", found.ok, found.messages))
    if not results:
        raise FileError(
            f"{path} defines no part that can be checked; put instances of your rewards, tasks, ... at its top level"
        )
    return results


def _imported(path: Path) -> ModuleType:
    """The file as a module of its own, which can import its neighbours."""
    name = f"regimen_checked_{next(_NUMBER)}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("its name does not end with .py")
    module = importlib.util.module_from_spec(spec)
    with _neighbours(path.parent):
        # Dataclasses look for their module there.
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return module


@contextmanager
def _neighbours(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _import_failure(path: Path, error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) else frames[-1].lineno if frames else None
    where = f" at line {line}" if line else ""
    text = error.msg if isinstance(error, SyntaxError) else error
    return f"{path} cannot be imported: {type(error).__name__}{where}: {text}; a file of parts must run by itself"


def _own_names(module: ModuleType, path: Path) -> dict[str, Any]:
    """What the file itself defines at its top level."""
    imported = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    return {name: v for name, v in vars(module).items() if not name.startswith("_") and name not in imported}


def _parts(module: ModuleType, names: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Instances, each once; then classes of which there is no instance, and which can be made without arguments."""
    instances: dict[int, tuple[str, Any]] = {}
    for name, value in names.items():
        if not inspect.isclass(value) and not inspect.isroutine(value):
            instances.setdefault(id(value), (name, value))
    for name, value in instances.values():
        if _is_part(value, module):
            yield name, partial(_itself, value)
    for name, value in names.items():
        if not inspect.isclass(value) or value.__module__ != module.__name__ or inspect.isabstract(value):
            continue
        made = any(isinstance(instance, value) for _, instance in instances.values())
        if _is_part(value, module) and not made and _needs_nothing(value):
            yield name, value


def _is_part(value: Any, module: ModuleType) -> bool:
    """What only looks like a part counts if the file itself wrote it: many things have a `score`."""
    kind, interface = value if inspect.isclass(value) else type(value), interface_of(value)
    return interface is not None and (not interface.remedy or kind.__module__ == module.__name__)


def _itself(value: Any) -> Any:
    return value


def _needs_nothing(kind: type) -> bool:
    try:
        inspect.signature(kind).bind()
    except (TypeError, ValueError):
        return False
    return True
