"""All videos: the queue, who is made, and what an earlier server left. Each is made chunk by chunk in a run folder."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import CancelledError
from dataclasses import replace
from functools import partial
from pathlib import Path

from helios_cp.config.errors import RequestError
from helios_cp.generate.check import Session as CheckedCall
from launchers.driver.handle import VideoChunk, VideoHandle
from launchers.driver.pipeline import ChunkPipeline, PipelineError
from launchers.serve.flags import ServeCall
from launchers.serve.logs import Log
from launchers.serve.loras import Loras
from launchers.serve.metrics import Metrics
from launchers.serve.problems import Refusal
from launchers.serve.sessions.asked import request_of
from launchers.serve.sessions.maker import open_run, soon
from launchers.serve.uploads.kinds import PICTURE
from launchers.serve.uploads.uploads import Uploads
from launchers.serve.videos.fields import Body
from launchers.serve.videos.record import FILE, Record

LOOK_SECONDS = 60.0
"""Between two looks for videos that are kept no longer."""


class Videos:
    """By id, in the order they came; all but threads that wait for the pipeline belongs to the event loop.

    As many are made at a time as there are groups of ranks; live sessions have places of their own beside them.
    """

    def __init__(
        self, call: ServeCall, checked: CheckedCall, loras: Loras, uploads: Uploads, log: Log, metrics: Metrics
    ) -> None:
        self.folder = call.data / "videos"
        self._call, self._checked, self._loras, self._uploads = call, checked, loras, uploads
        self._log, self._metrics = log, metrics
        self._pipeline: ChunkPipeline | None = None
        self._records: dict[str, Record] = {}
        self._making: dict[str, asyncio.Task[None]] = {}
        self._handles: dict[str, VideoHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._arriving = 0
        self._is_draining = False

    def __iter__(self) -> Iterator[Record]:
        return iter(tuple(self._records.values()))

    @property
    def model(self) -> str:
        """As it is told: of a folder, its name."""
        model = self._checked.model
        return Path(model).name if os.path.isabs(model) else model

    def find(self, video_id: str) -> Record:
        """Raises `Refusal`."""
        if video_id not in self._records:
            raise Refusal("not_found", f"video {video_id[:64]!r}: there is no such video", param="video_id")
        return self._records[video_id]

    async def create(self, body: Body) -> Record:
        """A new video at the end of the queue, on disk. Raises `Refusal`, and leaves nothing then."""
        if self._is_draining:
            raise Refusal("busy", "the server is shutting down; try again in a moment")
        if body.model not in (None, self.model, self._checked.model, self._call.model):
            raise Refusal("not_found", f"model {body.model!r}: this server has {self.model}", param="model")
        waiting = self._arriving + sum(not each.is_finished for each in self)
        if waiting >= self._call.groups + self._call.queue:
            raise Refusal("busy", f"{waiting} videos wait already; try again later")
        request = request_of(body.values, self._call, self._checked.checkpoint, self._loras).request
        video_id = f"video_{secrets.token_hex(16)}"
        record = Record(video_id, self.folder / video_id, request, self.model, time.time())
        self._arriving += 1
        try:
            if body.reference is not None:
                least = request.frames_per_chunk
                given = await self._uploads.keep(body.reference, record.folder, "input_reference", body.kinds, least)
                start = {"image" if given.kind == PICTURE else "video": str(given.path.absolute())}
                record.request = replace(request, **start)
            await asyncio.to_thread(record.save)
        except BaseException:
            shutil.rmtree(record.folder, ignore_errors=True)
            raise
        finally:
            self._arriving -= 1
        self._records[video_id] = record
        self._log.event("video.created", video=video_id, chunks=request.num_chunks, prompt=request.prompt[0])
        self._admit()
        return record

    async def delete(self, record: Record) -> None:
        """It is gone at once; its work is stopped, and then its files go."""
        (record.folder / FILE).unlink(missing_ok=True)
        del self._records[record.id]
        self._log.event("video.deleted", video=record.id)
        self._spawn(self._remove(record))

    def restore(self) -> None:
        """Take up the videos of an earlier server; those that are not finished wait for the workers."""
        records = []
        for folder in self.folder.glob("video_*"):
            try:
                records.append(Record.load(folder))
            except ValueError as error:
                if (folder / FILE).exists():
                    self._log.fault("video.unreadable", error, video=folder.name)
                else:
                    shutil.rmtree(folder, ignore_errors=True)
        for record in sorted(records, key=lambda each: each.created_at):
            self._records[record.id] = record
            if record.is_finished:
                self._set_expiry(record)
                shutil.rmtree(record.run, ignore_errors=True)

    def opened(self, pipeline: ChunkPipeline) -> None:
        """The workers are loaded."""
        self._pipeline = pipeline
        self._admit()
        self._spawn(self._look_after())

    async def drain(self) -> None:
        """Leave everything as it stands on disk to the next start."""
        self._is_draining = True
        for task in (*self._tasks, *self._making.values()):
            task.cancel()

    def _admit(self) -> None:
        """Have videos made in order, as many as may be at a time."""
        if self._pipeline is None or self._is_draining:
            return
        for record in self:
            if len(self._making) >= self._call.groups:
                return
            if not record.is_finished and record.id not in self._making:
                task = asyncio.get_running_loop().create_task(self._make(record))
                self._making[record.id] = task

    async def _make(self, record: Record) -> None:
        try:
            await self._make_chunks(record)
            record.status = "completed"
        except (CancelledError, PipelineError):
            self._is_draining |= record.id in self._records  # not deleted: the pipeline ends
            return
        except Exception as error:
            if self._has_pipeline_ended():
                self._is_draining = True
                return
            reason = str(Refusal.of(error)) if isinstance(error, RequestError) else "the server's log says why"
            self._log.fault("video.failed", error, video=record.id)
            record.status, record.error = "failed", {"code": "failed", "message": reason}
        finally:
            self._handles.pop(record.id, None)
            del self._making[record.id]
            self._admit()
        record.completed_at = time.time()
        self._set_expiry(record)
        if record.id in self._records:
            await asyncio.to_thread(record.save)
            await asyncio.to_thread(shutil.rmtree, record.run, ignore_errors=True)
            seconds = record.completed_at - record.created_at
            self._log.event("video.finished", video=record.id, status=record.status, seconds=round(seconds, 3))

    async def _make_chunks(self, record: Record) -> None:
        """Go on where the run folder stands. Raises what ends the video early."""
        folder = await asyncio.to_thread(open_run, self._checked, record.request, record.run)
        record.chunks, record.status = folder.count(), "in_progress"
        await asyncio.to_thread(record.save)
        if record.chunks == record.request.num_chunks:
            await asyncio.to_thread(folder.join, [record.file])
            return
        loop = asyncio.get_running_loop()
        ended: asyncio.Queue[BaseException | None] = asyncio.Queue()
        handle = await asyncio.to_thread(
            self._pipeline.submit,
            record.request,
            folder=folder,
            output=[record.file],
            on_chunk=partial(soon, loop, self._chunk, record),
            on_end=partial(soon, loop, ended.put_nowait),
        )
        self._handles[record.id] = handle
        if record.id not in self._records:  # deleted meanwhile
            handle.cancel()
        error = await ended.get()
        if error is not None:
            raise error

    def _chunk(self, record: Record, chunk: VideoChunk) -> None:
        record.chunks = chunk.index + 1
        self._metrics.made({stage: span.end - span.begin for stage, span in chunk.spans.items()})

    def _has_pipeline_ended(self) -> bool:
        """Then the server ends with it, and its next start goes on."""
        try:
            self._pipeline.wait_until_ready(0)
        except Exception:
            return True
        return False

    async def _remove(self, record: Record) -> None:
        if record.id in self._handles:
            self._handles[record.id].cancel()
        while record.id in self._making:
            await asyncio.wait([self._making[record.id]])
        await asyncio.to_thread(shutil.rmtree, record.folder, ignore_errors=True)

    def _set_expiry(self, record: Record) -> None:
        """By the server's own flag of now, also for videos of an earlier server."""
        keep = self._call.keep
        ended = record.completed_at or record.created_at
        record.expires_at = None if keep is None else ended + 3600 * keep

    async def delete_expired(self, now: float) -> None:
        """Those that have been finished for longer than videos are kept; `now` in seconds since 1970."""
        for record in self:
            if record.expires_at is not None and record.expires_at < now:
                await self.delete(record)

    async def _look_after(self) -> None:
        while True:
            await self.delete_expired(time.time())
            await asyncio.sleep(LOOK_SECONDS)

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
