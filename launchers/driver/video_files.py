"""What the conductor asks of the writer beside writing: to keep denoised chunks, and to finish files that end early."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from launchers.cluster.faults import WorkerLostError, one_line
from launchers.cluster.worker import Worker
from launchers.driver.video import Video
from launchers.workers.writer import VideoWriter

logger = logging.getLogger(__name__)

PATIENCE = 30.0
"""Seconds for the writer to finish its files when everything ends; then it is killed, and they are finished here."""


class VideoFiles:
    """Used in the conductor's thread only. `post` has it call something; `lost` is told when the writer is."""

    def __init__(
        self,
        writer: Worker,
        post: Callable[[Callable[[], None]], Any],
        lost: Callable[[Worker, WorkerLostError], None],
    ) -> None:
        self.writer = writer
        self._post = post
        self._lost = lost
        self._open: dict[int, tuple[Video, Callable[[], None]]] = {}

    def keep(self, video: Video, chunk: int) -> None:
        """Save a denoised chunk while it is decoded, so that a killed driver need not denoise it again."""
        call = video.keep_call(chunk)
        if call is not None and self.writer.is_ready:
            self.writer.call(call.method, call.arguments, _ignore)  # a lost one costs no more than the chunk's seconds

    def finish(self, video: Video, end: Callable[[], None]) -> None:
        """Finish the files of a video that ended early with what they have, and then call `end`. A writer that is
        lost meanwhile does it when it is back."""
        if video.close_call() is None:
            end()
            return
        self._open[video.key] = video, end
        if self.writer.is_ready:
            self._send(video)

    def go_on(self) -> None:
        """The writer is ready again."""
        for video, _ in list(self._open.values()):
            self._send(video)

    def finish_all(self, videos: Sequence[Video]) -> None:
        """As `finish`, at once: by the writer, or in this process when there is none. Ends those that waited, too."""
        waiting, self._open = list(self._open.values()), {}
        left = [video for video in [*videos, *(video for video, _ in waiting)] if video.close_call() is not None]
        answers = [self._ask(video) for video in left] if self.writer.is_ready else []
        deadline = time.monotonic() + PATIENCE
        for video, answer in zip(list(left), answers, strict=False):
            try:
                is_lost = isinstance(answer.result(max(0.0, deadline - time.monotonic())), WorkerLostError)
            except TimeoutError:
                is_lost = True
            if not is_lost:
                left.remove(video)
        if left:
            self.writer.stop()
        for video in left:
            try:
                VideoWriter().close(video.target, video.written)
            except Exception as error:
                _warn(video, error)
        for _, end in waiting:
            end()

    def _ask(self, video: Video) -> Future[Any]:
        answer: Future[Any] = Future()
        call = video.close_call()
        try:
            self.writer.call(call.method, call.arguments, answer.set_result)
        except Exception as error:  # the cluster itself may be gone
            answer.set_result(WorkerLostError(str(error)))
        return answer

    def _send(self, video: Video) -> None:
        life = self.writer.life
        heard = lambda answer: self._post(lambda: self._answered(video, life, answer.result()))  # noqa: E731
        self._ask(video).add_done_callback(heard)

    def _answered(self, video: Video, life: int, answer: Any) -> None:
        if video.key not in self._open:
            return
        if isinstance(answer, WorkerLostError):  # the next writer is asked again
            if self.writer.is_ready and self.writer.life == life:
                self._lost(self.writer, answer)
            return
        if isinstance(answer, BaseException):
            _warn(video, answer)
        _, end = self._open.pop(video.key)
        end()


def _warn(video: Video, error: BaseException) -> None:
    names = ", ".join(str(path) for path in video.target.paths)
    logger.warning("%s cannot be finished: %s", names, one_line(error))


def _ignore(_: object) -> None:
    pass
