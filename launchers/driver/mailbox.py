"""Calls that any thread leaves for one thread to make."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class ClosedError(RuntimeError):
    """Nobody makes calls any more."""

    def __init__(self) -> None:
        super().__init__("the pipeline is closed; make another one")


class Mailbox:
    """Open until `close` hands out what is left: nothing that was taken in is ever forgotten."""

    def __init__(self) -> None:
        self._calls: queue.Queue[Callable[[], None]] = queue.Queue()
        self._lock = threading.Lock()
        self._is_closed = False

    def post(self, call: Callable[[], None]) -> bool:
        """Whether it was taken in."""
        with self._lock:
            if not self._is_closed:
                self._calls.put(call)
            return not self._is_closed

    def ask(self, call: Callable[[], T]) -> T:
        """What the call returns or raises, once the thread has made it. Raises `ClosedError`."""
        answer: Future[T] = Future()

        def make() -> None:
            try:
                answer.set_result(call())
            except Exception as error:
                answer.set_exception(error)

        if not self.post(make):
            raise ClosedError
        return answer.result()

    def next(self, timeout: float) -> Callable[[], None] | None:
        """The next call, or `None` if there is none within `timeout` seconds."""
        try:
            return self._calls.get(timeout=timeout)
        except queue.Empty:
            return None

    def close(self) -> list[Callable[[], None]]:
        """What is left."""
        with self._lock:
            self._is_closed = True
        return [self._calls.get_nowait() for _ in range(self._calls.qsize())]
