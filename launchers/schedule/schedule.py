"""Who runs what next: the plan of a chunk pipeline as a state machine that does no work itself.

A video's chunks go through the stages in order. Denoising a chunk needs the latents of the one before and nothing else,
so decoding and writing happen beside it. Whoever owns a `Schedule` sends each task of `dispatch` to its worker and says
what became of it: `done`, `failed`, or `lose` for a worker that died with all it had in hand.

Nothing is lost or doubled: a task is in hand of one worker at most, what a dead worker held is handed out again, and
news of a task that is no longer in hand is refused. Memory is bounded: at most `Limits.undelivered` chunks of a video
lie between denoising and delivery, and at most `Limits.active` videos are under way. A stream whose reader keeps it
waiting has nothing to do: it does not hold up files, nor a stream that a reader is `wanted` by.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from launchers.schedule.terms import Course, Limits, Stage, Status, Task

LAST_STAGES_FIRST = (Stage.WRITE, Stage.DECODE, Stage.START, Stage.TEXT, Stage.DENOISE)


@dataclass
class _Video:
    course: Course
    status: Status = Status.WAITING
    is_wanted: bool = False
    prompt: int = 0
    encoded: int = -1
    is_started: bool = False
    denoised: int = 0
    to_decode: set[int] = field(default_factory=set)
    to_write: set[int] = field(default_factory=set)
    ready: int = 0
    delivered: int = 0
    home: str | None = None
    running: set[tuple[Stage, int]] = field(default_factory=set)
    attempts: Counter[tuple[Stage, int]] = field(default_factory=Counter)
    turns: dict[Stage, int] = field(default_factory=dict)


class Schedule:
    """The plan of all videos and workers. Videos and workers are known by keys of the caller's choice.

    `handed_out` counts the tasks of each stage, those that came to nothing too.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._videos: dict[int, _Video] = {}
        self._waiting: deque[int] = deque()
        self._workers: dict[str, Mapping[Stage, int]] = {}
        self._present: set[str] = set()
        self._running: dict[int, Task] = {}
        self._ended: deque[int] = deque()
        self._tasks = 0
        self.handed_out: Counter[Stage] = Counter()

    # Workers

    def add_worker(self, name: str, capacity: Mapping[Stage, int]) -> None:
        """Make a worker known, with how many tasks of each stage it takes at a time. It is absent until `restore`."""
        self._workers[name] = dict(capacity)

    def restore(self, name: str) -> None:
        """A worker is there, or there again."""
        self._present.add(name)

    def lose(self, name: str) -> list[Task]:
        """A worker has died. What it had in hand waits again; returns those tasks."""
        self._present.discard(name)
        lost = [task for task in self._running.values() if task.worker == name]
        for task in lost:
            self.failed(task)
        return lost

    def has_worker(self, stage: Stage) -> bool:
        """Whether any worker for the stage is there."""
        return any(stage in self._workers[name] for name in self._present)

    # Videos

    def add(self, key: int, course: Course) -> None:
        """Queue a video behind those that wait. Raises `ValueError` for a key in use or a course without chunks."""
        if key in self._videos:
            raise ValueError(f"video {key}: it is there already; take another key")
        if not 0 <= course.first < course.chunks:
            raise ValueError(f"video {key}: chunks {course.first} to {course.chunks} are none; at least one is needed")
        first, denoised = course.first, course.first + course.denoised
        if not first <= denoised <= course.chunks:
            raise ValueError(
                f"video {key}: {course.denoised} of {course.chunks - first} chunks cannot be denoised already"
            )
        video = _Video(course, is_started=not course.starts, denoised=denoised, ready=first, delivered=first)
        (video.to_decode if course.decodes else video.to_write).update(range(first, denoised))
        self._videos[key] = video
        self._waiting.append(key)

    def status(self, key: int) -> Status:
        return self._videos[key].status

    def ready(self, key: int) -> int:
        """How many chunks of a video are ready for delivery, in order, those before `Course.first` included."""
        return self._videos[key].ready

    def delivered(self, key: int) -> int:
        """How many chunks of a video have been delivered, those before `Course.first` included."""
        return self._videos[key].delivered

    def update_prompt(self, key: int) -> int | None:
        """From the next chunk to be denoised on another prompt holds. Returns its version, `None` if it is too late."""
        video = self._videos.get(key)
        if video is None or video.status.has_ended:
            return None
        video.prompt += 1
        return video.prompt

    def wanted(self, key: int) -> None:
        """The consumer of a streaming video waits for its chunks."""
        if key in self._videos:
            self._videos[key].is_wanted = True

    def taken(self, key: int) -> None:
        """The consumer of a streaming video took its next chunk."""
        video = self._videos.get(key)
        if video is not None and video.course.streams and video.delivered < video.ready:
            video.delivered += 1
            self._end_if_finished(key, video)

    def cancel(self, key: int) -> None:
        """Hand out no more of a video. What is in hand comes to its end unused."""
        self._end(key, Status.CANCELLED)

    def fail(self, key: int) -> None:
        """As `cancel`, for a video that cannot be finished."""
        self._end(key, Status.FAILED)

    def ended(self) -> list[int]:
        """Videos that have ended with nothing in hand any more, each of them once; they are forgotten."""
        over = [key for key in self._ended if not self._videos[key].running]
        for key in over:
            self._ended.remove(key)
            del self._videos[key]
        return over

    # Tasks

    def dispatch(self) -> list[Task]:
        """All tasks that can be handed out now. They count as in hand from here on."""
        self._admit()
        return [task for stage in LAST_STAGES_FIRST for task in self._dispatch(stage)]

    def in_hand(self, task: Task) -> bool:
        return task.number in self._running

    def done(self, task: Task) -> bool:
        """A worker finished a task. `False` if its result is of no use: it was given up, or its video has ended."""
        if not self._take_back(task):
            return False
        video = self._videos[task.video]
        if video.status.has_ended:
            return False
        del video.attempts[task.stage, task.chunk]
        if task.stage is Stage.TEXT:
            video.encoded = max(video.encoded, task.prompt)
        elif task.stage is Stage.START:
            video.is_started = True
        elif task.stage is Stage.DENOISE:
            video.denoised += 1
            video.home = task.worker
            (video.to_decode if video.course.decodes else video.to_write).add(task.chunk)
        elif task.stage is Stage.DECODE:
            video.to_write.add(task.chunk)
        else:
            video.ready += 1
        if not video.course.writes:
            while video.ready in video.to_write:
                video.to_write.remove(video.ready)
                video.ready += 1
        if not video.course.streams:
            video.delivered = video.ready
        self._end_if_finished(task.video, video)
        return True

    def failed(self, task: Task) -> bool:
        """A task came to nothing through no fault of its video; it waits again. Too many attempts end the video."""
        if not self._take_back(task):
            return False
        video = self._videos[task.video]
        if video.status.has_ended:
            return False
        if task.stage is Stage.DECODE:
            video.to_decode.add(task.chunk)
        elif task.stage is Stage.WRITE:
            video.to_write.add(task.chunk)
        video.attempts[task.stage, task.chunk] += 1
        if video.attempts[task.stage, task.chunk] >= self.limits.attempts:
            self.fail(task.video)
        return True

    def tasks(self) -> list[Task]:
        """All tasks in hand."""
        return list(self._running.values())

    def queue(self) -> dict[str, int]:
        """How many chunks or videos wait for each stage, and how many tasks are in hand."""
        active = [video for video in self._videos.values() if video.status is Status.RUNNING]
        waiting = {stage.value: sum(len(self._units(stage, video)) for video in active) for stage in Stage}
        return {"videos waiting": len(self._waiting), "in hand": len(self._running), **waiting}

    def _admit(self) -> None:
        """Let videos begin in order: any while there is room, those that somebody waits for or that wait for nobody
        even beside streams that nobody reads now."""
        active = [video for video in self._videos.values() if video.status is Status.RUNNING]
        under_way, busy = len(active), sum(not self._waits_for_reader(video) for video in active)
        for key in list(self._waiting):
            video = self._videos[key]
            has_room = under_way < self.limits.active
            if busy < self.limits.active and (has_room or video.is_wanted or not video.course.streams):
                self._waiting.remove(key)
                video.status = Status.RUNNING
                under_way, busy = under_way + 1, busy + 1

    def _waits_for_reader(self, video: _Video) -> bool:
        """Whether nothing of a stream can go on before its next chunk is taken."""
        has_chunks = video.delivered < video.ready == video.denoised
        is_held = video.denoised == video.course.chunks or not self._has_room(video)
        return video.course.streams and has_chunks and is_held and not video.running

    def _dispatch(self, stage: Stage) -> list[Task]:
        """Free workers go to the videos in turn: first to the one whose last turn is longest ago."""
        tasks = []
        while True:
            free = self._free_workers(stage)
            able = [
                key
                for key, video in self._videos.items()
                if video.status is Status.RUNNING and self._units(stage, video)
            ]
            if not free or not able:
                return tasks
            key = min(able, key=lambda key: (self._videos[key].turns.get(stage, 0), key))
            video = self._videos[key]
            worker = video.home if video.home in free else free[0]
            tasks.append(self._hand_out(key, video, stage, min(self._units(stage, video)), worker))

    def _free_workers(self, stage: Stage) -> list[str]:
        """Workers with room for the stage, those with the least to do first."""
        used = Counter(task.worker for task in self._running.values() if task.stage is stage)
        room = {name: self._workers[name].get(stage, 0) - used[name] for name in self._workers if name in self._present}
        return sorted((name for name, places in room.items() if places > 0), key=lambda name: used[name])

    def _units(self, stage: Stage, video: _Video) -> set[int]:
        """What of a video can be handed out for a stage: chunks, or the version of a prompt."""
        if stage is Stage.TEXT:
            units = {video.prompt} if video.encoded < video.prompt else set()
        elif stage is Stage.START:
            units = set() if video.is_started else {0}
        elif stage is Stage.DENOISE:
            able = video.is_started and video.encoded == video.prompt and video.denoised < video.course.chunks
            units = {video.denoised} if able and self._has_room(video) else set()
        elif stage is Stage.DECODE:
            units = video.to_decode
        else:
            units = {video.ready} & video.to_write if video.course.writes else set()
        return {unit for unit in units if (stage, unit) not in video.running}

    def _has_room(self, video: _Video) -> bool:
        return video.denoised - video.delivered < self.limits.undelivered

    def _hand_out(self, key: int, video: _Video, stage: Stage, unit: int, worker: str) -> Task:
        self._tasks += 1
        self.handed_out[stage] += 1
        task = Task(self._tasks, key, stage, unit, video.prompt, worker)
        if stage is Stage.DECODE:
            video.to_decode.remove(unit)
        elif stage is Stage.WRITE:
            video.to_write.remove(unit)
        video.running.add((stage, unit))
        video.turns[stage] = self._tasks
        self._running[task.number] = task
        return task

    def _take_back(self, task: Task) -> bool:
        if self._running.pop(task.number, None) is None:
            return False
        self._videos[task.video].running.remove((task.stage, task.chunk))
        return True

    def _end_if_finished(self, key: int, video: _Video) -> None:
        if video.delivered == video.course.chunks:
            self._end(key, Status.FINISHED)

    def _end(self, key: int, status: Status) -> None:
        video = self._videos.get(key)
        if video is None or video.status.has_ended:
            return
        if video.status is Status.WAITING:
            self._waiting.remove(key)
        video.status = status
        self._ended.append(key)
