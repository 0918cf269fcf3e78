"""Stopping a run by a signal without losing what is finished."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class Stopped(Exception):
    """The user asked to stop; raised between two steps, so that finished chunks are left whole."""

    def __init__(self, signal_number: int) -> None:
        self.exit_code = 128 + signal_number


class StopSignal:
    """Turns SIGINT and SIGTERM into a `Stopped` at the next step; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.number: int | None = None

    def check(self) -> None:
        if self.number is not None:
            raise Stopped(self.number)

    @contextmanager
    def installed(self) -> Iterator[StopSignal]:
        previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, _: object) -> None:
        if self.number == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
        print("stopping after this step; Ctrl-C again stops at once", file=sys.stderr, flush=True)
