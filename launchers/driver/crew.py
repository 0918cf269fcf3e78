"""The workers as one crew: it hands each unit of work to a free worker, and starts workers again that died or failed.

Everything here runs in the conductor's event loop.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from helios_cp.config.errors import CheckpointError, RequestError
from launchers.cluster.faults import PayloadLostError, StartError, WorkerLostError, one_line
from launchers.cluster.worker import Payload, Standing, Worker, look_at
from launchers.driver.timeline import Event
from launchers.schedule.pool import Pool
from launchers.schedule.terms import Limits, Stage, Unit

logger = logging.getLogger(__name__)

MAX_DEATHS = 8
"""Deaths of a worker without any finished work in between, after which it is not started again."""

MAX_EVENTS = 20_000
"""Of the timeline; older ones are dropped, so that a long run's memory stays flat."""

HARMLESS = (RequestError, OSError)
"""Errors that come from a request or a disk. After any other, such as one of CUDA, a worker may be spoilt."""


class PipelineError(RuntimeError):
    """The pipeline as a whole cannot go on; every video ends with it."""


class Crew:
    """The workers of one pipeline, by name. `fail` is called with the error after which the pipeline is over.

    `decodes_in_groups`: the denoisers decode too, in a thread of their own. `lacks` says what a worker waits for. Once
    `is_over` is set no worker is started again.
    """

    def __init__(self, limits: Limits, decodes_in_groups: bool, fail: Callable[[BaseException], None]) -> None:
        self.limits = limits
        self.pool = Pool()
        self.workers: Mapping[str, Worker] = {}
        self.events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self.lacks: dict[str, str] = {}
        self.in_hand: dict[asyncio.Task[Any], tuple[str, Unit]] = {}
        self.has_started = threading.Event()
        self.is_over = False
        self._decode_thread = "decode" if decodes_in_groups else None
        self._homes: dict[int, str] = {}
        self._fail = fail
        self._errands: set[asyncio.Future[Any]] = set()

    def start(self, workers: Mapping[str, Worker]) -> None:
        self.workers = workers
        for worker in workers.values():
            self.pool.add_worker(worker.name, worker.recipe.capacity)
            worker.start()

    # Work

    async def work(
        self, unit: Unit, method: str, arguments: Callable[[], Sequence[Any] | None], results: int = 1
    ) -> list[Payload]:
        """Have a worker do a unit of work, and again if that one dies: the denoiser of the video where it can be.

        `arguments` is called once the worker is free; with `None` in place of arguments nothing is done, and nothing is
        returned. Raises the error of the work, and `PipelineError` if too many workers died of it. Whoever is cancelled
        leaves the call in hand to its worker; see `settled`.
        """
        for _ in range(self.limits.attempts):
            name = await self.pool.take(unit.stage, self._homes.get(unit.video))
            attempt = asyncio.create_task(self._attempt(self.workers[name], unit, method, arguments, results))
            self.in_hand[attempt] = name, unit
            attempt.add_done_callback(self._put_down)
            found = await asyncio.shield(attempt)
            if found is not None:
                return found
        tries = f"its workers died {self.limits.attempts} times, so it was given up"
        raise PipelineError(f"chunk {unit.chunk}: {tries}")

    async def settled(self, video: int) -> None:
        """Wait until no worker has anything of a video in hand."""
        while attempts := [attempt for attempt, (_, unit) in self.in_hand.items() if unit.video == video]:
            await asyncio.wait(attempts)

    def errand(self, worker: Worker, method: str, arguments: Sequence[Any], gang: bool = False) -> None:
        """Call a worker, if it is ready, without waiting for an answer. A lost errand does no harm."""
        if not worker.is_ready:
            return
        try:
            answer = asyncio.ensure_future(worker.call(method, arguments, gang=gang))
        except Exception as error:  # the cluster itself may be gone
            logger.debug("%s of %s is lost: %s", method, worker.name, one_line(error))
            return
        self._errands.add(answer)
        answer.add_done_callback(self._errands.discard)
        answer.add_done_callback(look_at)

    def forget(self, video: int) -> None:
        """Have the denoisers free what they keep of a video."""
        self._homes.pop(video, None)
        for worker in self.workers.values():
            if Stage.DENOISE in worker.recipe.capacity:
                self.errand(worker, "forget", [video], gang=True)

    async def _attempt(
        self, worker: Worker, unit: Unit, method: str, arguments: Callable[[], Sequence[Any] | None], results: int
    ) -> list[Payload] | None:
        """The results of a call; `None` if the worker or what was sent is lost."""
        try:
            if not worker.is_ready:  # it died in the moment in which its place was given
                return None
            values = arguments()
            if values is None:
                return []
            found = await self._call(worker, unit.stage, method, values, results)
        finally:
            self.pool.release(worker.name, unit.stage)
        if found is not None:
            worker.deaths = 0
            if unit.stage is Stage.DENOISE:
                self._homes[unit.video] = worker.name
            span = found[0].value.span
            self.events.append(Event(worker.name, unit.stage.value, unit.video, unit.chunk, span.begin, span.end))
        return found

    async def _call(
        self, worker: Worker, stage: Stage, method: str, values: Sequence[Any], results: int
    ) -> list[Payload] | None:
        life = worker.life
        is_beside = stage in (Stage.START, Stage.DECODE)
        try:
            return await worker.call(
                method,
                values,
                results=results,
                thread=self._decode_thread if is_beside else None,
                gang=stage is Stage.DENOISE,
            )
        except PayloadLostError:
            for value in values:
                if isinstance(value, Payload):
                    value.put_again()
        except WorkerLostError as error:
            if worker.life == life:
                self._lost(worker, error)
        except Exception as error:
            if worker.life == life and (worker.is_gang or not isinstance(error, HARMLESS)):
                self._restart(worker, error)
            raise
        return None

    def _put_down(self, attempt: asyncio.Task[Any]) -> None:
        del self.in_hand[attempt]
        look_at(attempt)

    # Workers

    def told(self, worker: Worker, life: int, event: str, value: Any) -> None:
        """News of a worker; see `Worker`."""
        if life != worker.life or self.is_over:
            return
        if event == "ready":
            worker.standing, worker.places, worker.failed_starts = Standing.READY, value, 0
            self.lacks.pop(worker.name, None)
            self.pool.restore(worker.name)
            if all(each.is_ready for each in self.workers.values()):
                self.has_started.set()
        elif event == "short":
            logger.warning("waiting for resources: %s", value)
            self.lacks[worker.name] = value
        elif event == "unplaced":
            worker.standing, self.lacks[worker.name] = Standing.WAITING, value
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
        """A worker died. It is started again unless that is of no use."""
        if self.is_over:
            return
        worker.deaths += 1
        if isinstance(error, StartError) and worker.failed_starts >= error.attempts:
            reason = f"{worker.name} failed to start {worker.failed_starts} times in a row: {error}"
        elif worker.deaths > MAX_DEATHS:
            reason = f"{worker.name} died {worker.deaths} times without finishing any work: {one_line(error)}"
        else:
            self._restart(worker, error)
            return
        self.pool.remove(worker.name)
        worker.give_up()
        self._go_on_without(worker, PipelineError(reason))

    def _restart(self, worker: Worker, error: BaseException) -> None:
        if self.is_over:
            return
        logger.warning("%s is started again: %s", worker.name, one_line(error))
        self.pool.remove(worker.name)
        self.lacks.pop(worker.name, None)
        worker.restart()

    def _go_on_without(self, worker: Worker, error: BaseException) -> None:
        """With the others, if the pipeline has run before and they do the same work; without them it is over."""
        hopeful = [each for each in self.workers.values() if each.standing in (Standing.READY, Standing.STARTING)]
        able = {stage for each in hopeful if each is not worker for stage in each.recipe.capacity}
        if self.has_started.is_set() and able >= set(worker.recipe.capacity):
            logger.warning("going on without it: %s", error)
        else:
            self._fail(error)
