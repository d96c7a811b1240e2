"""Trained common starts, kept between experiments: what was trained once with a configuration is not trained again.

The cache is a folder of the user's, `$REGIMEN_CACHE` or `~/.cache/regimen`, which may be deleted at any time. An entry
is the run folder of one arm and seed, without its checkpoints, under a hash of all that its numbers depend on.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import inspect
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import regimen
from regimen.storage import StorageError, write_text

MANIFEST = "manifest.json"
LIBRARIES = ("numpy", "tensordict", "tokenizers", "torch", "transformers")
_LEFT_OUT = ("checkpoints", "output.txt")
_ABANDONED_AFTER_S = 24 * 3600.0


def cache_folder() -> Path:
    """Where starts are kept: `$REGIMEN_CACHE`, or `~/.cache/regimen`."""
    return Path(os.environ.get("REGIMEN_CACHE") or Path.home() / ".cache" / "regimen")


def content_key(build: Callable[..., Any], configuration: Mapping[str, Any]) -> str:
    """A hash of what the numbers of a training depend on, 32 hexadecimal digits.

    Args:
        build: makes what is trained (a function, or a partial of one); the file that it is defined in counts.
        configuration: names, settings and seed.

    The source of this package and the versions of Python and of the libraries that compute count as well.
    """
    while isinstance(build, functools.partial):
        build = build.func
    content = {
        "configuration": configuration,
        "sources": [_package_digest(), _digest(Path(inspect.getfile(build)).read_bytes())],
        "versions": {name: metadata.version(name) for name in LIBRARIES} | {"python": sys.version},
    }
    return _digest(json.dumps(content, sort_keys=True, default=str).encode())[:32]


@functools.lru_cache(maxsize=1)
def _package_digest() -> str:
    root = Path(regimen.__path__[0])
    files = (f"{path.relative_to(root)} {_digest(path.read_bytes())}" for path in sorted(root.rglob("*.py")))
    return _digest("\n".join(files).encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class CacheEntry:
    """The place of one trained run folder in the cache, whether something is there or not."""

    path: Path

    def recall(self, folder: Path) -> dict[str, Any] | None:
        """Copy what is kept into a run folder; returns what was kept with it, or `None` if nothing is there.

        Raises:
            StorageError: it is damaged, or cannot be read or copied.
        """
        if not self.path.exists():
            return None
        try:
            manifest = json.loads((self.path / MANIFEST).read_text())
            contents = {name: (self.path / name).read_bytes() for name in manifest["files"]}
            if odd := [name for name, digest in manifest["files"].items() if _digest(contents[name]) != digest]:
                raise ValueError(f"{', '.join(odd)}: not what was written")
            for name, content in contents.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
            kept: dict[str, Any] = manifest["kept"]
        except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
            raise StorageError(f"the start kept in {self.path} cannot be used ({error})") from error
        return kept

    def keep(self, folder: Path, kept: Mapping[str, Any]) -> None:
        """Keep a run folder, whole or not at all, and `kept` (JSON) with it; what another process kept first stays.

        Raises:
            StorageError: it cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _sweep(self.path.parent)
            temporary = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=self.path.parent))
            try:
                shutil.copytree(folder, temporary, ignore=shutil.ignore_patterns(*_LEFT_OUT), dirs_exist_ok=True)
                files = {str(p.relative_to(temporary)): _digest(p.read_bytes()) for p in _files(temporary)}
                write_text(temporary / MANIFEST, json.dumps({"kept": kept, "files": files}, indent=1))
                if not self.path.exists():
                    temporary.rename(self.path)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        except OSError as error:
            # Another process may have kept its own between the look and the renaming.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) and not self.path.exists():
                raise StorageError(f"the start cannot be kept in {self.path.parent}: {error}") from error

    def drop(self) -> None:
        """Remove what is there."""
        shutil.rmtree(self.path, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sweep(root: Path) -> None:
    """Remove what processes that were killed have left half written."""
    for path in root.glob(".*"):
        if path.is_dir() and time.time() - path.stat().st_mtime > _ABANDONED_AFTER_S:
            shutil.rmtree(path, ignore_errors=True)
