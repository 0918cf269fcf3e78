"""Stopping a run by a signal without losing what is finished."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

STDERR = 2

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""What a terminal sends to end a job, by Ctrl-C or as it closes; and batch systems, some a while before they kill."""

TO_ALL = (signal.SIGTERM, signal.SIGHUP)
"""What torchrun passes on to all ranks: they end together."""


class Stopped(KeyboardInterrupt):
    """The user asked to stop. Like any `KeyboardInterrupt` it passes through `except Exception`."""

    def __init__(self, signal_number: int) -> None:
        self.exit_code = 128 + signal_number


@contextmanager
def handled(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Inside the `with`, `handler` gets all `SIGNALS`; only in the main thread. What `nohup` ignores stays ignored."""
    numbers = [each for each in SIGNALS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before or signal.SIG_DFL)


def stop_at_once(number: int, _: object) -> None:
    """A handler for `handled` while nothing is finished that could be lost."""
    raise Stopped(number)


class StopSignal:
    """Turns a signal into a `Stopped`: at the next `check`, or at once at the second SIGINT.

    Once `Stopped` is on its way further signals do nothing, so that closing the files is never interrupted. With
    `patience`, a process that has not come to a `check` or to `leave` so many seconds after a signal that all ranks get
    is ended, after its `last_words`: it may be waiting for a rank that is gone.
    """

    def __init__(self, patience: float | None = None) -> None:
        self.patience = patience
        self.number: int | None = None
        self.raised = False
        self.last_words: Callable[[], None] | None = None
        self._leaves = threading.Event()

    def check(self) -> None:
        """Raises `Stopped` if a signal has come."""
        if self.number is not None and not self.raised:
            self.raised = True
            self.leave()
            raise Stopped(self.number)

    def leave(self) -> None:
        """This process is about to end by itself, however long that takes."""
        self._leaves.set()

    @contextmanager
    def installed(self) -> Iterator[StopSignal]:
        """Handle signals inside the `with`; only in the main thread."""
        with handled(self._handle), ExitStack() as stack:
            if self.patience is not None:
                stack.callback(_watch(self._end))
            yield self

    def _handle(self, number: int, _: object) -> None:
        if self.number is not None:
            if number == signal.SIGINT:
                self.check()
            return
        self.number = number
        if number in TO_ALL and self.patience is not None:
            return
        with suppress(OSError):  # the terminal may be gone
            # Not by print: a handler may run while the same buffer is being written.
            os.write(STDERR, b"stopping after this step; Ctrl-C again stops at once\n")

    def _end(self, number: int) -> None:
        if number in TO_ALL and not self._leaves.wait(self.patience):
            if self.last_words is not None:
                self.last_words()
            os._exit(128 + number)


def exit_late(patience: float) -> None:
    """For a rank whose files another rank writes: it leaves the stopping to that one.

    From now on SIGTERM and SIGHUP end this process only after `patience` seconds: torchrun sends them to all ranks as
    soon as one is lost, and the one that notices needs a moment to say so. Other signals do nothing, as this rank ends
    with the others.
    """

    def end(number: int) -> None:
        if number in TO_ALL:
            time.sleep(patience)
            os._exit(128 + number)

    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    _watch(end)


def _watch(act: Callable[[int], None]) -> Callable[[], None]:
    """Call `act` with each signal that is handled in Python, from a thread of its own; returns what ends that.

    A handler runs when the main thread comes back to Python; this thread does not wait for one that is in a library.
    """
    reads, writes = os.pipe()
    os.set_blocking(writes, False)

    def watch() -> None:
        while number := os.read(reads, 1):
            act(number[0])
        os.close(reads)

    def end() -> None:
        signal.set_wakeup_fd(previous)
        os.close(writes)

    threading.Thread(target=watch, daemon=True).start()
    previous = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)  # it gets the number of each signal
    return end
