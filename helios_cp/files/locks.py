"""Locks between processes that end with their process, however it ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
"""What `flock` says on a file system that has no locks."""


class LockedError(Exception):
    """Another process holds the lock; the text says which."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock on the file `path` inside the `with`. Raises `LockedError` at once where another process holds it.

    The kernel drops the lock when its process ends, so a file that a killed process left locks nothing. The file, and
    folders that were made for it, are removed at the end. The lock holds across machines where the file system has such
    locks, as NFS does. On a file system without locks nothing is locked.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _take(path)
    try:
        os.truncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)  # before the lock is gone: see `_take`
        os.close(file)
        with contextlib.suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()


def _take(path: Path) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(file, 200).decode(errors="replace") or "another process"
            os.close(file)
            raise LockedError(holder) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(file)
                raise
        # The one who held it may have removed it since it was opened here; then it locks nothing any more.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        os.close(file)
