"""Writing finished chunks beside the computation of the next one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Generic, TypeVar

from helios_cp.pipeline import Chunk

T = TypeVar("T")


class BackgroundWriter(Generic[T]):
    """Calls `write` for one item after the other, in a thread of its own; a context manager.

    At most one item is in hand: `put` waits until the one before is written, so that a slow writer slows down what
    makes the items, and no memory fills up. An error of `write` is raised by the next `check`, `put` or `wait`, or at
    the end of the `with`; nothing is written after it. When the `with` ends, by an error or an interrupt too, the item
    in hand is written first.
    """

    def __init__(self, write: Callable[[T], None]) -> None:
        self.write = write
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
        self._in_hand: Future[None] | None = None

    def put(self, item: T) -> None:
        """Write this next, and come back at once if nothing is in hand."""
        self.wait()
        self._in_hand = self._thread.submit(self.write, item)

    def check(self) -> None:
        """Raises the writer's error, if it has had one. Never waits."""
        if self._in_hand is not None and self._in_hand.done():
            self._in_hand.result()

    def wait(self) -> None:
        """Until nothing is in hand. Raises the writer's error."""
        if self._in_hand is not None:
            self._in_hand.result()

    def __enter__(self) -> BackgroundWriter[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        try:
            # An error under way is told rather than one of writing; a mere interrupt is not.
            if not isinstance(error, Exception):
                self.wait()
        finally:
            self._thread.shutdown()


def to_host(chunk: Chunk) -> Chunk:
    """The same chunk with nothing on the device, so that another thread can write it without touching the device."""
    state = chunk.state
    anchor = None if state.anchor is None else state.anchor.cpu()
    state = replace(state, history=state.history.cpu(), anchor=anchor)
    frames = None if chunk.frames is None else chunk.frames.cpu()
    return replace(chunk, latents=chunk.latents.cpu(), frames=frames, state=state)
