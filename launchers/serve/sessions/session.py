"""One live session: its states, what its controller may do, and who follows it. All of it runs in the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

from helios_cp.files.mp4 import join_segments
from helios_cp.generate.check import Session as CheckedCall
from launchers.driver.pipeline import ChunkPipeline, PipelineError
from launchers.serve.logs import Log
from launchers.serve.media.audience import Audience, Follower
from launchers.serve.media.store import MediaStore
from launchers.serve.metrics import Metrics
from launchers.serve.problems import Refusal
from launchers.serve.sessions import telling
from launchers.serve.sessions.maker import Maker
from launchers.serve.sessions.pacer import Pacer
from launchers.serve.sessions.recording import Change, Recording, Take, with_change

BEGIN_SECONDS = 15.0
"""How long a request of a controller waits for a session that is about to run. The server answers no ping of it
meanwhile, so a longer wait would look like a lost connection."""


class Session:
    """`queued` → `running` ⇄ `paused` → `done`. What is asked twice changes nothing.

    `on_end` is called once it is done, or failed. Chunks are counted over all takes. Methods raise `Refusal`.
    """

    def __init__(
        self, recording: Recording, store: MediaStore, on_end: Callable[[Session], object], log: Log, metrics: Metrics
    ) -> None:
        self.recording = recording
        self.store = store
        self.audience = Audience()
        self.pacer = Pacer(store, recording.lead)
        self.controller: Follower | None = None
        self.watched = time.monotonic()
        self._on_end = on_end
        self._log, self._metrics = log, metrics
        self._maker = Maker(recording, store, self.pacer, self._shown, self._finish)
        self._changing = asyncio.Lock()
        self._joining = asyncio.Lock()
        self._stopping = ""
        self._has_begun = asyncio.Event()

    @property
    def id(self) -> str:
        return self.recording.id

    @property
    def state(self) -> str:
        return self.recording.state

    @property
    def is_done(self) -> bool:
        return self.state == "done"

    # The way of a session

    async def begin(self, pipeline: ChunkPipeline, checked: CheckedCall) -> None:
        """Leave the queue; or go on at the next chunk after a start of the server. Raises `RequestError`."""
        recording = self.recording
        if not recording.takes:
            recording.takes.append(Take(0, recording.request.seeds[0], recording.request.prompt[0]))
        if recording.state == "queued":
            recording.state = "running"
        self.pacer.is_paused = recording.state == "paused"
        await self._maker.begin(pipeline, checked)
        self._has_begun.set()
        self.tell_state()

    def _shown(self, metadata: Mapping[str, Any]) -> None:
        self._metrics.made(metadata["seconds"], metadata["fps"])
        self._metrics.shown(self.id, metadata["started"], time.monotonic())
        self.audience.wake()

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
        self._maker.cancel()
        self._has_begun.set()
        recording = self.recording
        recording.state, recording.why, recording.ended = "done", why, time.time()
        if recording.takes:
            recording.takes[-1].chunks = len(self.store.chunks) - recording.takes[-1].first_chunk
        await self._maker.save()
        self.store.write_playlist(is_finished=True)
        self.tell_state()
        self.audience.say(telling.done(self.recording, self.store))
        self.audience.end(1000, why)
        self._on_end(self)

    def leave_to_next_start(self) -> None:
        self._maker.rest()

    # What its controller does

    async def change(self, event_id: str, prompt: str, transition: int) -> Change:
        """From the next chunk on that no worker has yet, show another prompt. The same event gets the same answer."""
        async with self._changing:
            known = next((each for each in self.recording.changes if each.event_id == event_id), None)
            if known is not None:
                if (known.prompt, known.transition) != (prompt, transition):
                    raise Refusal("event_id_conflict", f"event {event_id}: another change has this id; give a new one")
                return known
            await self._can_be_steered("change its prompt")
            self._metrics.received(self.id, event_id, time.monotonic())
            change = Change(
                event_id, prompt, transition, self._maker.take, await self._maker.change(prompt, transition)
            )
            self.recording.changes = with_change(self.recording.changes, change)
            await self._maker.save()
            return change

    async def pause(self) -> None:
        """Let no further chunk begin; one in hand still comes."""
        await self._can_be_steered("pause it")
        if self.state == "running":
            self.pacer.pause()
            await self._set_state("paused")

    async def resume(self) -> None:
        await self._can_be_steered("resume it")
        if self.state == "paused":
            self.pacer.resume()
            await self._set_state("running")

    async def step(self) -> None:
        """While paused, one chunk more."""
        await self._can_be_steered("step it")
        if self.state != "paused":
            raise Refusal("invalid_request", "only a paused session can be stepped; send session.pause first")
        self.pacer.step()
        self.tell_state()

    async def reset(self, seed: int | None, prompt: str | None) -> None:
        """Begin again in the same session, from a seed and a prompt; by default from those of now."""
        async with self._changing:
            await self._can_be_steered("reset it")
            self.pacer.is_paused, self.recording.state = False, "running"
            await self._maker.reset(seed, prompt)
        self.tell_state()

    async def stop(self, why: str = "stopped") -> None:
        """Finish the chunks that have begun, and end."""
        if self.is_done or self._stopping:
            return
        self._stopping = why
        if self._maker.is_steered:
            self._maker.stop()
        else:
            await self.end(why)

    async def abandon(self, patience: float) -> None:
        """End at once, and wait until nobody writes in its folder."""
        self._stopping = self._stopping or "deleted"
        await self.end("deleted")
        await self._maker.wait(patience)

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
        """What a list of sessions says of it. No prompt: a list is for whoever keeps the server."""
        recording, store = self.recording, self.store
        return {
            "id": self.id,
            "state": self.state,
            "why": recording.why,
            "created": recording.created,
            "chunks": len(store.chunks),
            "frames": store.frames,
            "seconds": store.seconds,
            "takes": len(recording.takes),
            "lead": recording.lead,
            "viewers": len(self.audience),
            "has_controller": self.controller is not None,
            "waits_for_controller": self.pacer.is_held,
        }

    def tell_state(self) -> None:
        self.audience.say(telling.state(self.recording, self.store))

    async def _set_state(self, state: str) -> None:
        self.recording.state = state
        await self._maker.save()
        self.tell_state()

    async def _can_be_steered(self, what: str) -> None:
        """Waits for a session that has just left the queue, and for one whose server has just started again."""
        if self.state == "queued":
            raise Refusal("busy", f"the session waits in the queue; {what} once it runs")
        if not self._stopping:
            try:
                await asyncio.wait_for(self._has_begun.wait(), BEGIN_SECONDS)
            except TimeoutError:
                raise Refusal("busy", f"the session does not run yet; {what} in a moment") from None
        if self.is_done or self._stopping:
            raise Refusal("not_started", f"the session has ended; start another one to {what}")
