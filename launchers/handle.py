"""What a caller holds of a submitted video."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from helios_cp.config import RequestError
from launchers.messages import Span

if TYPE_CHECKING:
    from launchers.pipeline import ChunkPipeline


@dataclass(frozen=True)
class VideoChunk:
    """A finished chunk: `latents` `[B, C, T, h, w]` fp32; `frames` `[B, 33, H, W, 3]` uint8 or `None`; its work.

    The arrays lie in shared memory and are read-only; copy what is to be kept.
    """

    index: int
    latents: np.ndarray
    frames: np.ndarray | None
    spans: dict[str, Span]


@dataclass(frozen=True)
class VideoResult:
    """A finished video: its chunks, those of an earlier run among them, and its files."""

    chunks: int
    output: tuple[Path, ...]
    latents: np.ndarray | None


class VideoHandle:
    """One video of a `ChunkPipeline`. Any thread may use it; only one at a time may take chunks."""

    def __init__(
        self,
        pipeline: ChunkPipeline,
        key: int,
        *,
        streams: bool,
        keep_latents: bool,
        saved_in: Path | None,
        on_chunk: Callable[[VideoChunk], None] | None,
    ) -> None:
        self.key = key
        self.streams = streams
        self._pipeline = pipeline
        self._latents: list[np.ndarray] | None = [] if keep_latents else None
        self._saved_in = saved_in
        self._on_chunk = on_chunk
        self._chunks: deque[VideoChunk] = deque()
        self._changed = threading.Condition()
        self._result: VideoResult | None = None
        self._error: BaseException | None = None

    def __iter__(self) -> Iterator[VideoChunk]:
        """Each chunk in order as soon as it is there; the pipeline runs ahead by a few chunks only.

        Raises `ValueError` for a video that goes to a file only, and what `result` raises.
        """
        if not self.streams:
            raise ValueError(f"video {self.key} goes to its file: to take its chunks too, submit it with stream=True")
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._chunks or self.is_done)
                if not self._chunks:
                    break
                chunk = self._chunks.popleft()
            try:
                yield chunk
            finally:  # whoever leaves the loop has had the chunk too
                self._pipeline.taken(self.key)
        if self._error is not None:
            raise self._error

    @property
    def is_done(self) -> bool:
        """Whether the video is finished, failed or cancelled."""
        return self._result is not None or self._error is not None

    def cancel(self) -> None:
        """Stop after the chunks in hand. The finished ones stay in a playable file."""
        self._pipeline.cancel(self.key)

    def update_prompt(self, text: str) -> None:
        """From the next chunk to be denoised on, show this.

        Raises `RequestError` for an empty text, and for a video that is saved in a run folder.
        """
        if not text.strip():
            raise RequestError(f"prompt {text!r}: a prompt must hold more than white space")
        if self._saved_in is not None:
            raise RequestError(
                f"video {self.key} is saved in {self._saved_in}, from where it could not be made again with another "
                "prompt; submit it without a folder"
            )
        self._pipeline.update_prompt(self.key, text)

    def result(self, timeout: float | None = None) -> VideoResult:
        """Wait for the end; chunks of a stream that nobody takes are dropped.

        Raises the error that ended the video, `CancelledError` if it was cancelled, and `TimeoutError`.
        """
        if self.streams and timeout is None:
            for _ in self:
                pass
        with self._changed:
            if not self._changed.wait_for(lambda: self.is_done, timeout):
                raise TimeoutError(f"video {self.key} is not finished after {timeout:g} s")
        if self._error is not None:
            raise self._error
        return self._result

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
        latents = np.concatenate(self._latents, axis=2) if self._latents else None
        with self._changed:
            self._result = VideoResult(chunks, output, latents)
            self._changed.notify_all()

    def end(self, error: BaseException) -> None:
        with self._changed:
            if not self.is_done:
                self._chunks.clear()
                self._error = error
                self._changed.notify_all()

    def cancelled(self) -> None:
        self.end(CancelledError(f"video {self.key} was cancelled"))
