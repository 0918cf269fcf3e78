"""The thread that makes the videos: it owns the schedule, sends tasks to workers, and hears what became of them.

All that happens reaches it as a call in its queue. It keeps its own view of each result until the result is of no use
any more, so a lost machine takes with it the chunks that it had in hand, and no others. It needs nothing of Ray but
what `Worker` does, so tests give it workers of their own.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from typing import Any

from helios_cp.config.errors import CheckpointError, RequestError
from launchers.cluster.calls import Payload
from launchers.cluster.faults import PayloadLostError, WorkerLostError, one_line
from launchers.cluster.worker import Standing, Worker
from launchers.driver.mailbox import ClosedError, Mailbox
from launchers.driver.recovery import can_go_on_without, reason_to_give_up
from launchers.driver.status import picture
from launchers.driver.timeline import Event
from launchers.driver.video import Video
from launchers.driver.video_files import VideoFiles
from launchers.schedule.schedule import Schedule
from launchers.schedule.terms import Limits, Stage, Status, Task

logger = logging.getLogger(__name__)

MAX_EVENTS = 20_000
"""Of the timeline; older ones are dropped, so that a long run's memory stays flat."""

REFRESH = 1.0
"""Seconds between two pictures of the status."""


class PipelineError(RuntimeError):
    """The pipeline as a whole cannot go on; every video ends with it."""


class Conductor:
    """Makes videos with `workers`, which tell their news to `tell`; `show` gets a picture of the status now and then.

    `decodes_in_groups`: the denoisers decode too, in a thread of their own.
    """

    def __init__(self, model: str, limits: Limits, decodes_in_groups: bool, show: Callable[[dict], object]) -> None:
        self.model = model
        self.schedule = Schedule(limits)
        self.events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self.workers: Mapping[str, Worker] = {}
        self.fatal: BaseException | None = None
        self._decodes_in_groups = decodes_in_groups
        self._show = show
        self._mailbox = Mailbox()
        self._is_closing = False
        self._has_started = threading.Event()
        self._videos: dict[int, Video] = {}
        self._lacks: dict[str, str] = {}
        self._delivered: deque[float] = deque(maxlen=1000)
        self._thread = threading.Thread(target=self._run, name="chunk pipeline", daemon=True)

    def start(self, workers: Mapping[str, Worker]) -> None:
        """Start the workers, and the thread."""
        self.workers = workers
        self._files = VideoFiles(workers["writer"], self._mailbox.post, self._lost)
        for worker in workers.values():
            self.schedule.add_worker(worker.name, worker.recipe.capacity)
        for worker in workers.values():
            worker.start()
        self._thread.start()

    # For any thread

    def wait_until_ready(self, timeout: float | None = None) -> None:
        """Raises what keeps a worker from being loaded, `TimeoutError`, and `ClosedError`."""
        if not self._has_started.wait(timeout):
            raise TimeoutError(f"the workers are not loaded after {timeout:g} s")
        if self.fatal is not None:
            raise self.fatal
        self._check_open()

    def add(self, video: Video) -> None:
        """Raises `ClosedError`."""
        self._check_open()
        if not self._mailbox.post(functools.partial(self._add, video)):
            raise ClosedError

    def status(self) -> dict[str, Any]:
        """See `status_picture.picture`. Raises `ClosedError`."""
        self._check_open()
        return self._mailbox.ask(self._picture)

    def cancel(self, key: int) -> None:
        self._mailbox.post(lambda: self.schedule.cancel(key))

    def update_prompt(self, key: int, text: str) -> None:
        self._mailbox.post(functools.partial(self._update_prompt, key, text))

    def wanted(self, key: int) -> None:
        self._mailbox.post(lambda: self.schedule.wanted(key))

    def taken(self, key: int) -> None:
        self._mailbox.post(lambda: self.schedule.taken(key))

    def tell(self, worker: Worker, life: int, event: str, value: Any) -> None:
        """News of a worker; see `Worker`."""
        self._mailbox.post(functools.partial(self._told, worker, life, event, value))

    def close(self) -> None:
        """End all videos, and then the workers."""
        self._is_closing = True
        self._mailbox.post(lambda: None)
        self._thread.join()
        for worker in self.workers.values():
            worker.stop()

    def _check_open(self) -> None:
        if self._is_closing:
            raise ClosedError

    # The thread

    def _run(self) -> None:
        shown = 0.0
        while not self._is_closing:
            try:
                self._dispatch()
                self._end_videos()
                if time.monotonic() - shown > REFRESH:
                    shown = time.monotonic()
                    self._show_status()
                call = self._mailbox.next(REFRESH)
                if call is not None:
                    call()
            except Exception as error:
                logger.exception("the pipeline fails")
                self._fail_all(error)
        try:
            self._end_all(None)
        finally:
            for call in self._mailbox.close():  # whoever asked before is answered
                try:
                    call()
                except Exception:
                    logger.exception("news that came too late")

    def _add(self, video: Video) -> None:
        if self.fatal is not None:
            video.handle.end(self.fatal)
        elif self._is_closing:
            video.handle.cancelled()
        else:
            self._videos[video.key] = video
            self.schedule.add(video.key, video.course)

    def _update_prompt(self, key: int, text: str) -> None:
        if self.schedule.update_prompt(key) is not None:
            self._videos[key].change_prompt(text)

    def _show_status(self) -> None:
        try:
            self._show(self._picture())
        except Exception as error:  # no video depends on it
            logger.warning("the status cannot be shown: %s", one_line(error))

    def _picture(self) -> dict[str, Any]:
        workers = self.workers.values()
        return picture(
            self.model, workers, self._lacks, self.schedule, self._videos, self.events, list(self._delivered)
        )

    # Tasks

    def _dispatch(self) -> None:
        for task in self.schedule.dispatch():
            video, worker = self._videos[task.video], self.workers[task.worker]
            try:
                call = video.call(task)
                thread = "decode" if call.beside and self._decodes_in_groups else None
                answered = functools.partial(self._answered_later, task)
                worker.call(call.method, call.arguments, answered, results=call.results, thread=thread, gang=call.gang)
            except Exception as error:  # such as a picture that is gone
                self._fail(video, error)
                self.schedule.done(task)

    def _answered_later(self, task: Task, answer: list[Payload] | BaseException) -> None:
        self._mailbox.post(functools.partial(self._answered, task, answer))

    def _answered(self, task: Task, answer: list[Payload] | BaseException) -> None:
        if not self.schedule.in_hand(task):
            return  # of a worker that was given up, or after the end of all
        worker = self.workers[task.worker]
        if isinstance(answer, WorkerLostError):
            self._lost(worker, answer)
        elif isinstance(answer, PayloadLostError):
            self._videos[task.video].put_again(task.chunk)
            self.schedule.failed(task)
        elif isinstance(answer, BaseException):
            self._fail(self._videos[task.video], answer)
            if worker.is_gang:
                self._lost(worker, answer)  # its ranks are no longer in step
            else:
                self.schedule.done(task)
        else:
            worker.deaths = 0
            self._finished(task, answer)

    def _finished(self, task: Task, results: list[Payload]) -> None:
        video, value = self._videos[task.video], results[0].value
        span = value.span
        self.events.append(Event(task.worker, task.stage.value, task.video, task.chunk, span.begin, span.end))
        if not self.schedule.done(task):
            return
        video.take(task, results)
        if task.stage is Stage.DENOISE:
            self._files.keep(video, task.chunk)
        try:
            new = video.deliver(self.schedule.ready(task.video))
        except Exception as error:  # of the caller's `on_chunk`
            self._fail(video, error)
        else:
            self._delivered.extend([time.monotonic()] * new)

    def _fail(self, video: Video, error: BaseException) -> None:
        video.error = error
        self.schedule.fail(video.key)

    def _end_videos(self) -> None:
        statuses = {key: self.schedule.status(key) for key in self._videos}
        for key in self.schedule.ended():
            video = self._videos.pop(key)
            self._forget(key)
            if statuses[key] is Status.FAILED and video.error is None:
                tries = f"its workers died {self.schedule.limits.attempts} times, so it was given up"
                video.error = PipelineError(f"chunk {video.ready}: {tries}")
            if video.error is not None:
                self._files.finish(video, functools.partial(video.handle.end, video.error))
            elif statuses[key] is Status.CANCELLED:
                self._files.finish(video, video.handle.cancelled)
            else:
                output = () if video.target is None else video.target.paths
                video.handle.finish(video.course.chunks, output)

    def _forget(self, key: int) -> None:
        for worker in self.workers.values():
            if worker.is_ready and Stage.DENOISE in worker.recipe.capacity:
                with contextlib.suppress(Exception):  # the cluster itself may be gone
                    worker.call("forget", [key], _ignore, gang=True)

    # Workers

    def _told(self, worker: Worker, life: int, event: str, value: Any) -> None:
        if life != worker.life or self.fatal is not None or self._is_closing:
            return
        if event == "ready":
            worker.standing, worker.places, worker.failed_starts = Standing.READY, value, 0
            self._lacks.pop(worker.name, None)
            self.schedule.restore(worker.name)
            if worker is self.workers["writer"]:
                self._files.go_on()
            if all(each.is_ready for each in self.workers.values()):
                self._has_started.set()
        elif event == "short":
            logger.warning("waiting for resources: %s", value)
            self._lacks[worker.name] = value
        elif event == "unplaced":
            worker.standing, self._lacks[worker.name] = Standing.WAITING, value
            self._go_on_without(worker, PipelineError(value))
        elif event == "lost":
            worker.failed_starts += not worker.is_ready
            self._lost(worker, value)
        else:
            known = isinstance(value, CheckpointError | RequestError)
            error = value if known else PipelineError(f"{worker.name}: {type(value).__name__}: {one_line(value)}")
            worker.give_up()
            self._go_on_without(worker, error)

    def _lost(self, worker: Worker, error: BaseException) -> None:
        """A worker died: what it had in hand is handed out again, and it is started again unless that is of no use."""
        self.schedule.lose(worker.name)
        self._lacks.pop(worker.name, None)
        worker.deaths += 1
        why = reason_to_give_up(worker, error)
        if why is None:
            logger.warning("%s is started again: %s", worker.name, one_line(error))
            worker.restart()
        else:
            worker.give_up()
            self._go_on_without(worker, PipelineError(why))

    def _go_on_without(self, worker: Worker, error: BaseException) -> None:
        """With the others, if the pipeline has run before and they do the same work; without them it is over."""
        if self._has_started.is_set() and can_go_on_without(worker, self.workers.values()):
            logger.warning("going on without it: %s", error)
        else:
            self._fail_all(error)

    def _fail_all(self, error: BaseException) -> None:
        if self.fatal is None:
            self.fatal = error
            self._end_all(error)

    def _end_all(self, error: BaseException | None) -> None:
        """Every video ends with the error, or as cancelled; what is finished of its files can be played."""
        videos, self._videos = list(self._videos.values()), {}
        self.schedule = Schedule(self.schedule.limits)
        self._files.finish_all(videos)
        for video in videos:
            video.handle.end(error or CancelledError(f"video {video.key} was cancelled"))
        self._has_started.set()


def _ignore(_: object) -> None:
    pass
