"""A run is a folder: configuration, metrics, checkpoints, samples. A kill at any moment leaves it readable."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor, nn

from regimen.storage import StorageError, load_tree, replacing, save_tree, write_text

KEPT_CHECKPOINTS = 2


class RunError(RuntimeError):
    """A run cannot start, continue or go on; the message says why and what to do."""


class RunFolder:
    """Where a run writes. Every file appears whole or not at all; metrics are appended line by line."""

    def __init__(self, path: Path | str, config: Mapping[str, Any], resume: bool) -> None:
        """Open a folder, new or to be continued.

        Raises:
            RunError: it cannot be written, it already holds a run and `resume` is False, or it holds a run with
                other settings, or with settings that cannot be read.
        """
        self.path = Path(path)
        self._checkpoints = self.path / "checkpoints"
        self._metrics = self.path / "metrics.jsonl"
        try:
            self._checkpoints.mkdir(parents=True, exist_ok=True)
            (self.path / "samples").mkdir(exist_ok=True)
        except OSError as error:
            raise RunError(f"the run folder {self.path} cannot be written: {error}") from error
        existing = self.path / "config.json"
        if existing.exists() and not resume and self._metrics.exists():
            raise RunError(f"{self.path} already holds a run; continue it with resume, or choose another folder")
        config = json.loads(json.dumps(config))
        if existing.exists() and resume:
            _check_same_config(existing, config)
        write_text(existing, json.dumps(config, indent=1))
        self._lines: TextIO | None = None
        self._curves: Curves | None = None

    def restore(self, tell: Callable[[str], None] = warnings.warn) -> Any | None:
        """The newest readable checkpoint's state, with the metrics cut back to it; `None` if there is none.

        A checkpoint that cannot be read, or whose metrics are lost, is passed over; `tell` is given the reason.
        """
        written = self._metrics.stat().st_size if self._metrics.exists() else 0
        state, size = None, 0
        for path in sorted(self._checkpoints.glob("*.safetensors"), reverse=True):
            try:
                state, size = _read_checkpoint(path, written)
                break
            except StorageError as error:
                tell(f"{error}; falling back to the checkpoint before, or to the start if there is none")
        if self._metrics.exists():
            with self._metrics.open("r+b") as file:
                file.truncate(size)
        return state

    def checkpoint(self, state: Mapping[str, Any], number: int) -> None:
        """Save a state under a growing number, and drop the older ones."""
        size = self._metrics.stat().st_size if self._metrics.exists() else 0
        if size:  # A checkpoint must not outlive the metrics that go with it, if the power fails.
            with self._writing(), self._metrics.open("rb") as file:
                os.fsync(file.fileno())
        save_tree(self._checkpoints / f"{number:08d}.safetensors", {**state, "metrics_bytes": size})
        for old in sorted(self._checkpoints.glob("*.safetensors"))[:-KEPT_CHECKPOINTS]:
            old.unlink(missing_ok=True)

    def save_cast(self, state: Mapping[str, Any], label: str) -> None:
        """Keep the cast as it is now, for other runs to start from."""
        save_tree(self.path / f"cast-{label}.safetensors", state)

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Append a record to `metrics.jsonl` and its numbers to TensorBoard.

        Both are with the operating system on return: a kill of this process does not lose them.

        Raises:
            StorageError: either cannot be written.
        """
        with self._writing():
            if self._lines is None:
                # Opened to append, so that it follows when `restore` cuts the file back.
                self._lines = self._metrics.open("a")
            self._lines.write(json.dumps(record) + "\n")
            self._lines.flush()
            if self._curves is None:
                self._curves = Curves(self.path / "tensorboard", step)
            self._curves.add({f"{record['kind']}/{name}": value for name, value in record["metrics"].items()}, step)

    def save_samples(self, label: str, samples: Mapping[str, Tensor | list[str]]) -> None:
        """Images as a PNG sheet, texts as a text file, both under `samples/`."""
        for name, content in samples.items():
            target = self.path / "samples" / f"{label}-{name}"
            if isinstance(content, Tensor):
                save_image_sheet(target.with_suffix(".png"), content)
            else:
                write_text(target.with_suffix(".txt"), "\n".join(content))

    def close(self) -> None:
        """Write what is buffered; `StorageError` if it cannot be written."""
        with self._writing():
            for file in (self._lines, self._curves):
                if file is not None:
                    file.close()
        self._lines = self._curves = None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"{self.path} cannot be written: {error}; free some room and resume") from error


class Curves:
    """A file of events for TensorBoard.

    TensorBoard's own writer hands every number to a thread; an iteration of a small model then waits for that thread
    longer than it works. Here all numbers of a step are one event, written at once.
    """

    def __init__(self, folder: Path, first: int) -> None:
        """Begin a file in a folder; what older files there say of steps from `first` on is not shown any more."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter((folder / name).open("wb"))
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=first, session_log=SessionLog(status=SessionLog.START)))

    def add(self, numbers: Mapping[str, float], step: int) -> None:
        """The numbers of one step, by the names of their curves."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._write(self._event(step=step, summary=self._summary(value=values)))

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        self._records.flush()

    def close(self) -> None:
        """Close the file."""
        self._records.close()


def _read_checkpoint(path: Path, written: int) -> tuple[Any, int]:
    """A checkpoint's state, and the bytes of metrics that go with it, of which `written` are there."""
    state = load_tree(path)
    size = int(state["metrics_bytes"])
    if size > written:
        raise StorageError(f"{path} goes with {size} bytes of metrics, and {written} are left")
    return state, size


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a run's `metrics.jsonl`; a last line cut by a kill is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def save_image_sheet(path: Path, images: Tensor, columns: int = 16, scale: int = 6) -> None:
    """A PNG with images `[N, C, H, W]` (C 1 or 3, values clipped to [-1, 1]) in rows of `columns`.

    Raises:
        StorageError: it cannot be written.
    """
    from PIL import Image

    shown = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).byte()
    count, channels, height, width = shown.shape
    rows = -(-count // columns)
    sheet = torch.full((rows * columns, channels, height + 1, width + 1), 60, dtype=torch.uint8)
    sheet[:count, :, :height, :width] = shown
    grid = sheet.view(rows, columns, channels, height + 1, width + 1).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    pixels = np.ascontiguousarray(grid.numpy().squeeze(-1) if channels == 1 else grid.numpy())
    picture = Image.fromarray(pixels).resize(
        (pixels.shape[1] * scale, pixels.shape[0] * scale), Image.Resampling.NEAREST
    )
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def describe(part: Any) -> Any:
    """Settings of a part as JSON: class, version, numbers and names, recursively; weights only by count."""
    if part is None or isinstance(part, bool | int | float | str):
        return part
    if isinstance(part, Tensor):
        return {"tensor": list(part.shape)}
    if isinstance(part, nn.Module):
        total = sum(p.numel() for p in part.parameters())
        return {"type": type(part).__name__, "parameters": total, "settings": part.extra_repr()}
    if isinstance(part, Mapping):
        return {str(key): describe(value) for key, value in part.items()}
    if isinstance(part, Sequence):
        return [describe(value) for value in part]
    if isinstance(part, functools.partial):
        return {"type": describe(part.func), "settings": describe(part.keywords)}
    if isinstance(part, type) or (isinstance(part, Callable) and hasattr(part, "__qualname__")):  # type: ignore[arg-type]
        # A method of a built-in class, such as str.split, has no module.
        return f"{getattr(part, '__module__', 'builtins')}.{part.__qualname__}"
    if dataclasses.is_dataclass(part):
        settings = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
    else:
        settings = {k: v for k, v in vars(part).items() if not k.startswith("_")} if hasattr(part, "__dict__") else {}
    version = {"version": part.version} if isinstance(getattr(part, "version", None), int) else {}
    return {
        "type": type(part).__name__,
        **version,
        **{key: describe(value) for key, value in settings.items()},
    }


def _check_same_config(existing: Path, config: Any) -> None:
    try:
        old = json.loads(existing.read_text())
    except (OSError, ValueError) as error:
        raise RunError(
            f"{existing} cannot be read ({error}), so the run cannot go on; choose another folder"
        ) from error
    if difference := _first_difference(old, config, ""):
        raise RunError(
            f"{existing.parent} holds a run with other settings: {difference}; resume with the same settings"
        )


def _first_difference(old: Any, new: Any, at: str) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            if found := _first_difference(old.get(key, "absent"), new.get(key, "absent"), f"{at}/{key}"):
                return found
        return ""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return next(
            (f for i, (a, b) in enumerate(zip(old, new, strict=True)) if (f := _first_difference(a, b, f"{at}[{i}]"))),
            "",
        )
    return "" if old == new else f"{at} was {old} and is {new}"
