"""One live session: its states, and what its controller may do. All of it runs in the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from typing import Any

from helios_cp.config.errors import RequestError
from helios_cp.config.request import Request
from helios_cp.files.mp4 import join_segments
from helios_cp.generate.check import Session as CheckedCall
from helios_cp.generate.run_folder import RunFolder
from launchers.driver.handle import VideoHandle
from launchers.driver.pipeline import ChunkPipeline, PipelineError
from launchers.serve.logs import Log
from launchers.serve.media.audience import Audience, Follower
from launchers.serve.media.store import MediaStore
from launchers.serve.metrics import Metrics
from launchers.serve.problems import Refusal
from launchers.serve.sessions import telling
from launchers.serve.sessions.changes import Change, superseded
from launchers.serve.sessions.pacer import Pacer
from launchers.serve.sessions.recording import Recording, Take
from launchers.serve.sessions.run import Ended, Made, open_run, planned, submit, wait


class Session:
    """`queued` → `running` ⇄ `paused` → `done`. What is asked twice changes nothing.

    `on_end` is called once it is done, or failed. Chunks are counted over all takes. Methods raise `Refusal`.
    """

    def __init__(
        self,
        recording: Recording,
        store: MediaStore,
        on_end: Callable[[Session], object],
        log: Log,
        metrics: Metrics,
    ) -> None:
        self.recording = recording
        self.store = store
        self.audience = Audience()
        self.pacer = Pacer(store, recording.lead)
        self.controller: Follower | None = None
        self.watched = time.monotonic()
        self._on_end = on_end
        self._log, self._metrics = log, metrics
        self._handle: VideoHandle | None = None
        self._handles: list[VideoHandle] = []
        self._news: asyncio.Queue[Made | Ended] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._changing = asyncio.Lock()
        self._writing = asyncio.Lock()
        self._joining = asyncio.Lock()
        self._stopping = ""

    @property
    def id(self) -> str:
        return self.recording.id

    @property
    def state(self) -> str:
        return self.recording.state

    @property
    def is_done(self) -> bool:
        return self.state == "done"

    @property
    def take(self) -> int:
        return len(self.recording.takes) - 1

    # The way of a session

    async def begin(self, pipeline: ChunkPipeline, checked: CheckedCall) -> None:
        """Leave the queue; or go on at the next chunk after a start of the server. Raises `RequestError`."""
        self._pipeline, self._checked = pipeline, checked
        recording = self.recording
        if not recording.takes:
            recording.takes.append(Take(0, recording.request.seeds[0], recording.request.prompt[0]))
        if recording.state == "queued":
            recording.state = "running"
        self.pacer.is_paused = recording.state == "paused"
        await asyncio.to_thread(recording.save)
        self._tasks = [asyncio.create_task(self._publish()), asyncio.create_task(self.pacer.run())]
        await self._begin_take()
        self.tell_state()

    async def _begin_take(self) -> None:
        take, begun = self.take, self.recording.takes[-1]
        path = self.recording.run_folder(take)
        folder = await asyncio.to_thread(open_run, self._checked, self._request_of(begun), path)
        await self._take_up(folder)
        self.pacer.restart(begun.first_chunk)
        if folder.count() == folder.run.request.num_chunks:
            self._news.put_nowait(Ended(take, None))
            return
        loop = asyncio.get_running_loop()
        self._handle = await asyncio.to_thread(submit, self._pipeline, folder, take, self._news.put_nowait, loop)
        self._handles.append(self._handle)
        await self._change_again(await asyncio.to_thread(planned, folder))
        self.pacer.steer(self._handle)

    def _request_of(self, take: Take) -> Request:
        """A take may use the chunks that those before it have left."""
        request = self.recording.request
        frames = (request.num_chunks - take.first_chunk) * request.frames_per_chunk
        return replace(request, prompt=(take.prompt,), seed=(take.seed,), num_frames=frames)

    async def _take_up(self, folder: RunFolder) -> None:
        """Make the media of chunks that are in the run folder alone, as after a kill; all count as played."""
        first = self.recording.takes[-1].first_chunk
        for index in range(len(self.store.chunks) - first, folder.count()):
            await self._show(Made(self.take, index, folder.segment(index).read_bytes(), {}))
        if folder.count():
            self.pacer.skip()

    async def _change_again(self, planned: Mapping[int, str]) -> None:
        """Changes that were accepted, and that no chunk on disk was made of before the server was killed."""
        first, count = self.recording.takes[-1].first_chunk, len(self.store.chunks)
        for number, each in enumerate(self.recording.changes):
            is_lost = each.take == self.take and each.superseded_by is None and each.chunk >= count
            if is_lost and planned.get(each.chunk - first) != each.prompt:
                chunk = await self._ask(each.prompt, each.transition)
                self.recording.changes[number] = replace(each, chunk=chunk)
        await asyncio.to_thread(self.recording.save)

    async def _publish(self) -> None:
        """Show chunk after chunk, and the end."""
        while True:
            news = await self._news.get()
            if news.take != self.take:  # what a reset left behind
                continue
            if isinstance(news, Ended):
                return await self._finish(news.error)
            try:
                await self._show(news)
            except (OSError, ValueError) as error:
                return await self._finish(error)

    async def _show(self, made: Made) -> None:
        async with self._writing:
            number = len(self.store.chunks)
            if made.take != self.take or made.index != number - self.recording.takes[-1].first_chunk:
                return
            about = telling.chunk(self.recording, made, number)
            metadata = await asyncio.to_thread(self.store.write, made.segment, about)
            self.pacer.waited()
            self.store.add(metadata)
        self._metrics.made(metadata["seconds"], metadata["fps"])
        self._metrics.shown(self.id, metadata["started"], time.monotonic())
        self.audience.wake()
        self.pacer.wake()

    async def _finish(self, error: BaseException | None) -> None:
        """No chunk comes any more."""
        if isinstance(error, CancelledError | PipelineError) and not self._stopping:
            return  # the server ends, and its next start goes on
        if error is not None and not self._stopping:
            self._log.fault("session.failed", error, session=self.id)
            self._stopping = "failed"
        await self.end(self._stopping or ("limit" if self.recording.is_endless else "finished"))

    async def end(self, why: str) -> None:
        """Done, for good."""
        if self.is_done:
            return
        if self._handle is not None:
            self._handle.cancel()
        recording = self.recording
        recording.state, recording.why, recording.ended = "done", why, time.time()
        if recording.takes:
            recording.takes[-1].chunks = len(self.store.chunks) - recording.takes[-1].first_chunk
        await asyncio.to_thread(recording.save)
        self.store.write_playlist(is_finished=True)
        self.tell_state()
        self.audience.say(telling.done(self.recording, self.store))
        self.audience.end(1000, why)
        self.leave_to_next_start()
        self._on_end(self)

    def leave_to_next_start(self) -> None:
        """Do no more here."""
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()

    # What its controller does

    async def change(self, event_id: str, prompt: str, transition: int) -> Change:
        """From the next chunk on that no worker has yet, show another prompt. The same event gets the same answer."""
        async with self._changing:
            known = next((each for each in self.recording.changes if each.event_id == event_id), None)
            if known is not None:
                if (known.prompt, known.transition) != (prompt, transition):
                    raise Refusal("event_id_conflict", f"event {event_id}: another change has this id; give a new one")
                return known
            self._check_running("change its prompt")
            self._metrics.received(self.id, event_id, time.monotonic())
            change = Change(event_id, prompt, transition, self.take, await self._ask(prompt, transition))
            self.recording.changes = [*superseded(self.recording.changes, change), change]
            await asyncio.to_thread(self.recording.save)
            return change

    async def _ask(self, prompt: str, transition: int) -> int:
        """The first chunk of the session that shows it. Raises `Refusal`."""
        try:
            chunk = await asyncio.wrap_future(self._handle.change_prompt(prompt, transition=transition))
        except RequestError as error:  # the last chunk has begun
            raise Refusal("limit", str(error)) from None
        return self.recording.takes[-1].first_chunk + chunk

    async def pause(self) -> None:
        """Let no further chunk begin; one in hand still comes."""
        self._check_running("pause it")
        if self.state == "running":
            self.pacer.pause()
            await self._set_state("paused")

    async def resume(self) -> None:
        self._check_running("resume it")
        if self.state == "paused":
            self.pacer.resume()
            await self._set_state("running")

    async def step(self) -> None:
        """While paused, one chunk more."""
        self._check_running("step it")
        if self.state != "paused":
            raise Refusal("invalid_request", "only a paused session can be stepped; send session.pause first")
        self.pacer.step()
        self.tell_state()

    async def reset(self, seed: int | None, prompt: str | None) -> None:
        """Begin again in the same session, from a seed and a prompt; by default from those of now."""
        async with self._changing:
            self._check_running("reset it")
            async with self._writing:
                begun, chunks = self.recording.takes[-1], len(self.store.chunks)
                if chunks >= self.recording.request.num_chunks:
                    raise Refusal("limit", "the session has its last chunk; start another one")
                self._handle.cancel()
                begun.chunks = chunks - begun.first_chunk
                shown = self.recording.prompt_at(self.take, chunks)
                self.recording.takes.append(
                    Take(chunks, begun.seed if seed is None else seed, shown if prompt is None else prompt)
                )
            self.pacer.is_paused, self.recording.state = False, "running"
            await asyncio.to_thread(self.recording.save)
            await self._begin_take()
        self.tell_state()

    async def stop(self, why: str = "stopped") -> None:
        """Finish the chunks that have begun, and end."""
        if self.is_done or self._stopping:
            return
        self._stopping = why
        if self._handle is None:
            await self.end(why)
        else:
            self._handle.stop()

    async def abandon(self, patience: float) -> None:
        """End at once, and wait until nobody writes in its folder."""
        self._stopping = self._stopping or "deleted"
        await self.end("deleted")
        for handle in self._handles:
            await asyncio.to_thread(wait, handle, patience)

    # Its files

    def schedule(self, take: int) -> dict[str, Any]:
        """What makes a take again; see `Recording.schedule`."""
        begun = self.recording.takes[take]
        chunks = len(self.store.chunks) - begun.first_chunk if begun.chunks is None else begun.chunks
        return self.recording.schedule(take, chunks)

    async def whole_video(self) -> Path:
        """An MP4 of all chunks so far, over all takes."""
        path = self.recording.folder / ("video.mp4" if self.is_done else "so-far.mp4")
        async with self._joining:
            if not (self.is_done and path.is_file()):
                segments = list(self.recording.segments(len(self.store.chunks)))
                await asyncio.to_thread(join_segments, segments, path)
        return path

    # Its followers

    def touch(self) -> None:
        """Somebody takes its files, so somebody watches."""
        self.watched = time.monotonic()

    def take_control(self, follower: Follower) -> None:
        """The newest controller steers; the one before is told to go."""
        if self.controller is not None:
            self.controller.end(1008, "another connection has taken control of this session")
        self.controller = follower
        self.audience.join(follower)
        self.pacer.reads(follower)

    def leave(self, follower: Follower) -> None:
        self.audience.leave(follower)
        self.watched = time.monotonic()
        if follower is self.controller:
            self.controller = None
            self.pacer.reads(None)

    def summary(self) -> dict[str, Any]:
        """What a list of sessions says of it."""
        told = {"viewers": len(self.audience), "has_controller": self.controller is not None}
        told["waits_for_controller"] = self.pacer.is_held
        return {**telling.summary(self.recording, self.store), **told}

    def tell_state(self) -> None:
        self.audience.say(telling.state(self.recording, self.store))

    async def _set_state(self, state: str) -> None:
        self.recording.state = state
        await asyncio.to_thread(self.recording.save)
        self.tell_state()

    def _check_running(self, what: str) -> None:
        if self.is_done or self._stopping:
            raise Refusal("not_started", f"the session has ended; start another one to {what}")
        if self._handle is None:
            raise Refusal("busy", f"the session waits in the queue; {what} once it runs")
