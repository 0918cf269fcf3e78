"""What a caller holds of a submitted video."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from launchers.messages.messages import Span


@dataclass(frozen=True)
class VideoChunk:
    """A finished chunk: `latents` `[B, C, T, h, w]` fp32; `frames` `[B, 33, H, W, 3]` uint8 or `None`; its work.

    `segments` are its MP4 segments, one a video of the batch, where files are written. `mix` has the prompts that it
    shows with their shares, the newest last; of a batch, each video's own. The arrays lie in shared memory and are
    read-only; copy what is to be kept.
    """

    index: int
    latents: np.ndarray
    frames: np.ndarray | None
    spans: dict[str, Span]
    segments: tuple[bytes, ...] = ()
    mix: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class VideoResult:
    """A finished video: its chunks, those of an earlier run among them, and its files."""

    chunks: int
    output: tuple[Path, ...]
    latents: np.ndarray | None


class Maker(Protocol):
    """Whoever makes the videos, by their keys."""

    def post(self, key: int, call: Callable[[Any], object]) -> None:
        """Have a call made with a `driver.video.Video`, by the thread that makes it; of one that has ended, never."""

    def change_prompt(self, key: int, prompt: str, transition: int | None, not_before: int) -> Future[int]: ...


class VideoHandle:
    """One video of a `ChunkPipeline`. Any thread may use it; only one at a time may take chunks."""

    def __init__(
        self,
        maker: Maker,
        key: int,
        *,
        streams: bool,
        keep_latents: bool,
        on_chunk: Callable[[VideoChunk], None] | None,
        on_end: Callable[[BaseException | None], None] | None = None,
    ) -> None:
        self.key = key
        self.streams = streams
        self._maker = maker
        self._latents: list[np.ndarray] | None = [] if keep_latents else None
        self._on_chunk, self._on_end = on_chunk, on_end
        self._chunks: deque[VideoChunk] = deque()
        self._changed = threading.Condition()
        self._reader: int | None = None
        self._result: VideoResult | None = None
        self._error: BaseException | None = None

    def __iter__(self) -> Iterator[VideoChunk]:
        """Each chunk in order as soon as it is there; the pipeline runs ahead by a few chunks only.

        Raises `ValueError` for a video that goes to a file only, and what `result` raises.
        """
        if not self.streams:
            raise ValueError(f"video {self.key} goes to its file: to take its chunks too, submit it with stream=True")
        self._reader = threading.get_ident()
        try:
            while (chunk := self._next(None)) is not None:
                try:
                    yield chunk
                finally:  # whoever leaves the loop has had the chunk too
                    self._post(lambda video: video.taken())
        finally:
            with self._changed:
                self._reader = None
                self._changed.notify_all()
        if self._error is not None:
            raise self._error

    @property
    def is_done(self) -> bool:
        """Whether the video is finished, failed or cancelled."""
        return self._result is not None or self._error is not None

    def cancel(self) -> None:
        """Stop after the chunks in hand. The finished ones stay in a playable file."""
        self._post(lambda video: video.cancel())

    def change_prompt(self, prompt: str, *, transition: int | None = 1, not_before: int = 0) -> Future[int]:
        """From the first chunk on that no worker has been handed, show this; returns which that is, once it is taken.
        It is chunk `not_before` or a later one.

        The prompt takes over within `transition` chunks; see `ScheduledPrompt`. A later change for the same chunk
        replaces it, and so do both what a schedule had planned. A run folder keeps it with the chunk. The future raises
        `RequestError` for a prompt or transition that is not allowed, for a batch, and where no chunk is left, and
        `RuntimeError` once the pipeline is closed.
        """
        return self._maker.change_prompt(self.key, prompt, transition, not_before)

    def allow(self, chunks: int) -> None:
        """Let a chunk begin only while fewer than `chunks` have; those that have begun are finished."""
        self._post(lambda video: video.allow(chunks))

    def stop(self) -> None:
        """End the video well after the chunks that have begun: `result` tells how many there are."""
        self._post(lambda video: video.stop())

    def result(self, timeout: float | None = None) -> VideoResult:
        """Wait for the end. Chunks of a stream are dropped, unless another thread takes them.

        Raises the error that ended the video, `CancelledError` if it was cancelled, and `TimeoutError`.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.is_done:
            if self._drops_chunks():
                if self._next(deadline) is not None:
                    self._post(lambda video: video.taken())
            else:
                with self._changed:
                    self._changed.wait_for(lambda: self.is_done or self._drops_chunks(), _left(deadline))
            if not self.is_done and _left(deadline) == 0:
                raise TimeoutError(f"video {self.key} is not finished after {timeout:g} s")
        if self._error is not None:
            raise self._error
        return self._result

    def _post(self, call: Callable[[Any], object]) -> None:
        self._maker.post(self.key, call)

    def _drops_chunks(self) -> bool:
        """Whether `result` takes the chunks of a stream, since no other thread does."""
        return self.streams and self._reader in (None, threading.get_ident())

    def _next(self, deadline: float | None) -> VideoChunk | None:
        """Wait for the next chunk of a stream; `None` at its end, or when the time is over."""
        self._post(lambda video: video.wanted())
        with self._changed:
            self._changed.wait_for(lambda: self._chunks or self.is_done, _left(deadline))
            return self._chunks.popleft() if self._chunks else None

    # Called by the pipeline

    def deliver(self, chunk: VideoChunk) -> None:
        if self._latents is not None:
            self._latents.append(chunk.latents.copy())
        if self._on_chunk is not None:
            self._on_chunk(chunk)
        if self.streams:
            with self._changed:
                self._chunks.append(chunk)
                self._changed.notify_all()

    def finish(self, chunks: int, output: tuple[Path, ...]) -> None:
        try:
            latents = np.concatenate(self._latents, axis=2) if self._latents else None
        except MemoryError as error:
            self.end(error)
            return
        with self._changed:
            self._result = VideoResult(chunks, output, latents)
            self._changed.notify_all()
        if self._on_end is not None:
            self._on_end(None)

    def end(self, error: BaseException) -> None:
        with self._changed:
            if self.is_done:
                return
            self._chunks.clear()
            self._latents = None
            self._error = error
            self._changed.notify_all()
        if self._on_end is not None:
            self._on_end(error)


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())
