"""The thread that makes the videos: an event loop with one task a video. Other threads reach it by calls left there.

It needs nothing of Ray but what `Worker` does, so tests give it workers of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

from helios_cp.config.errors import RequestError
from launchers.cluster.faults import one_line
from launchers.cluster.worker import Worker
from launchers.driver.crew import Crew
from launchers.driver.handle import VideoHandle
from launchers.driver.status import picture
from launchers.driver.submission import Submission
from launchers.driver.video import Video
from launchers.schedule.terms import Limits, Stage, Unit
from launchers.workers.writer import VideoWriter

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

REFRESH = 1.0
"""Seconds between two pictures of the status."""

CLOSING_SECONDS = 30.0
"""For the writer to finish its files when everything ends; then it is killed, and they are finished here."""


class ClosedError(RuntimeError):
    """Nobody makes videos any more."""

    def __init__(self) -> None:
        super().__init__("the pipeline is closed; make another one")


async def end_tasks() -> None:
    """End what still waits in this loop, say for the answer of a worker that is stopped: asyncio would print each."""
    waiting = asyncio.all_tasks() - {asyncio.current_task()}
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


class Conductor:
    """Makes videos with `workers`, which tell their news to `tell`; `show` gets a picture of the status now and then.

    `fatal` is the error that ended the pipeline. See `Crew` for `decodes_in_groups`.
    """

    def __init__(self, model: str, limits: Limits, decodes_in_groups: bool, show: Callable[[dict], object]) -> None:
        self.model = model
        self.crew = Crew(limits, decodes_in_groups, self._fail_all)
        self.fatal: BaseException | None = None
        self._show = show
        self._videos: dict[int, Video] = {}
        self._endings: set[asyncio.Task[None]] = set()
        self._delivered: deque[float] = deque(maxlen=1000)
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._is_closing = False
        self._closing, self._over = asyncio.Event(), asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="chunk pipeline", daemon=True)

    def start(self, workers: Mapping[str, Worker]) -> None:
        """Start the workers, and the thread."""
        self.crew.start(workers)
        self._thread.start()

    # For any thread

    def wait_until_ready(self, timeout: float | None = None) -> None:
        """Until every worker is loaded. Raises what keeps one from it, such as a lack of resources, `TimeoutError`, and
        `ClosedError`."""
        if not self.crew.has_started.wait(timeout):
            raise TimeoutError(f"the workers are not loaded after {timeout:g} s")
        if self.fatal is not None:
            raise self.fatal
        if self._is_closing:
            raise ClosedError

    def add(self, handle: VideoHandle, submission: Submission) -> None:
        """Raises `ClosedError`."""
        if not self._post(self._add, handle, submission):
            raise ClosedError

    def status(self) -> dict[str, Any]:
        """What `launchers.status` shows; see `status.picture`. Raises `ClosedError`."""
        is_own = threading.current_thread() is self._thread
        return self._picture() if is_own else self._ask(self._picture).result()

    def post(self, key: int, call: Callable[[Video], object]) -> None:
        """Have the thread make a call with a video, unless it has ended. Others may begin by what has changed."""

        def change() -> None:
            if key in self._videos:
                call(self._videos[key])
                self._admit()

        self._post(change)

    def change_prompt(self, key: int, prompt: str, transition: int | None, not_before: int = 0) -> Future[int]:
        def change() -> int:
            if key not in self._videos:
                raise RequestError(f"prompt {prompt!r}: video {key} has ended; no chunk can show it")
            return self._videos[key].change_prompt(prompt, transition, not_before)

        return self._ask(change)

    def tell(self, worker: Worker, life: int, event: str, value: Any) -> None:
        """News of a worker; see `Worker`."""
        self._post(self.crew.told, worker, life, event, value)

    def close(self) -> None:
        """End all videos, and then the workers."""
        with self._lock:  # calls that were left before this one are made before the end
            if not self._is_closing:
                self._is_closing = True
                self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()

    def _ask(self, call: Callable[[], Answer]) -> Future[Answer]:
        """Have the thread make a call, and answer what it returns or raises; `ClosedError` where it cannot."""
        answer: Future[Answer] = Future()

        def look() -> None:
            try:
                answer.set_result(call())
            except Exception as error:
                answer.set_exception(error)

        if not self._post(look):
            answer.set_exception(ClosedError())
        return answer

    def _post(self, call: Callable[..., object], *arguments: Any) -> bool:
        """Have the thread make a call. Returns whether it will, which it does until the pipeline is closed."""
        with self._lock:
            if not self._is_closing:
                self._loop.call_soon_threadsafe(self._make_call, call, *arguments)
            return not self._is_closing

    # The thread

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._make_videos())
        finally:
            self._loop.run_until_complete(end_tasks())
            self._loop.close()

    async def _make_videos(self) -> None:
        showing = asyncio.create_task(self._show_status())
        await self._closing.wait()
        showing.cancel()
        self._end_all()
        while self._endings:
            await asyncio.wait(self._endings)
        for worker in self.crew.workers.values():
            worker.stop()
        while self.crew.in_hand:  # they fail now
            await asyncio.wait(self.crew.in_hand)

    def _make_call(self, call: Callable[..., object], *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as error:
            logger.exception("the pipeline fails")
            self._fail_all(error)

    def _add(self, handle: VideoHandle, submission: Submission) -> None:
        if self.fatal is not None:
            handle.end(self.fatal)
            return
        video = Video(handle, submission, self.crew, self._delivers)
        self._videos[video.key] = video
        video.task = asyncio.create_task(video.run())
        ending = asyncio.create_task(self._see_through(video))
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)
        self._admit()

    def _admit(self) -> None:
        """Let videos begin in order: any while there is room. Those that somebody waits for, or that wait for nobody,
        begin even beside streams that nobody reads now."""
        under_way = [video for video in self._videos.values() if video.admitted.is_set()]
        count, busy = len(under_way), sum(not video.is_held for video in under_way)
        most = self.crew.limits.active
        for video in self._videos.values():
            goes_on = video.is_wanted or not video.submission.streams
            if not video.admitted.is_set() and busy < most and (count < most or goes_on):
                video.admitted.set()
                count, busy = count + 1, busy + 1

    def _delivers(self) -> None:
        """A video has given a chunk to its handle, and may now have to wait for its reader."""
        self._delivered.append(time.monotonic())
        self._admit()

    # Ends

    async def _see_through(self, video: Video) -> None:
        """Wait for the end of a video, have its files finished, and tell its handle."""
        await asyncio.wait([video.task])
        if video.task.cancelled():
            error = self.fatal or CancelledError(f"video {video.key} was cancelled")
        else:
            error = video.task.exception()
        if error is not None:
            traceback.clear_frames(error.__traceback__)  # their variables would keep the video's chunks in memory
            await self._finish_files(video)
        del self._videos[video.key]
        self.crew.forget(video.key)
        if error is None:
            video.handle.finish(video.chunks, video.submission.output)
        else:
            video.handle.end(error)
        self._admit()

    async def _finish_files(self, video: Video) -> None:
        """Finish the files of a video that ended early with what they have, once nothing of it is in hand; at once
        when the pipeline itself is over."""
        in_turn = asyncio.create_task(self._finish_in_turn(video))
        over = asyncio.create_task(self._over.wait())
        await asyncio.wait((in_turn, over), return_when=asyncio.FIRST_COMPLETED)
        over.cancel()
        if in_turn.cancel():  # it was not done
            await self._finish_at_once(video)
        elif in_turn.exception() is not None:
            _warn(video, in_turn.exception())

    async def _finish_in_turn(self, video: Video) -> None:
        await self.crew.settled(video.key)
        left = video.files_left_open()
        if left is not None:
            await self.crew.work(Unit(video.key, Stage.WRITE, video.ready), "close", lambda: [left])

    async def _finish_at_once(self, video: Video) -> None:
        """By the writer, or in this process if there is none or it does not answer."""
        left, writer = video.files_left_open(), self.crew.workers["writer"]
        if left is None:
            return
        if writer.is_ready:
            with contextlib.suppress(Exception):  # it may hang or be lost, and so may the cluster itself
                await asyncio.wait_for(writer.call("close", [left]), CLOSING_SECONDS)
                return
        writer.stop()
        try:
            VideoWriter().close(left)
        except Exception as error:
            _warn(video, error)

    def _fail_all(self, error: BaseException) -> None:
        if self.fatal is None and not self._over.is_set():
            self.fatal = error
            self._end_all()

    def _end_all(self) -> None:
        """Every video ends with `fatal`, or as cancelled; what is finished of its files can be played."""
        self.crew.is_over = True
        self._over.set()
        for video in self._videos.values():
            video.task.cancel()
        self.crew.has_started.set()

    # Status

    async def _show_status(self) -> None:
        while True:
            try:
                self._show(self._picture())
            except Exception as error:  # no video depends on it
                logger.warning("the status cannot be shown: %s", one_line(error))
            await asyncio.sleep(REFRESH)

    def _picture(self) -> dict[str, Any]:
        return picture(self.model, self.crew, self._videos, self._delivered)


def _warn(video: Video, error: BaseException) -> None:
    names = ", ".join(str(path) for path in video.submission.output)
    logger.warning("%s cannot be finished: %s", names, one_line(error))
