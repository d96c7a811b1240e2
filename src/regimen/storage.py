"""Saving nested state as one safetensors file: tensors as tensors, everything else as JSON. Nothing is unpickled."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file
from torch import Tensor

_TENSOR, _ITEMS, _TUPLE = "__tensor__", "__items__", "__tuple__"


class StorageError(RuntimeError):
    """A file of the library's own cannot be written or read."""


def save_tree(path: Path, tree: Any) -> None:
    """Write nested dicts, lists, tuples, tensors and plain values to one file, all or nothing.

    Raises:
        StorageError: the file cannot be written (no room, no permission); what was there before is untouched.
        TypeError: a value that can be neither a tensor nor JSON.
    """
    tensors: dict[str, Tensor] = {}
    structure = _encode(tree, tensors, {}, "")
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"tree": json.dumps(structure)})


def load_tree(path: Path) -> Any:
    """Read what `save_tree` wrote.

    Raises:
        StorageError: the file is missing, truncated or not one of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _decode(json.loads(metadata["tree"]), tensors)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise StorageError(f"{path} cannot be read ({error}); it is truncated or not a file of this library") from error


def pack_tree(tree: Any) -> bytes:
    """What `save_tree` writes, as bytes; the same values and errors."""
    tensors: dict[str, Tensor] = {}
    structure = _encode(tree, tensors, {}, "")
    return save(tensors, metadata={"tree": json.dumps(structure)})


def unpack_tree(data: bytes) -> Any:
    """Read what `pack_tree` made; `StorageError` for anything else."""
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return _decode(json.loads(header["__metadata__"]["tree"]), load(data))
    except (SafetensorError, LookupError, ValueError, TypeError) as error:
        raise StorageError(f"{len(data)} bytes cannot be read as a tree ({error})") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, all or nothing; `StorageError` if it cannot be written."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place, on disk, when the body succeeds."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path} cannot be written: {error}; free some room or choose another folder") from error
    finally:
        temporary.unlink(missing_ok=True)


def _encode(node: Any, tensors: dict[str, Tensor], storages: dict[Any, str], at: str) -> Any:
    if isinstance(node, Tensor):
        # Members of a cast may share weights: each tensor is stored once.
        identity = (node.data_ptr(), node.shape, node.stride(), node.dtype) if node.numel() else id(node)
        if identity not in storages:
            storages[identity] = str(len(tensors))
            tensors[storages[identity]] = node.detach().contiguous().clone().cpu()
        return {_TENSOR: storages[identity]}
    if isinstance(node, Mapping):
        if all(isinstance(key, str) for key in node) and not {_TENSOR, _ITEMS, _TUPLE} & set(node):
            return {key: _encode(value, tensors, storages, f"{at}/{key}") for key, value in node.items()}
        return {_ITEMS: [[key, _encode(value, tensors, storages, f"{at}/{key}")] for key, value in node.items()]}
    if isinstance(node, list | tuple):
        entries = [_encode(value, tensors, storages, f"{at}[{i}]") for i, value in enumerate(node)]
        return {_TUPLE: entries} if isinstance(node, tuple) else entries
    if node is None or isinstance(node, bool | int | float | str):
        return node
    raise TypeError(
        f"state at '{at or '/'}' is a {type(node).__name__}; expected tensors, numbers, texts, lists, dicts"
    )


def _decode(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(node, dict):
        if _TENSOR in node:
            return tensors[node[_TENSOR]]
        if _ITEMS in node:
            return {key: _decode(value, tensors) for key, value in node[_ITEMS]}
        if _TUPLE in node:
            return tuple(_decode(value, tensors) for value in node[_TUPLE])
        return {key: _decode(value, tensors) for key, value in node.items()}
    if isinstance(node, list):
        return [_decode(value, tensors) for value in node]
    return node


def random_state() -> dict[str, Any]:
    """The states of the global generators of torch, numpy and Python, for parts that draw from them."""
    import random

    import numpy as np

    name, keys, *rest = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    version, internal, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(keys.copy().astype("int64")), *rest],
    }
    state["python"] = [version, list(internal), gauss]
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore what `random_state` gave."""
    import random

    import numpy as np

    torch.set_rng_state(state["torch"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype("uint32"), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
