"""Unit, without Ray or torch: the schedule under random completions, failures, deaths, cancellations and prompts."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launchers.schedule.schedule import Schedule
from launchers.schedule.terms import Course, Limits, Stage, Status

WORKERS = {
    "text": {Stage.TEXT: 1},
    "group-0": {Stage.DENOISE: 1},
    "group-1": {Stage.DENOISE: 1},
    "decoder-0": {Stage.DECODE: 1, Stage.START: 1},
    "decoder-1": {Stage.DECODE: 2, Stage.START: 1},
    "writer": {Stage.WRITE: 2},
}
BUSY = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
"""A busy machine is no fault of the schedule."""

OFTEN = ("complete",) * 4
ACTIONS = (*OFTEN, "fail", "lose", "restore", "cancel", "prompt", "want", "take", "add")


class World:
    """Plays the workers, and writes down what really happened to every chunk."""

    def __init__(self, schedule: Schedule, workers=WORKERS) -> None:
        self.schedule = schedule
        for name, capacity in workers.items():
            schedule.add_worker(name, capacity)
            schedule.restore(name)
        self.workers = workers
        self.hand: list = []
        self.stale: list = []
        self.courses: dict[int, Course] = {}
        self.progress: dict[int, Counter] = {}
        self.written: dict[int, list[int]] = {}
        self.prompts: dict[int, dict[int, int]] = {}
        self.wanted: Counter = Counter()
        self.read: set[int] = set()
        self.taken: Counter = Counter()
        self.ended: dict[int, Status] = {}
        self.spoilt: set[int] = set()
        self.order: list = []

    def add(self, course: Course) -> int:
        key = len(self.courses)
        self.courses[key] = course
        kept = range(course.first, course.first + course.denoised)
        self.progress[key] = Counter({(Stage.DENOISE, chunk): 1 for chunk in kept})
        self.written[key], self.prompts[key] = [], dict.fromkeys(kept, 0)
        self.schedule.add(key, course)
        return key

    def step(self) -> None:
        for task in self.schedule.dispatch():
            self.check_dispatch(task)
            self.hand.append(task)
            self.order.append(task)
        for key in self.courses:
            if key not in self.ended and self.schedule.status(key).has_ended:
                self.ended[key] = self.schedule.status(key)
        self.schedule.ended()
        self.check_bounds()

    def check_dispatch(self, task) -> None:
        progress, chunk = self.progress[task.video], task.chunk
        assert not any((t.video, t.stage, t.chunk) == (task.video, task.stage, chunk) for t in self.hand), (
            "in hand twice"
        )
        in_use = Counter(t.worker for t in self.hand if t.stage is task.stage)
        assert in_use[task.worker] < self.workers[task.worker][task.stage], "a worker has too much in hand"
        assert task.video not in self.ended
        if task.stage is Stage.DENOISE:
            first = self.courses[task.video].first
            assert all(progress[Stage.DENOISE, k] for k in range(first, chunk)), "chunk before its predecessor"
            assert progress[Stage.TEXT, task.prompt], "denoised before its prompt was encoded"
            assert not self.courses[task.video].starts or progress[Stage.START, 0]
            assert task.prompt == self.wanted[task.video]
        if task.stage is Stage.DECODE:
            assert progress[Stage.DENOISE, chunk]
        if task.stage is Stage.WRITE:
            assert progress[Stage.DECODE if self.courses[task.video].decodes else Stage.DENOISE, chunk]

    def check_bounds(self) -> None:
        under_way = set()
        for key, course in self.courses.items():
            if key in self.ended:
                continue
            denoised = course.first + sum(stage is Stage.DENOISE for stage, _ in self.progress[key])
            denoising = sum(t.video == key and t.stage is Stage.DENOISE for t in self.hand)
            most = max(self.schedule.limits.undelivered, course.denoised)
            assert denoised + denoising - self.schedule.delivered(key) <= most
            if self.schedule.status(key) is Status.RUNNING or any(t.video == key for t in self.hand):
                under_way.add(key)
        active = self.schedule.limits.active
        assert len(under_way) <= 2 * active + len(self.read)
        assert sum(self.courses[key].streams for key in under_way) <= active + len(self.read)

    def complete(self, task) -> None:
        self.hand.remove(task)
        if self.schedule.done(task):
            self.progress[task.video][task.stage, task.chunk] += 1
            if task.stage is Stage.WRITE:
                self.written[task.video].append(task.chunk)
            if task.stage is Stage.DENOISE:
                self.prompts[task.video][task.chunk] = task.prompt
        else:
            assert task.video in self.ended

    def lose(self, name: str) -> None:
        lost = self.schedule.lose(name)
        mine = [task for task in self.hand if task.worker == name]
        assert sorted(lost, key=id) == sorted(mine, key=id)
        self.hand = [task for task in self.hand if task.worker != name]
        self.stale += mine

    def act(self, action: str, pick) -> None:
        if action == "complete" and self.hand:
            self.complete(pick(self.hand))
        elif action == "fail" and self.hand:
            task = pick(self.hand)
            self.hand.remove(task)
            self.schedule.failed(task)
        elif action == "lose":
            self.lose(pick(sorted(self.workers)))
        elif action == "restore":
            self.schedule.restore(pick(sorted(self.workers)))
        elif action == "add" and len(self.courses) < 6:
            pass  # by the test, which draws the course
        elif self.courses and action in ("cancel", "prompt", "take"):
            key = pick(sorted(self.courses))
            if action == "cancel" and len(self.spoilt) < 2:
                self.spoilt.add(key)
                self.schedule.cancel(key)
            elif action == "prompt":
                version = self.schedule.update_prompt(key)
                if version is not None:
                    self.wanted[key] = version
            elif action == "want":
                self.want(key)
            elif action == "take":
                self.schedule.taken(key)

    def want(self, key: int) -> None:
        self.schedule.wanted(key)
        self.read.add(key)

    def drain(self, order: Sequence[int] | None = None) -> None:
        """Let everything come to its end. The streams are read one after the other in `order`, the last first by
        default: none may wait for the reader of another one, and no file for any."""
        for name in self.workers:
            self.schedule.restore(name)
        order = sorted(self.courses, reverse=True) if order is None else order
        for _ in range(10_000):
            self.step()
            left = [key for key in order if key not in self.ended]
            if self.hand:
                self.complete(self.hand[0])
            elif left:
                assert all(self.courses[key].streams for key in left), "a file waits for the reader of a stream"
                self.want(left[0])
                before = self.schedule.delivered(left[0])
                self.schedule.taken(left[0])
                after = self.schedule.delivered(left[0])
                self.step()
                assert self.hand or before != after, "nothing moves, and videos are not finished"
            else:
                break
        for task in self.stale:
            assert not self.schedule.done(task), "news of a task that was given up counts"

    def check_outcome(self, failures_end: bool = False) -> None:
        for key, course in self.courses.items():
            chunks = list(range(course.first, course.chunks))
            assert max(self.progress[key].values(), default=1) == 1, "something was done twice"
            if course.writes:
                assert self.written[key] == chunks[: len(self.written[key])], "out of order, lost or doubled"
            if key in self.spoilt:
                continue
            assert self.ended[key] is Status.FINISHED or (failures_end and self.ended[key] is Status.FAILED)
            if self.ended[key] is Status.FINISHED:
                assert all(self.progress[key][Stage.DENOISE, chunk] for chunk in chunks)
                assert not course.writes or self.written[key] == chunks
                versions = [self.prompts[key][chunk] for chunk in chunks]
                assert versions == sorted(versions), "an old prompt came back"


courses = st.builds(
    lambda chunks, first, denoised, **flags: Course(first + chunks, first, min(denoised, chunks), **flags),
    st.integers(1, 6),
    st.integers(0, 2),
    st.sampled_from([0, 0, 1, 3, 6]),
    starts=st.booleans(),
    decodes=st.booleans(),
    writes=st.booleans(),
    streams=st.booleans(),
)
limits = st.builds(Limits, undelivered=st.integers(1, 4), active=st.integers(1, 3), attempts=st.just(10**6))


def play(schedule: Schedule, data, first: list[Course]) -> World:
    world = World(schedule)
    for course in first:
        world.add(course)
    for action in data.draw(st.lists(st.sampled_from(ACTIONS), max_size=80)):
        if action == "add" and len(world.courses) < 6:
            world.add(data.draw(courses))
        world.act(action, lambda items: data.draw(st.sampled_from(items)))
        world.step()
    world.drain(data.draw(st.permutations(sorted(world.courses))))
    return world


@settings(max_examples=150, **BUSY)
@given(limits, st.lists(courses, min_size=1, max_size=3), st.data())
def test_nothing_is_lost_doubled_or_out_of_order(limits, first, data):
    play(Schedule(limits), data, first).check_outcome()


@settings(max_examples=60, **BUSY)
@given(st.lists(courses, min_size=1, max_size=3), st.data())
def test_too_many_attempts_end_a_video_and_no_other(first, data):
    world = play(Schedule(Limits(attempts=2)), data, first)
    world.check_outcome(failures_end=True)
    assert len(world.ended) == len(world.courses)


def straight(schedule: Schedule, first: list[Course], events: int = 200) -> World:
    """No faults; a decoder that never finishes anything."""
    world = World(schedule)
    for course in first:
        world.add(course)
    for _ in range(events):
        world.step()
        able = [task for task in world.hand if task.stage is not Stage.DECODE]
        if not able:
            break
        world.complete(able[0])
    return world


def test_a_stuck_decoder_stops_the_denoiser():
    world = straight(Schedule(Limits(undelivered=3)), [Course(50)])
    assert sum(task.stage is Stage.DENOISE for task in world.order) == 3


def test_the_checks_see_a_schedule_without_bound(monkeypatch):
    monkeypatch.setattr(Schedule, "_has_room", lambda self, video: True)
    with pytest.raises(AssertionError):
        straight(Schedule(Limits(undelivered=3)), [Course(50)])


def test_the_checks_see_news_of_a_dead_worker_that_counts(monkeypatch):
    """A schedule that forgets to take a dead worker's task back does it twice."""

    def lose(self, name):
        self._present.discard(name)
        lost = [task for task in self._running.values() if task.worker == name]
        for task in lost:
            self._videos[task.video].running.discard((task.stage, task.chunk))
        return lost

    monkeypatch.setattr(Schedule, "lose", lose)
    with pytest.raises((AssertionError, KeyError)):
        world = World(Schedule())
        world.add(Course(3))
        world.step()
        world.complete(world.hand[0])
        world.step()
        world.lose(world.hand[0].worker)
        world.drain()


def test_the_checks_see_streams_that_hold_up_others(monkeypatch):
    """A schedule that counts videos which wait for their readers as under way never begins the third."""
    monkeypatch.setattr(Schedule, "_waits_for_reader", lambda self, video: False)
    world = World(Schedule(Limits(active=2)))
    for _ in range(3):
        world.add(Course(10, writes=False, streams=True))
    with pytest.raises(AssertionError, match="nothing moves"):
        world.drain()


def test_streams_that_nobody_reads_wait_for_their_turn():
    """However many there are: only those in the first places, and those that are read, take memory."""
    schedule = Schedule(Limits(active=2, undelivered=3))
    world = World(schedule)
    for _ in range(10):
        world.add(Course(10, writes=False, streams=True))
    schedule.wanted(7)
    for _ in range(200):
        world.read.add(7)
        world.step()
        if world.hand:
            world.complete(world.hand[0])
    assert [schedule.ready(key) for key in range(10)] == [3, 3, 0, 0, 0, 0, 0, 3, 0, 0]


def test_chunks_denoised_before_are_not_denoised_again():
    world = World(Schedule(Limits(undelivered=2)))
    key = world.add(Course(8, first=1, denoised=4))
    world.drain()
    handed = Counter(task.stage for task in world.order)
    assert handed[Stage.DENOISE] == 3 and handed[Stage.DECODE] == handed[Stage.WRITE] == 7
    assert world.written[key] == list(range(1, 8))


def test_videos_take_turns():
    """Two long videos share one group evenly, and a third is not kept waiting by them for ever."""
    schedule = Schedule(Limits(active=2))
    world = World(schedule, {**WORKERS, "group-1": {}})
    for course in (Course(20), Course(20), Course(2)):
        world.add(course)
    world.drain()
    denoised = [task.video for task in world.order if task.stage is Stage.DENOISE]
    assert denoised[:10] == [0, 1] * 5
    assert Counter(denoised) == {0: 20, 1: 20, 2: 2}


def test_a_new_prompt_holds_from_the_next_chunk_on():
    schedule = Schedule()
    world = World(schedule)
    key = world.add(Course(4))
    while world.prompts[key].keys() != {0, 1}:
        world.step()
        world.complete(world.hand[0])
    world.act("prompt", min)
    world.drain()
    assert world.prompts[key] == {0: 0, 1: 0, 2: 1, 3: 1}


def test_decoding_stays_where_it_was_denoised():
    both = {Stage.DENOISE: 1, Stage.DECODE: 1}
    schedule = Schedule()
    world = World(schedule, {"text": {Stage.TEXT: 1}, "writer": {Stage.WRITE: 1}, "group-0": both, "group-1": both})
    for _ in range(2):
        world.add(Course(5))
    world.drain()
    where = {(task.video, task.chunk): task.worker for task in world.order if task.stage is Stage.DENOISE}
    for task in world.order:
        if task.stage is Stage.DECODE:
            assert task.worker == where[task.video, task.chunk]


@pytest.mark.parametrize("course", [Course(0), Course(3, first=3), Course(2, first=-1)])
def test_courses_without_chunks_are_refused(course):
    with pytest.raises(ValueError, match="at least one is needed"):
        Schedule().add(0, course)


@pytest.mark.parametrize("course", [Course(3, denoised=4), Course(3, first=2, denoised=2), Course(3, denoised=-1)])
def test_more_denoised_chunks_than_there_are(course):
    with pytest.raises(ValueError, match="cannot be denoised already"):
        Schedule().add(0, course)


def test_keys_are_used_once():
    schedule = Schedule()
    schedule.add(0, Course(1))
    with pytest.raises(ValueError, match="take another key"):
        schedule.add(0, Course(1))


def test_neither_ray_nor_torch_is_imported():
    code = "import sys, launchers.schedule.schedule; print({'ray', 'torch', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
