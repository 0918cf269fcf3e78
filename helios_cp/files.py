"""Files that are either whole or absent."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from helios_cp.config import RequestError


def check_file_target(flag: str, path: Path, suffix: str) -> None:
    """Raises `RequestError` if no file with `suffix` can be written at `path`; touches nothing.

    Folders that do not exist yet are fine where they can be made.
    """
    if path.suffix != suffix:
        raise RequestError(f"{flag} {path}: the name must end in {suffix}")
    if path.is_dir():
        raise RequestError(f"{flag} {path}: a folder of that name is in the way")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise RequestError(f"{flag} {path}: {parent} is a file, not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise RequestError(f"{flag} {path}: no permission to write in {parent}")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a crash at any moment leaves the old one or the new one, on disk for good."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, values: Any) -> None:
    write_bytes(path, (json.dumps(values, indent=2) + "\n").encode())


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file."""
    write_bytes(path, save(tensors))
