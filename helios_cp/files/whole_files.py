"""Files that are either whole or absent."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helios_cp.config.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor


def check_file_target(flag: str, path: str | os.PathLike[str], suffix: str) -> None:
    """Raise `RequestError` unless a file can be written at `path`. Creates nothing, not even a missing folder.

    A symbolic link is followed, as `replacing` does. A pipe or a device is refused: a file is written beside its name
    and takes its place when it is whole.

    flag: what the message starts with, such as "--output".
    suffix: what the name must end in, such as ".mp4", in upper or lower case.
    """
    if os.path.isdir(path):
        raise RequestError(f"{flag} {path}: this is a folder; give a file name that ends in {suffix}")
    found = Path(path).suffix
    if found.lower() != suffix:
        raise RequestError(f"{flag} {path}: the suffix is {found!r}; allowed is {suffix}")
    if os.path.exists(path) and not os.path.isfile(path):
        raise RequestError(f"{flag} {path}: this is a pipe, a socket or a device; give the name of a file")
    target = os.path.realpath(path) if os.path.islink(path) else path
    if os.path.islink(target):
        raise RequestError(f"{flag} {path}: this link points to itself; give another path")
    _try_writing(flag, path, Path(target))


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
        # Try to write, because permission bits say nothing of root, read-only disks and remote folders.
        with tempfile.TemporaryFile(dir=folder), contextlib.suppress(FileNotFoundError):
            _partial(target).stat()  # fails for a name that is too long
    except OSError as error:
        reason = f"{folder} cannot be written ({error.strerror})"
        raise RequestError(f"{flag} {path}: {reason}; give another path") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file under; at the end of the `with` the file replaces `path`.

    A crash at any moment leaves the old file or the new one, on disk for good. Where `path` is a symbolic link, the
    file it points to is replaced. Its folder is made where it is missing. An `OSError` names the file.
    """
    target = Path(os.path.realpath(path))
    partial = _partial(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        _sync(partial)
        os.replace(partial, target)
        _sync(target.parent)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file as `replacing` does."""
    with replacing(path) as partial:
        partial.write_bytes(content)


def write_json(path: Path, values: Any) -> None:
    write_bytes(path, (json.dumps(values, indent=2) + "\n").encode())


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, with `metadata` in its header."""
    from safetensors.torch import save  # here, because who writes no tensors need not wait for torch

    write_bytes(path, save(tensors, metadata))


def _partial(path: Path) -> Path:
    """Where a file lies until it is whole: beside it, under a name that no other process uses."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")
