"""Has the takes of a session made, one after the other, and shows each chunk as soon as it is on disk."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from helios_cp.config.errors import RequestError
from helios_cp.config.request import Request, ScheduledPrompt
from helios_cp.device.device import dtype_name
from helios_cp.generate.check import Session as CheckedCall
from helios_cp.generate.check import check_same_run
from helios_cp.generate.run_folder import Run, RunFolder
from launchers.driver.handle import VideoHandle
from launchers.driver.pipeline import ChunkPipeline
from launchers.messages.messages import Span
from launchers.serve.media.store import MediaStore
from launchers.serve.problems import Refusal
from launchers.serve.sessions import telling
from launchers.serve.sessions.pacer import Pacer
from launchers.serve.sessions.recording import Recording, Take
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
    """Until a video has ended, in whatever way. In the thread that calls it: asyncio takes a `CancelledError` that a
    thread raises for a cancellation of its own task."""
    with suppress(Exception):
        handle.result(seconds)


class Maker:
    """`on_chunk` is called with the metadata of each chunk that is shown; `on_end` when no more come, with the error
    that ended them. It belongs to the event loop."""

    def __init__(
        self,
        recording: Recording,
        store: MediaStore,
        pacer: Pacer,
        on_chunk: Callable[[Mapping[str, Any]], object],
        on_end: Callable[[BaseException | None], Awaitable[None]],
    ) -> None:
        self._recording, self._store, self._pacer = recording, store, pacer
        self._on_chunk, self._on_end = on_chunk, on_end
        self._handle: VideoHandle | None = None
        self._handles: list[VideoHandle] = []
        self._news: asyncio.Queue[Made | Ended] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._writing = asyncio.Lock()
        self._saving = asyncio.Lock()
        self._is_stopping = self._is_over = False

    @property
    def is_steered(self) -> bool:
        """Whether a video is there that can be changed."""
        return self._handle is not None

    @property
    def take(self) -> int:
        return len(self._recording.takes) - 1

    async def save(self) -> None:
        """The recording as it is now, and no older one after it."""
        async with self._saving:
            await asyncio.to_thread(self._recording.write, self._recording.to_json())

    async def begin(self, pipeline: ChunkPipeline, checked: CheckedCall) -> None:
        """The first take, or the last one at its next chunk. Raises `RequestError`."""
        self._pipeline, self._checked = pipeline, checked
        await self.save()
        self._tasks = [asyncio.create_task(self._publish()), asyncio.create_task(self._pacer.run())]
        await self._begin_take()

    async def reset(self, seed: int | None, prompt: str | None) -> None:
        """End this take where it stands, and begin the next. Raises `Refusal`."""
        recording = self._recording
        async with self._writing:
            begun, chunks = recording.takes[-1], len(self._store.chunks)
            if chunks >= recording.request.num_chunks:
                raise Refusal("limit", "the session has its last chunk; start another one")
            self._handle.cancel()
            begun.chunks = chunks - begun.first_chunk
            shown = recording.prompt_at(self.take, chunks)
            seed, prompt = begun.seed if seed is None else seed, shown if prompt is None else prompt
            recording.takes.append(Take(chunks, seed, prompt))
        await self.save()
        await self._begin_take()

    async def change(self, prompt: str, transition: int, not_before: int = 0) -> int:
        """The first chunk of the session that shows it. Raises `Refusal`."""
        first = self._recording.takes[-1].first_chunk
        try:
            asked = self._handle.change_prompt(prompt, transition=transition, not_before=not_before - first)
            return first + await asyncio.wrap_future(asked)
        except RequestError as error:  # the last chunk has begun
            raise Refusal("limit", str(error)) from None

    def stop(self) -> None:
        """Finish what has begun."""
        self._is_stopping = True
        if self._handle is not None:
            self._handle.stop()

    def cancel(self) -> None:
        """Make no more, for good."""
        self._is_over = True
        if self._handle is not None:
            self._handle.cancel()
        self.rest()

    def rest(self) -> None:
        """Do no more here: the next start of the server goes on."""
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()

    async def wait(self, patience: float) -> None:
        """Until nobody writes in the folders of the takes."""
        for handle in self._handles:
            await asyncio.to_thread(wait, handle, patience)

    async def _begin_take(self) -> None:
        take, begun = self.take, self._recording.takes[-1]
        path = self._recording.run_folder(take)
        folder = await asyncio.to_thread(open_run, self._checked, self._request_of(begun), path)
        made, prompts = await asyncio.to_thread(made_before, folder)
        self._recording.add_unanswered({begun.first_chunk + start: prompt for start, prompt in prompts.items()})
        await self._take_up(folder)
        self._pacer.restart(begun.first_chunk)
        if folder.count() == folder.run.request.num_chunks:
            self._news.put_nowait(Ended(take, None))
            return
        tell = partial(soon, asyncio.get_running_loop(), self._news.put_nowait)
        self._handle = await asyncio.to_thread(
            self._pipeline.submit,
            folder.run.request,
            folder=folder,
            output=[video_of(path)],
            on_chunk=lambda chunk: tell(Made(take, chunk.index, chunk.segments[0], chunk.spans)),
            on_end=lambda error: tell(Ended(take, error)),
            allowed=0,  # until the pacer lets it go on
        )
        self._handles.append(self._handle)
        if self._is_over:  # meanwhile
            self._handle.cancel()
        elif self._is_stopping:
            self._handle.stop()
        else:
            # A chunk that was in hand when the server was killed is made again, and shows none that came meanwhile.
            for each in self._recording.changes_from(begun.first_chunk + made):
                await self.change(each.prompt, each.transition, each.chunk)
            self._pacer.steer(self._handle)

    def _request_of(self, take: Take) -> Request:
        """A take may use the chunks that those before it have left."""
        request = self._recording.request
        frames = (request.num_chunks - take.first_chunk) * request.frames_per_chunk
        return replace(request, prompt=(take.prompt,), seed=(take.seed,), num_frames=frames)

    async def _take_up(self, folder: RunFolder) -> None:
        """Make the media of chunks that are in the run folder alone, as after a kill; all count as played."""
        first = self._recording.takes[-1].first_chunk
        for index in range(len(self._store.chunks) - first, folder.count()):
            segment = await asyncio.to_thread(folder.segment(index).read_bytes)
            await self._show(Made(self.take, index, segment, {}))
        if folder.count():
            self._pacer.skip()

    async def _publish(self) -> None:
        """Show chunk after chunk, and the end."""
        while True:
            news = await self._news.get()
            if news.take != self.take:  # what a reset left behind
                continue
            if isinstance(news, Ended):
                return await self._on_end(news.error)
            try:
                await self._show(news)
            except Exception as error:  # a full disk, say
                return await self._on_end(error)

    async def _show(self, made: Made) -> None:
        async with self._writing:
            number = len(self._store.chunks)
            if made.take != self.take or made.index != number - self._recording.takes[-1].first_chunk:
                return
            about = telling.chunk(self._recording, made.take, made.index, made.spans, number)
            metadata = await asyncio.to_thread(self._store.write, made.segment, about)
            self._pacer.waited()
            self._store.add(metadata)
        self._on_chunk(metadata)
        self._pacer.wake()
