"""What a command tells its user. Telling never ends work: not on a full disk, not in a locale without the letters."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO


def say(line: str) -> None:
    """A line for the user, apart from the results on stdout."""
    print(line, file=sys.stderr, flush=True)


def typed(text: str) -> str:
    """A text of the command line as it was typed, in UTF-8, where the locale made something else of it."""
    with suppress(UnicodeError):
        return os.fsencode(text).decode()
    return text


@contextmanager
def unfailing_output() -> Iterator[None]:
    """Inside, writing to stdout and stderr raises nothing; for the outermost function of a command.

    Characters that a stream cannot encode are escaped, as in `\\u72d0`. What cannot be written is dropped.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file opened would get its number, and what libraries print
            os.open(os.devnull, os.O_RDWR)
    streams = [stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr)]  # noqa: SIM115
    with redirect_stdout(_Unfailing(streams[0])), redirect_stderr(_Unfailing(streams[1])):
        try:
            yield
        finally:
            for stream in streams:
                _empty(stream)


class _Unfailing:
    """A text stream that raises nothing when it is written to."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        encoding = self._stream.encoding or "utf-8"
        with suppress(OSError, ValueError):  # a full disk, a closed pipe or terminal; a closed stream
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _empty(stream: TextIO) -> None:
    """Flush, or give up what is left: Python flushes once more as it ends, and would end with exit code 120."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
