"""When a chunk is decoded: at once, or on a stream of its own beside the denoising of the next chunk.

Denoising of chunk k+1 needs chunk k's latents and not its frames. `Beside` therefore decodes chunk k, and copies its
frames to the host, while chunk k+1 is denoised. At most one chunk is on its way, so memory stays that of one chunk
more. The same kernels run on the same numbers in either way, so the bits are the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from helios_cp.device.streams import to_host, wait_for
from helios_cp.device.timing import Mark, Stopwatch, Times
from helios_cp.pipeline.chunk import Chunk
from helios_cp.sampling.denoise import Step

Decode = Callable[[Tensor], Tensor | None]
"""Latents `[B, C, T, h, w]` to frames `[B, T', H, W, 3]` on the device, or `None` on ranks without frames."""

MARGIN = 1.1  # on the memory that work is expected to need, as free memory lies in pieces


class Side(Protocol):
    """Where work runs beside the current stream, as in `helios_cp.device.streams.SideStream`."""

    def mark(self) -> Mark: ...
    def after(self, mark: Mark | None, *inputs: Tensor) -> contextlib.AbstractContextManager[None]: ...
    def to_host(self, tensor: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Denoised:
    """A chunk whose denoising is on its way: still without frames, and without the seconds that its stages take."""

    chunk: Chunk
    times: Times

    def finished(self, frames: Tensor | None, **seconds: float) -> Chunk:
        """With its frames, and with `seconds` of further stages; once the device is past all of it."""
        return replace(self.chunk, frames=frames, seconds=self.times.read() | seconds)


class Decoding(Protocol):
    """Takes chunks as they are denoised, and gives each back with its frames, in order, when the device is done."""

    def hand_in(self, denoised: Denoised) -> Chunk | None:
        """A chunk is denoised; returns one that has its frames."""

    def between_steps(self) -> Chunk | None:
        """A step is on its way; returns a chunk if its frames are there, and never waits for them."""

    def finish(self) -> Chunk | None:
        """Nothing more comes; waits for the last frames."""


class AtOnce:
    """Decodes each chunk before the next is denoised. `decode` is `None` where no frames are wanted."""

    def __init__(self, decode: Decode | None, device: torch.device, *, keep_on_device: bool = False) -> None:
        self.decode = decode
        self.device = device
        self.keep_on_device = keep_on_device

    def hand_in(self, denoised: Denoised) -> Chunk:
        watch, frames = Stopwatch(self.device), None
        if self.decode is not None:
            with watch.measure("decode"):
                frames = self.decode(denoised.chunk.latents)
                if frames is not None and not self.keep_on_device:
                    frames = to_host(frames)
        wait_for(self.device)
        return denoised.finished(frames, **watch.take().read())

    def between_steps(self) -> None:
        return None

    def finish(self) -> None:
        return None


class Beside:
    """Decodes each chunk beside the denoising of the next, and brings its frames to the host.

    A chunk is decoded behind the first step of the next: the device is then busy with that step while the many kernels
    of the decoder are launched, and not idle.
    """

    def __init__(self, decode: Decode, side: Side) -> None:
        self.decode = decode
        self.side = side
        self._flight: _Flight | None = None

    def hand_in(self, denoised: Denoised) -> Chunk | None:
        mark = self.side.mark()
        before = self.finish()
        self._flight = _Flight(denoised, mark)
        return before

    def between_steps(self) -> Chunk | None:
        flight = self._flight
        if flight is None:
            return None
        if flight.end is None:
            self._launch(flight)
            return None
        return self._land(flight) if flight.end.query() else None

    def finish(self) -> Chunk | None:
        flight = self._flight
        if flight is None:
            return None
        if flight.end is None:
            self._launch(flight)
        flight.end.synchronize()
        return self._land(flight)

    def _launch(self, flight: _Flight) -> None:
        self._flight = None  # what fails is not tried again
        latents = flight.denoised.chunk.latents
        with self.side.after(flight.mark, latents):
            flight.begin = self.side.mark()
            frames = self.decode(latents)
            flight.frames = None if frames is None else self.side.to_host(frames)
            flight.end = self.side.mark()
        self._flight = flight

    def _land(self, flight: _Flight) -> Chunk:
        self._flight = None
        return flight.denoised.finished(flight.frames, decode=flight.begin.elapsed_time(flight.end) / 1000)


@dataclass
class _Flight:
    """The one chunk that is on its way from latents to frames."""

    denoised: Denoised
    mark: Mark
    begin: Mark | None = None
    end: Mark | None = None
    frames: Tensor | None = None


def with_frames(
    events: Iterable[Step | Denoised], decoding: Decoding, on_step: Callable[[Step], None] | None = None
) -> Iterator[Chunk]:
    """The chunks of a run with their frames, each as soon as these are there.

    `events` are the steps of each chunk followed by the chunk without frames. When a step, or `on_step`, fails or is
    interrupted, the chunk before it still comes, if it can, and then the error.
    """
    try:
        for event in events:
            if isinstance(event, Step):
                if on_step is not None:
                    on_step(event)
                ready = decoding.between_steps()
            else:
                ready = decoding.hand_in(event)
            if ready is not None:
                yield ready
    except (Exception, KeyboardInterrupt):
        last = None
        with contextlib.suppress(Exception):  # the first error is the one to be told
            last = decoding.finish()
        if last is not None:
            yield last
        raise
    last = decoding.finish()
    if last is not None:
        yield last
