"""When a chunk is decoded: at once, or in a thread beside the denoising of the next chunk.

Denoising of chunk k+1 needs the latents of chunk k and not its frames, so these can be made on a stream of their own
meanwhile. At most one chunk is on its way, which takes the memory of one chunk more. The bits are the same either way.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from helios_cp.device.memory import MARGIN, MemoryMeter
from helios_cp.device.streams import to_host
from helios_cp.device.timing import Mark, Measured, Stopwatch, make_mark, seconds_of
from helios_cp.sampling.denoise import Step
from helios_cp.sampling.state import ChunkState


@dataclass(frozen=True)
class Chunk:
    """One finished chunk.

    `latents` `[B, C, T, h, w]` fp32; `frames` `[B, 33, H, W, 3]`, uint8 or fp32 in [0, 1], or `None` for output type
    "latent". The next chunk starts from `state`; saved, it resumes the video. `seconds` by stage, as the device took
    them; "decode" may overlap the next chunk, so the stages can sum to more than the wall time. `skipped` are the steps
    that left blocks out (see `helios_cp.model.block_cache`), of those that had a forward, counted from 0.
    """

    index: int
    latents: Tensor
    frames: Tensor | None
    state: ChunkState
    seconds: dict[str, float]
    skipped: tuple[int, ...] = ()


@dataclass(frozen=True)
class Denoised:
    """A chunk without frames, and without the seconds of its stages. The device may still be at work on it.

    `ready` is a mark in the stream after its latents.
    """

    chunk: Chunk
    measured: tuple[Measured, ...]
    ready: Mark


@torch.no_grad()
def add_frames(
    denoised: Denoised,
    decode: Callable[[Tensor], Tensor | None] | None,
    device: torch.device,
    stream: torch.Stream | None = None,
) -> Chunk:
    """A chunk with its frames on the host. Waits until the device is past all of it.

    `decode` turns latents `[B, C, T, h, w]` to frames `[B, T', H, W, 3]` on the device, or to `None` on ranks without
    frames; it is `None` itself where no frames are wanted. It runs on `stream`, or on the current one.
    """
    watch, frames, chunk = Stopwatch(device), None, denoised.chunk
    with stream or contextlib.nullcontext():
        if stream is not None:
            stream.wait_event(denoised.ready)
        if decode is not None:
            with watch.measure("decode"):
                frames = decode(chunk.latents)
                if frames is not None:
                    frames = to_host(frames)
        make_mark(device).synchronize()
    return replace(chunk, frames=frames, seconds=seconds_of((*denoised.measured, *watch.take())))


def with_frames(
    events: Iterable[Step | Denoised],
    decode: Callable[[Denoised], Chunk],
    is_beside: Callable[[], bool],
    on_step: Callable[[Step], None] | None = None,
) -> Iterator[Chunk]:
    """The chunks of a run with their frames, in order, each as soon as these are there.

    `events` are the steps of each chunk followed by the chunk without frames. `is_beside` is asked for each chunk: if
    so, it is decoded in a thread, and comes between two steps of the next chunk, or behind the last of them. When a
    step, or `on_step`, fails or is interrupted, the chunk before it still comes, if it can, and then the error.
    """
    in_hand: Future[Chunk] | None = None

    def take() -> Chunk:
        nonlocal in_hand
        chunk = in_hand.result()
        in_hand = None
        return chunk

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="decoder") as thread:
        try:
            for event in events:
                if isinstance(event, Step):
                    if on_step is not None:
                        on_step(event)
                    if in_hand is not None and in_hand.done():
                        yield take()
                    continue
                if in_hand is not None:
                    yield take()
                if is_beside():
                    in_hand = thread.submit(decode, event)
                else:
                    yield decode(event)
        except (Exception, KeyboardInterrupt):
            last = None
            with contextlib.suppress(Exception):  # the first error is the one to be told
                last = in_hand and take()
            if last is not None:
                yield last
            raise
        if in_hand is not None:
            yield take()


WORK = {"denoise", "decode"}


class Room:
    """Whether a chunk can be decoded while the next is denoised: both have to fit into the device's memory.

    What each takes beside what stays on the device is measured once a size of video.
    """

    def __init__(self, meter: MemoryMeter) -> None:
        self.meter = meter
        self._needed: dict[Hashable, dict[str, int]] = defaultdict(dict)

    @contextlib.contextmanager
    def measured(self, size: Hashable, work: str) -> Iterator[None]:
        """Measures one of `WORK`, which runs inside with nothing beside it. It does so the first time only.

        It measures nothing where nobody can tell how much memory is free.
        """
        if work in self._needed[size] or self.meter.free() is None:
            yield
            return
        self.meter.begin()
        yield
        self._needed[size][work] = self.meter.needed()

    def has_both(self, size: Hashable) -> bool:
        """Whether both fit together. Ask while neither runs. False until both were measured.

        True where nobody can tell how much memory is free.
        """
        free, needed = self.meter.free(), self._needed[size]
        return free is None or (needed.keys() == WORK and free >= MARGIN * sum(needed.values()))
