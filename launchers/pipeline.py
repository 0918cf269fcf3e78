"""Many videos on one cluster, chunk by chunk: text, denoising, decoding and writing beside each other.

One thread owns the schedule and all that is known of the videos. It sends tasks to workers, and everything that happens
reaches it as a call in its queue. It keeps its own view of each result until the result is of no use any more, so a
lost machine takes with it the chunks that it had in hand, and no others.
"""

from __future__ import annotations

import functools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
import torch

from helios_cp.conditioning import Inputs
from helios_cp.config import Request, RequestError
from helios_cp.execution import Execution
from helios_cp.layout import Layout
from helios_cp.run_folder import RunFolder
from helios_cp.sampling import SamplingPlan
from helios_cp.weights import CheckpointError, resolve
from launchers.arrays import StateArrays
from launchers.board import StatusBoard
from launchers.handle import VideoChunk, VideoHandle
from launchers.loading import Loading
from launchers.messages import ChunkJob, Denoised, Span, Target, Written
from launchers.recipes import Resources, recipes
from launchers.schedule import Course, Limits, Schedule, Stage, Status, Task
from launchers.timeline import Event, overlap
from launchers.workers import Payload, PayloadLostError, Worker, WorkerLostError

logger = logging.getLogger(__name__)

NAMESPACE = "helios_cp"
MAX_EVENTS = 20_000
"""Of the timeline; older ones are dropped, so that a long run's memory stays flat."""

MAX_DEATHS = 8
"""Deaths of a worker without any finished work in between, after which it is not started again."""

REFRESH = 1.0
"""Seconds between two pictures of the status."""

RATE_SECONDS = 30.0


class PipelineError(RuntimeError):
    """The pipeline as a whole cannot go on; every video ends with it."""


@dataclass
class _Made:
    """What exists of one chunk between denoising and delivery."""

    latents: Payload
    after: Payload
    decoded: Payload | None = None
    frames: Payload | None = None
    spans: dict[str, Span] = field(default_factory=dict)


@dataclass
class _Video:
    handle: VideoHandle
    request: Request
    inputs: Inputs
    course: Course
    target: Target | None
    text: Payload | None = None
    before: Payload | None = None
    written: Written | None = None
    made: dict[int, _Made] = field(default_factory=dict)
    ready: int = 0
    error: BaseException | None = None


class ChunkPipeline:
    """Workers for one checkpoint on the Ray cluster that this process is a driver of; a context manager.

    `groups` groups of ranks in `layout` denoise, and `decoders` decode; with none, each group decodes on its own card
    beside denoising. `spread` puts the parts of the ring on a node each. `patience`: seconds to wait for resources.
    Raises `RequestError` for a layout that splits the VAE.
    """

    def __init__(
        self,
        model: str = "tiny-distilled",
        *,
        groups: int = 1,
        decoders: int = 1,
        layout: Layout | None = None,
        execution: Execution | None = None,
        dtype: str = "auto",
        device: str = "cpu",
        backend: str | None = None,
        cache: Path | None = None,
        timeout: float = 600.0,
        limits: Limits | None = None,
        resources: Resources | None = None,
        spread: bool = False,
        patience: float = 15.0,
    ) -> None:
        self.checkpoint = resolve(model, cache, weights=())
        layout = layout or Layout()
        backend = backend or ("nccl" if device == "cuda" else "gloo")
        loading = Loading(model, dtype, device, backend, layout, timeout, cache, execution or Execution())
        self.schedule = Schedule(limits or Limits(active=2 * groups))
        self.events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._queue: queue.Queue[Callable[[], None]] = queue.Queue()
        self._videos: dict[int, _Video] = {}
        self._keys = 0
        self._keys_lock = threading.Lock()
        self._delivered: deque[float] = deque(maxlen=1000)
        self._fatal: BaseException | None = None
        self._closing = False
        self._decodes_in_groups = decoders == 0
        self._driver_node = ray.get_runtime_context().get_node_id()
        made = recipes(loading, groups, decoders, resources or Resources.of(device), spread, self._driver_node)
        self.workers = {recipe.name: Worker(recipe, self._tell, patience) for recipe in made}
        for recipe in made:
            self.schedule.add_worker(recipe.name, recipe.capacity)
        self._all_ready = threading.Event()
        self._board = (
            ray.remote(StatusBoard)
            .options(
                name=f"status-{ray.get_runtime_context().get_job_id()}-{id(self)}", namespace=NAMESPACE, num_cpus=0
            )
            .remote()
        )
        for worker in self.workers.values():
            worker.start()
        self._thread = threading.Thread(target=self._run, name="chunk pipeline", daemon=True)
        self._thread.start()

    # For callers

    def wait_until_ready(self) -> None:
        """Until every worker is loaded. Raises what keeps one from it, such as a lack of resources."""
        self._all_ready.wait()
        if self._fatal is not None:
            raise self._fatal

    def submit(
        self,
        request: Request,
        *,
        output: Sequence[Path] = (),
        folder: RunFolder | None = None,
        stream: bool | None = None,
        decode: bool = True,
        keep_latents: bool = False,
        on_chunk: Callable[[VideoChunk], None] | None = None,
    ) -> VideoHandle:
        """Queue a video.

        `output`: an MP4 for each video of the batch. `folder`: a run to save every chunk in, and to go on with where it
        stands. `stream`: the handle gives the chunks, by default where there is no output; then the pipeline runs ahead
        of whoever takes them by `Limits.undelivered` chunks at most. `decode=False` makes latents only. `on_chunk` is
        called from the pipeline's thread. Raises `RequestError` before anything is queued.
        """
        request, inputs = Inputs().merged(request)
        request = request.resolve(self.checkpoint)
        if folder is not None:
            folder = RunFolder(folder.path.absolute(), folder.run)  # the writer works in another folder
        stream = not output if stream is None else stream
        self._check(request, output, folder, decode)
        state = folder.state(torch.device("cpu")) if folder is not None else None
        first = 0 if state is None else state.index
        if first == request.num_chunks:
            raise RequestError(f"{folder.path}: all {first} chunks are finished; there is nothing to go on with")
        with self._keys_lock:
            key, self._keys = self._keys, self._keys + 1
        handle = VideoHandle(
            self, key, streams=stream, keep_latents=keep_latents, saved_in=folder and folder.path, on_chunk=on_chunk
        )
        starts = inputs.has_anchor and state is None
        course = Course(request.num_chunks, first, starts, decode, writes=bool(output), streams=stream)
        target = Target(key, tuple(Path(path).absolute() for path in output), request.fps, folder) if output else None
        video = _Video(handle, request, inputs, course, target, ready=first)
        if state is not None:
            before = Denoised(StateArrays.of(state), Span(0, 0, {}))
            video.before = Payload(ray.put(before), before)
        self._queue.put(functools.partial(self._add, key, video))
        return handle

    def cancel(self, key: int) -> None:
        """See `VideoHandle.cancel`."""
        self._queue.put(functools.partial(self.schedule.cancel, key))

    def update_prompt(self, key: int, text: str) -> None:
        """See `VideoHandle.update_prompt`."""
        self._queue.put(functools.partial(self._update_prompt, key, text))

    def taken(self, key: int) -> None:
        """A chunk of a streaming video has been used."""
        self._queue.put(functools.partial(self._taken, key))

    def close(self) -> None:
        """End all videos and workers."""
        self._closing = True
        self._queue.put(lambda: None)
        self._thread.join()
        for worker in self.workers.values():
            worker.stop()
        ray.kill(self._board)
        for video in self._videos.values():
            video.handle.cancelled()

    def __enter__(self) -> ChunkPipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def nodes(self) -> dict[str, str]:
        """On which node each worker is."""
        return {
            worker.name: ", ".join(sorted({f"{place.host} {place.node[:6]}" for place in worker.places}))
            for worker in self.workers.values()
        }

    def status(self) -> dict[str, Any]:
        """What `launchers.status` shows: workers and where they are, the queue, chunks a second, overlap."""
        answer: Future[dict[str, Any]] = Future()
        self._queue.put(lambda: answer.set_result(self._status()))
        return answer.result()

    def _status(self) -> dict[str, Any]:
        now = time.monotonic()
        recent = list(self.events)[-500:]
        in_hand = {}
        for task in self.schedule.tasks():
            in_hand.setdefault(task.worker, []).append(f"{task.stage.value} of video {task.video}, chunk {task.chunk}")
        return {
            "model": str(self.checkpoint.folder.name),
            "workers": [
                {
                    "name": worker.name,
                    "state": "ready" if worker.is_ready else "starting",
                    "places": [f"{place.host}:{place.pid} on node {place.node[:8]}" for place in worker.places],
                    "in hand": in_hand.get(worker.name, []),
                }
                for worker in self.workers.values()
            ],
            "queue": self.schedule.queue(),
            "videos": {
                key: f"{video.ready} of {video.course.chunks} chunks, {self.schedule.status(key).value}"
                for key, video in self._videos.items()
            },
            "chunks per second": sum(now - then < RATE_SECONDS for then in self._delivered) / RATE_SECONDS,
            "overlap": overlap(recent),
            "time": time.time(),
        }

    # The pipeline's thread

    def _run(self) -> None:
        shown = 0.0
        while not self._closing:
            try:
                if self._fatal is None:
                    for task in self.schedule.dispatch():
                        self._try_to_send(task)
                self._end_videos()
                if time.monotonic() - shown > REFRESH:
                    shown = time.monotonic()
                    self._board.show.remote(self._status())
                event = self._next_event(REFRESH)
                if event is not None:
                    event()
            except Exception as error:
                logger.exception("the pipeline fails")
                self._fail_all(error)

    def _next_event(self, timeout: float) -> Callable[[], None] | None:
        try:
            return self._queue.get(timeout=timeout)
        except queue.Empty:
            return None

    def _add(self, key: int, video: _Video) -> None:
        if self._fatal is not None:
            video.handle.end(self._fatal)
            return
        self._videos[key] = video
        self.schedule.add(key, video.course)

    def _update_prompt(self, key: int, text: str) -> None:
        if self.schedule.update_prompt(key) is not None:
            video = self._videos[key]
            video.request = replace(video.request, prompt=(text,) * video.request.batch_size, prompt_schedule=())

    def _taken(self, key: int) -> None:
        if key in self._videos:
            self.schedule.taken(key)

    def _check(self, request: Request, output: Sequence[Path], folder: RunFolder | None, decode: bool) -> None:
        if output and len(output) != request.batch_size:
            raise RequestError(f"{len(output)} outputs for {request.batch_size} video(s); give one each")
        if output and not decode:
            raise RequestError("decode=False makes no frames for a file; leave out output")
        if folder is not None and not output:
            raise RequestError(f"{folder.path}: a run is saved beside its files; give output too")

    # Tasks

    def _try_to_send(self, task: Task) -> None:
        try:
            self._send(task)
        except Exception as error:  # such as a picture that is gone
            self._videos[task.video].error = error
            self.schedule.fail(task.video)
            self.schedule.done(task)

    def _send(self, task: Task) -> None:
        video, worker = self._videos[task.video], self.workers[task.worker]
        answered = functools.partial(self._answered_later, task)
        thread = "decode" if self._decodes_in_groups and task.stage in (Stage.DECODE, Stage.START) else None
        if task.stage is Stage.TEXT:
            is_guided = SamplingPlan.of(video.request, self.checkpoint).is_guided
            worker.call("encode", [video.request, is_guided], answered)
        elif task.stage is Stage.START:
            media = Path(video.request.image or video.request.video).read_bytes()
            worker.call("start", [video.request, media], answered, thread=thread)
        elif task.stage is Stage.DENOISE:
            job = ChunkJob(task.video, task.prompt, video.request)
            before = None if video.before is None else video.before.reference
            worker.call("denoise", [job, video.text.reference, before], answered, results=2, gang=True)
        elif task.stage is Stage.DECODE:
            wanted = [video.course.writes, video.course.streams]
            latents = video.made[task.chunk].latents.reference
            worker.call("decode", [latents, video.request.fps, *wanted], answered, results=2, thread=thread)
        else:
            made, is_last = video.made[task.chunk], task.chunk + 1 == video.course.chunks
            saved = [made.latents.reference, made.after.reference] if video.target.folder is not None else [None, None]
            arguments = [video.target, video.written, task.chunk, is_last, made.decoded.reference, *saved]
            worker.call("write", arguments, answered)

    def _answered_later(self, task: Task, answer: list[Payload] | BaseException) -> None:
        self._queue.put(functools.partial(self._answered, task, answer))

    def _answered(self, task: Task, answer: list[Payload] | BaseException) -> None:
        if not self.schedule.in_hand(task):
            return  # of a worker that was given up
        worker = self.workers[task.worker]
        if isinstance(answer, WorkerLostError):
            self._lost(worker, answer)
        elif isinstance(answer, PayloadLostError):
            self._put_again(task)
            self.schedule.failed(task)
        elif isinstance(answer, BaseException):
            self._videos[task.video].error = answer
            self.schedule.fail(task.video)
            if len(worker.recipe.actors) > 1:
                self._lost(worker, answer)  # its ranks are no longer in step
            else:
                self.schedule.done(task)
        else:
            worker.deaths = 0
            self._finished(task, answer)

    def _finished(self, task: Task, results: list[Payload]) -> None:
        video, value = self._videos[task.video], results[0].value
        if value is not None:
            span = value.span
            self.events.append(Event(task.worker, task.stage.value, task.video, task.chunk, span.begin, span.end))
        if not self.schedule.done(task):
            return
        if task.stage is Stage.TEXT:
            video.text = results[0]
        elif task.stage is Stage.START:
            video.before = results[0]
        elif task.stage is Stage.DENOISE:
            video.before = results[0]
            video.made[task.chunk] = _Made(results[1], results[0], spans={"denoise": value.span})
        elif task.stage is Stage.DECODE:
            made = video.made[task.chunk]
            made.decoded, made.frames = results
            made.spans["decode"] = value.span
        else:
            video.written = value
            video.made[task.chunk].spans["write"] = value.span
        self._deliver(task.video, video)

    def _deliver(self, key: int, video: _Video) -> None:
        while video.ready < self.schedule.ready(key):
            made = video.made.pop(video.ready)
            frames = None if made.frames is None else made.frames.value
            video.handle.deliver(VideoChunk(video.ready, made.latents.value.values, frames, made.spans))
            video.ready += 1
            self._delivered.append(time.monotonic())

    def _put_again(self, task: Task) -> None:
        """What a task needs went down with its node: send this process's own view of it."""
        video = self._videos[task.video]
        video.text = video.text and video.text.again()
        video.before = video.before and video.before.again()
        made = video.made.get(task.chunk)
        if made is not None:
            made.latents, made.after = made.latents.again(), made.after.again()
            made.decoded = made.decoded and made.decoded.again()

    def _end_videos(self) -> None:
        statuses = {key: self.schedule.status(key) for key in self._videos}
        for key in self.schedule.ended():
            video, status = self._videos.pop(key), statuses[key]
            for worker in self.workers.values():
                if worker.is_ready and Stage.DENOISE in worker.recipe.capacity:
                    worker.call("forget", [key], _ignore, gang=True)
            if status is Status.FINISHED:
                output = () if video.target is None else video.target.paths
                video.handle.finish(video.course.chunks, output)
                continue
            end = video.handle.cancelled
            if status is Status.FAILED:
                tries = (
                    f"chunk {video.ready}: its workers died {self.schedule.limits.attempts} times, so it was given up"
                )
                end = functools.partial(video.handle.end, video.error or PipelineError(tries))
            writer = self.workers["writer"]
            if video.target is not None and writer.is_ready:
                worker_done = lambda _, end=end: end()  # noqa: E731
                writer.call("close", [key], worker_done)
            else:
                end()

    # Workers

    def _tell(self, worker: Worker, life: int, event: str, value: Any) -> None:
        self._queue.put(functools.partial(self._told, worker, life, event, value))

    def _told(self, worker: Worker, life: int, event: str, value: Any) -> None:
        if life != worker.life:
            return
        if event == "ready":
            worker.is_ready = True
            self.schedule.restore(worker.name)
            if all(each.is_ready for each in self.workers.values()):
                self._all_ready.set()
        elif event == "lost":
            self._lost(worker, value)
        elif event == "broken":
            known = isinstance(value, CheckpointError | RequestError)
            self._fail_all(value if known else PipelineError(f"{worker.name}: {type(value).__name__}: {value}"))
        elif not self._all_ready.is_set() or not all(self.schedule.has_worker(s) for s in worker.recipe.capacity):
            self._fail_all(PipelineError(value))
        else:
            logger.warning("going on without it: %s", value)

    def _lost(self, worker: Worker, error: BaseException) -> None:
        """A worker died: what it had in hand is handed out again, and it is started again."""
        logger.warning("%s is started again: %s", worker.name, " ".join(str(error).split())[:200])
        self.schedule.lose(worker.name)
        worker.deaths += 1
        if worker.deaths > MAX_DEATHS:
            self._fail_all(
                PipelineError(f"{worker.name} died {worker.deaths} times without finishing any work: {error}")
            )
            return
        worker.restart()

    def _fail_all(self, error: BaseException) -> None:
        self._fatal = error
        for video in self._videos.values():
            video.handle.end(error)
        self._videos.clear()
        self._all_ready.set()


def _ignore(_: object) -> None:
    pass
