"""One take of a session as a video of the pipeline: what the pipeline's thread tells is passed to the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from helios_cp.config.request import Request, ScheduledPrompt
from helios_cp.device.device import dtype_name
from helios_cp.generate.check import Session as CheckedCall
from helios_cp.generate.check import check_same_run
from helios_cp.generate.run_folder import Run, RunFolder
from launchers.driver.handle import VideoHandle
from launchers.driver.pipeline import ChunkPipeline
from launchers.messages.messages import Span
from launchers.workers import denoised_chunks


@dataclass(frozen=True)
class Made:
    """A chunk that is on disk; `index` counts in its take, from 0. `spans` say when each stage worked on it."""

    take: int
    index: int
    segment: bytes
    spans: dict[str, Span]


@dataclass(frozen=True)
class Ended:
    """No chunk of a take comes any more. `error` is `None` after its last chunk, and after `stop`."""

    take: int
    error: BaseException | None


Tell = Callable[[Made | Ended], object]


def open_run(checked: CheckedCall, request: Request, folder: Path) -> RunFolder:
    """The run folder of a take: as it stands, or a new one. Raises `RequestError`, also for a take that was begun with
    another model or with flags that change its bits."""
    output = (str(video_of(folder).absolute()),)
    run = Run(request, checked.model, dtype_name(checked.dtype), output, checked.execution, checked.made_with)
    if not RunFolder.is_run(folder):
        return RunFolder.create(folder, run)
    kept = RunFolder.open(folder)
    check_same_run(kept.run, run, folder)
    return kept


def video_of(folder: Path) -> Path:
    return folder / "video.mp4"


def submit(
    pipeline: ChunkPipeline, folder: RunFolder, take: int, tell: Tell, loop: asyncio.AbstractEventLoop
) -> VideoHandle:
    """Queue the video of a run folder, from where it stands; no chunk begins before it is allowed.

    `tell` is called in the event loop. Raises `RequestError`.
    """
    return pipeline.submit(
        folder.run.request,
        folder=folder,
        output=[video_of(folder.path)],
        on_chunk=lambda chunk: soon(loop, tell, Made(take, chunk.index, chunk.segments[0], chunk.spans)),
        on_end=lambda error: soon(loop, tell, Ended(take, error)),
        allowed=0,
    )


def soon(loop: asyncio.AbstractEventLoop, call: Callable[..., object], *arguments: object) -> None:
    """Have an event loop make a call, from another thread; a closed one makes none."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(call, *arguments)


def made_before(folder: RunFolder) -> tuple[int, dict[int, ScheduledPrompt]]:
    """How many chunks are on disk, those denoised but not finished among them; and the prompts that they were made of,
    each by the first chunk that it holds in."""
    finished = folder.count()
    ahead = denoised_chunks.load(folder, finished)
    schedule = folder.current(folder.run.request).prompt_schedule
    if ahead and ahead[-1].schedule:
        schedule = ahead[-1].schedule
    chunks = finished + len(ahead)
    starts = [0, *accumulate(entry.chunks for entry in schedule)]
    prompts = zip(starts, schedule, strict=False)
    return chunks, {start: prompt for start, prompt in prompts if start < chunks}


def wait(handle: VideoHandle, seconds: float) -> None:
    """Until a video has ended, in whatever way."""
    with suppress(Exception, CancelledError):
        handle.result(seconds)
