"""One video under way as one coroutine: text, then chunk after chunk, each decoded and written beside the next."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helios_cp.config.errors import RequestError
from helios_cp.pipeline.prompts import first_entry, prompt_mix
from helios_cp.sampling.state import ChunkState
from launchers.cluster.worker import Payload
from launchers.driver.crew import Crew
from launchers.driver.handle import VideoChunk, VideoHandle
from launchers.driver.submission import Submission
from launchers.messages.arrays import Array, StateArrays
from launchers.messages.messages import ChunkJob, NextStart, Schedule, Span, VideoFiles
from launchers.schedule.terms import Stage, Unit


@dataclass
class Made:
    """A denoised chunk: its latents, what the chunk after starts from, and the schedule that it was made of, if any.

    `before` is what it started from itself, where its frames are matched to those before.
    """

    latents: Payload
    before: Payload | None
    after: Payload
    schedule: Schedule
    spans: dict[str, Span] = field(default_factory=dict)


class Video:
    """Made by `run`, which the conductor's event loop runs as a task. All else is called in that loop, too.

    Chunks are counted with those of an earlier run: `denoised`; `ready`, handed to the handle; `delivered`, which for
    a stream means taken by its reader. At most `undelivered` chunks lie between denoising and delivery. `delivers` is
    called after each chunk that the handle gets.
    """

    def __init__(self, handle: VideoHandle, submission: Submission, crew: Crew, delivers: Callable[[], object]) -> None:
        self.handle = handle
        self.key = handle.key
        self.submission = submission
        self.request = submission.request
        self.chunks = submission.chunks
        self.admitted = asyncio.Event()
        self.is_wanted = False
        self.task: asyncio.Task[None] | None = None
        self._making: asyncio.Task[None] | None = None
        self.denoised = self.begun = submission.first + len(submission.denoised)
        self.ready = self.delivered = submission.first
        self._crew = crew
        self._delivers = delivers
        self._allowed = submission.allowed
        self._news = asyncio.Event()
        self._version = 0
        self._text: tuple[int, Payload] | None = None
        self._is_writing = submission.first > 0
        self._is_closed = False
        self._files = submission.files(self.key) if submission.writes else None

    @property
    def is_held(self) -> bool:
        """Whether nothing can go on before a stream's next chunk is taken, or another chunk is allowed."""
        if self.ready < self.begun:
            return False
        waits_for_reader = self.submission.streams and self.delivered < self.ready
        return waits_for_reader if self.begun == self.chunks or self._is_full else not self._is_allowed(self.begun)

    def change_prompt(self, prompt: str, transition: int | None, not_before: int = 0) -> int:
        """Returns the first chunk that shows it. Raises `RequestError`."""
        chunk = max(self.begun, not_before)
        if chunk >= self.chunks:
            raise RequestError(f"prompt {prompt!r}: the last chunk has begun; none can show it")
        self.request = self.request.with_change(chunk, prompt, transition)
        self._version += 1
        return chunk

    def allow(self, chunks: int) -> None:
        """See `VideoHandle.allow`."""
        self._allowed = chunks
        self._news.set()

    def stop(self) -> None:
        """No further chunk begins, and the video does not wait for what the next one needed."""
        self.chunks = self.begun
        self.admitted.set()
        if self._making is not None and self.denoised == self.begun:
            self._making.cancel()
        self._news.set()

    def cancel(self) -> None:
        self.task.cancel()

    def wanted(self) -> None:
        """Somebody waits for the chunks of a stream."""
        self.is_wanted = True

    def taken(self) -> None:
        """A chunk is delivered."""
        self.delivered += 1
        self._news.set()

    async def run(self) -> None:
        """Returns when all chunks are delivered. Raises what ends the video early."""
        await self.admitted.wait()
        error: Exception | None = None
        try:
            async with asyncio.TaskGroup() as finishing:
                self._making = finishing.create_task(self._make_chunks(finishing))
        except ExceptionGroup as errors:
            error = errors.exceptions[0]  # it had the other chunks cancelled
        if error is not None:
            raise error
        if self._is_writing and not self._is_closed:  # it was stopped after a chunk that was not the last
            await self._work(Stage.WRITE, self.ready, "close", lambda: [self._files])
        while self.delivered < self.chunks:
            await self._some_news()

    def files_left_open(self) -> VideoFiles | None:
        """What `VideoWriter.close` needs for a video that ends early; `None` if it has no files yet."""
        return self._files if self._is_writing else None

    # Chunks

    async def _make_chunks(self, finishing: asyncio.TaskGroup) -> None:
        if self.submission.first == self.chunks:  # stopped before it began
            return
        before, last, index = await self._start(), None, self.submission.first
        for kept in self.submission.denoised:
            after = Payload.put(_start_from(kept.after))
            made = Made(Payload.put(Array.of(kept.latents)), self._to_match(before), after, kept.schedule)
            before = after
            last = finishing.create_task(self._finish(index, made, last))
            index += 1
        while made := await self._denoise(index, before):
            before = made.after
            self.denoised += 1
            last = finishing.create_task(self._finish(index, made, last))
            index += 1

    async def _start(self) -> Payload | None:
        """What the first chunk starts from; `None` for a video that starts from nothing."""
        if self.submission.state is not None:
            return Payload.put(_start_from(self.submission.state))
        if not self.submission.starts:
            return None
        media = Path(self.request.image or self.request.video)
        (before,) = await self._work(Stage.START, 0, "start", lambda: [self.request, media.read_bytes()])
        return before

    async def _denoise(self, chunk: int, before: Payload | None) -> Made | None:
        """`None` after the last chunk."""
        found: Sequence[Payload] = ()
        while not found:  # while the chunk waits for a worker its prompt may change, and whether it may begin
            while not self._may_begin(chunk):
                if chunk >= self.chunks:
                    return None
                await self._some_news()
            version, request = self._version, self.request
            text = await self._encoded(version, chunk)

            def arguments(version: int = version, text: Payload = text) -> list[Any] | None:
                if version != self._version or not self._may_begin(chunk):
                    return None
                self.begun = chunk + 1
                return [ChunkJob(self.key, version, self.request), text, before]

            found = await self._work(Stage.DENOISE, chunk, "denoise", arguments, results=2)
        schedule, span = request.prompt_schedule, found[0].value.span
        made = Made(found[1], self._to_match(before), found[0], schedule, {"denoise": span})
        if self.submission.folder is not None:  # saved at once, so that a killed driver need not denoise it again
            saved = [self.submission.folder, chunk, made.latents, made.after, made.schedule]
            self._crew.errand(self._crew.workers["writer"], "keep", saved)
        return made

    def _to_match(self, before: Payload | None) -> Payload | None:
        """What decoding needs of a chunk's start."""
        return before if self.request.match_seams else None

    async def _encoded(self, version: int, chunk: int) -> Payload:
        """What a chunk, and those after it, show of the request now."""
        if self._text is None or self._text[0] != version:
            arguments = [self.request, self.submission.is_guided, first_entry(self.request, chunk)]
            (text,) = await self._work(Stage.TEXT, version, "encode", lambda: arguments)
            self._text = version, text
        return self._text[1]

    async def _finish(self, chunk: int, made: Made, chunk_before: asyncio.Task[None] | None) -> None:
        """Decode a chunk; then, after the chunk before, write it and hand it to the handle."""
        submission, frames = self.submission, None
        if submission.decodes:
            decoding = [made.latents, self.request.fps, made.before, submission.writes, submission.streams]
            decoded, frames = await self._work(Stage.DECODE, chunk, "decode", lambda: decoding, results=2)
            made.spans["decode"] = decoded.value.span
        if chunk_before is not None:
            await chunk_before
        if submission.writes:
            latents = made.latents if submission.folder or submission.latents else None
            after = made.after if submission.folder else None

            def writing() -> list[Any]:
                self._is_closed = chunk + 1 == self.chunks
                return [self._files, chunk, self._is_closed, decoded, latents, after, made.schedule]

            if not self._is_writing and submission.folder is None:
                self._files.chunks.remove()  # what a killed call left
            self._is_writing = True
            (written,) = await self._work(Stage.WRITE, chunk, "write", writing)
            made.spans["write"] = written.value.span
        self.ready += 1
        pixels = None if frames is None else frames.value
        segments = tuple(each.tobytes() for each in decoded.value.segments) if submission.writes else ()
        mix = self._mix(made.schedule, chunk)
        self.handle.deliver(VideoChunk(chunk, made.latents.value.values, pixels, made.spans, segments, mix))
        if not submission.streams:
            self.taken()
        self._delivers()

    def _mix(self, schedule: Schedule, chunk: int) -> tuple[tuple[str, float], ...]:
        if not schedule:
            return tuple((prompt, 1.0) for prompt in self.submission.request.prompt)
        found = prompt_mix(schedule, self.request.interpolation_steps, chunk)
        return tuple((schedule[index].prompt, share) for index, share in found)

    async def _work(self, stage: Stage, chunk: int, *call: Any, results: int = 1) -> list[Payload]:
        return await self._crew.work(Unit(self.key, stage, chunk), *call, results=results)

    @property
    def _is_full(self) -> bool:
        return self.denoised - self.delivered >= self._crew.limits.undelivered

    def _is_allowed(self, chunk: int) -> bool:
        return self._allowed is None or chunk < self._allowed

    def _may_begin(self, chunk: int) -> bool:
        """Or be handed to a worker again."""
        has_begun = chunk < self.begun
        return has_begun or (chunk < self.chunks and not self._is_full and self._is_allowed(chunk))

    async def _some_news(self) -> None:
        """Wait for a delivery, `allow` or `stop`."""
        self._news.clear()
        await self._news.wait()


def _start_from(state: ChunkState) -> NextStart:
    return NextStart(StateArrays.of(state), Span(0, 0, {}))
