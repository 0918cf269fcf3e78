"""Writing finished chunks beside the computation of the next one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from helios_cp.device.device import has_streams
from helios_cp.device.streams import to_host, wait_for
from helios_cp.pipeline.decoding import Chunk


class BackgroundWriter:
    """Calls `write` for one item after the other, in a thread of its own; a context manager.

    At most one item is in hand. `put` waits until the one before is written, so a slow writer slows down the maker of
    the items and no memory fills up. The next `check`, `put` or `wait`, or the end of the `with`, raises an error of
    `write`; nothing is written after it. The end of the `with` waits for the item in hand, after an error too.
    """

    def __init__(self, write: Callable[[Any], None]) -> None:
        self.write = write
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
        self._in_hand: Future[None] | None = None

    def put(self, item: Any) -> None:
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

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        try:
            # An error under way hides one of writing, because it came first. An interrupt hides none.
            if not isinstance(error, Exception):
                self.wait()
        finally:
            self._thread.shutdown()


class HostCopies:
    """Copies of finished chunks with nothing on the device, so that other threads can write them without touching it.

    They are made on a stream of their own, through pinned memory: the host waits for these copies and not for the steps
    of the next chunk, which the device has been given already.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.Stream(device) if has_streams(device) else contextlib.nullcontext()

    def __call__(self, chunk: Chunk) -> Chunk:
        """The same chunk on the host. The device must be past all of it, as it is when a pipeline yields it."""
        with self.stream:
            state = replace(chunk.state, history=to_host(chunk.state.history), anchor=_copied(chunk.state.anchor))
            copy = replace(chunk, latents=to_host(chunk.latents), frames=_copied(chunk.frames), state=state)
            wait_for(self.device)
        return copy


def _copied(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else to_host(tensor)
