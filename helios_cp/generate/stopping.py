"""Stopping a run by a signal without losing what is finished."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

STDERR = 2


class Stopped(KeyboardInterrupt):
    """The user asked to stop. Like any `KeyboardInterrupt` it passes through `except Exception`."""

    def __init__(self, signal_number: int) -> None:
        self.exit_code = 128 + signal_number


class StopSignal:
    """Turns SIGINT and SIGTERM into a `Stopped`: at the next `check`, or at once at the second SIGINT.

    Once `Stopped` is on its way further signals do nothing, so that closing the files is never interrupted. With
    `patience`, a process that has not ended so many seconds after a SIGTERM is ended: it may be waiting for a rank that
    is gone.
    """

    def __init__(self, patience: float | None = None) -> None:
        self.patience = patience
        self.number: int | None = None
        self.raised = False

    def check(self) -> None:
        """Raises `Stopped` if a signal has come."""
        if self.number is not None and not self.raised:
            self.raised = True
            raise Stopped(self.number)

    @contextmanager
    def installed(self) -> Iterator[StopSignal]:
        """Handle signals inside the `with`; only in the main thread."""
        previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, _: object) -> None:
        if self.number is not None:
            if number == signal.SIGINT:
                self.check()
            return
        self.number = number
        if number == signal.SIGTERM and self.patience is not None:
            timer = threading.Timer(self.patience, os._exit, (128 + number,))
            timer.daemon = True
            timer.start()
            return
        # Not by print: a handler may run while the same buffer is being written.
        os.write(STDERR, b"stopping after this step; Ctrl-C again stops at once\n")


def exit_late(patience: float) -> None:
    """From now on SIGTERM ends this process only after `patience` seconds, even if its main thread waits in a library.

    torchrun sends it to all ranks as soon as one is lost, and the one that notices needs a moment to say so.
    """
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    # The number of a signal is written there at once; a handler in Python runs when the main thread comes back.
    signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)

    def watch() -> None:
        while os.read(reads, 1)[0] != signal.SIGTERM:
            pass
        time.sleep(patience)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
