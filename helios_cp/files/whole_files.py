"""Files that are either whole or absent."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from helios_cp.config.errors import RequestError


def check_file_target(flag: str, path: str | os.PathLike[str], suffix: str) -> None:
    """Raise `RequestError` unless a file can be written at `path`. Creates nothing, not even a missing folder.

    flag: what the message starts with, such as "--output".
    suffix: what the name must end in, such as ".mp4", in upper or lower case.
    """
    if os.path.isdir(path):
        raise RequestError(f"{flag} {path}: this is a folder; give a file name that ends in {suffix}")
    found = Path(path).suffix
    if found.lower() != suffix:
        raise RequestError(f"{flag} {path}: the suffix is {found!r}; allowed is {suffix}")
    _try_writing(flag, path, Path(path))


def check_folder_target(flag: str, path: str | os.PathLike[str]) -> None:
    """Raise `RequestError` unless files can be written in the folder `path`, or it can be made. Creates nothing."""
    if os.path.lexists(path) and not os.path.isdir(path):
        raise RequestError(f"{flag} {path}: this is a file; give the name of a folder")
    _try_writing(flag, path, Path(path) / "run.json")


def _try_writing(flag: str, path: str | os.PathLike[str], target: Path) -> None:
    if "\0" in str(path):
        raise RequestError(f"{flag} {str(path)!r}: no file name holds a zero byte; give another path")
    folder = Path(os.path.abspath(target)).parent
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise RequestError(f"{flag} {path}: {folder} is not a folder; give another path")
    try:
        # Writing is tried, not asked about: permission bits say nothing of root, read-only disks and remote folders.
        with tempfile.TemporaryFile(dir=folder), contextlib.suppress(FileNotFoundError):
            _partial(target).stat()  # fails for a name that is too long
    except OSError as error:
        reason = f"{folder} cannot be written ({error.strerror})"
        raise RequestError(f"{flag} {path}: {reason}; give another path") from None


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a crash at any moment leaves the old one or the new one, on disk for good.

    Its folder is made where it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
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


def _partial(path: Path) -> Path:
    """Where a file lies until it is whole: beside it, under a name that no other process uses."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")
