"""Unit, without Ray: many videos under random completions, errors, deaths, cancellations, prompts and readers.

Everything runs in one event loop, and hypothesis says what happens next, so no test depends on time.
"""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helios_cp.config.request import Request
from launchers.cluster.faults import PayloadLostError, WorkerLostError
from launchers.cluster.worker import Payload
from launchers.driver.conductor import Conductor
from launchers.driver.crew import PipelineError
from launchers.driver.handle import VideoHandle
from launchers.driver.submission import Submission
from launchers.driver.video import Video
from launchers.messages.messages import Decoded, NextStart, Text, Written
from launchers.schedule.pool import Pool
from launchers.schedule.terms import Limits, Stage
from tests.launchers.stand_ins import SPAN, Numbers, StandIn

WORKERS = {
    "text": {Stage.TEXT: 1},
    "group-0": {Stage.DENOISE: 1},
    "group-1": {Stage.DENOISE: 1},
    "decoder-0": {Stage.DECODE: 1, Stage.START: 1},
    "decoder-1": {Stage.DECODE: 2, Stage.START: 1},
    "writer": {Stage.WRITE: 2},
}
STAGES = {
    "encode": Stage.TEXT,
    "start": Stage.START,
    "denoise": Stage.DENOISE,
    "decode": Stage.DECODE,
    "write": Stage.WRITE,
    "close": Stage.WRITE,
}
BUSY = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
"""A busy machine is no fault of the schedule."""

OFTEN = ("complete",) * 4
ACTIONS = (*OFTEN, "payload", "spoil", "lose", "restore", "cancel", "prompt", "hold", "stop", "want", "take", "add")

STEPS = 40
"""Rounds of the event loop after which nothing moves by itself any more."""


@dataclass(eq=False)
class Player(StandIn):
    """A worker of `world` that holds every call until the world answers it."""

    world: World | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.held = set(STAGES)

    def call(self, method, arguments, results=1, thread=None, gang=False) -> Awaitable[list[Payload]]:
        if method in STAGES:
            try:
                self.world.check_call(self, method, arguments)
            except AssertionError as error:  # a worker's error would end its video alone
                self.world.faults.append(error)
        return super().call(method, arguments, results, thread, gang)

    def _denoise(self, job, text, before):
        chunk = self.world.first(job.video) if before is None else before.state
        self.world.denoised[job.video].append((chunk, job.prompt))
        self.world.arrays.append(Numbers(np.zeros((1, 1, 1, 1, 1), np.float32)))
        return [NextStart(chunk + 1, SPAN), self.world.arrays[-1]]

    def _encode(self, request, is_guided, first):
        return [Text(None, None, SPAN)]

    def _start(self, request, media):
        return [NextStart(0, SPAN)]

    def _decode(self, latents, fps, before, segments, frames):
        return [Decoded((), SPAN), None]

    def _write(self, files, chunk, *_):
        self.world.written[files.video].append(chunk)
        return [Written(SPAN)]

    def _close(self, files):
        self.world.closed[files.video] += 1
        return [Written(SPAN)]


@dataclass(frozen=True)
class Plan:
    """A video to be made: see `Submission`."""

    chunks: int
    starts: bool = False
    decodes: bool = True
    writes: bool = True
    streams: bool = False


class World:
    """Plays the workers and the readers, and notes what really happened to every chunk."""

    def __init__(self, limits: Limits, workers=WORKERS) -> None:
        self.limits = limits
        self.conductor = Conductor("model", limits, False, lambda _: None)
        self.conductor._loop.close()
        self.crew = self.conductor.crew
        self.workers = {
            name: Player(name, capacity, None, is_gang="group" in name, world=self)
            for name, capacity in workers.items()
        }
        self.crew.start(self.workers)
        for name in workers:
            self.restore(name)
        self.plans: dict[int, Plan] = {}
        self.handles: dict[int, VideoHandle] = {}
        self.videos: dict[int, Video] = {}
        self.denoised: dict[int, list[tuple[int, int]]] = {}
        self.written: dict[int, list[int]] = {}
        self.closed: Counter[int] = Counter()
        self.read: set[int] = set()
        self.may_fail: set[int] = set()
        self.held: set[int] = set()
        self.order: list[tuple[int, Stage, str]] = []
        self.faults: list[AssertionError] = []
        self.arrays: list[Numbers] = []

    # What happens

    async def add(self, plan: Plan) -> int:
        key = len(self.plans)
        self.plans[key], self.denoised[key], self.written[key] = plan, [], []
        handle = VideoHandle(None, key, streams=plan.streams, keep_latents=False, on_chunk=None)
        self.handles[key] = handle
        request = Request(prompt=("a fox",), num_frames=33 * plan.chunks, image=__file__ if plan.starts else None)
        output = (Path("a.mp4"),) if plan.writes else ()
        submission = Submission(
            request, output, streams=plan.streams, decodes=plan.decodes or plan.writes, starts=plan.starts
        )
        self.conductor._add(handle, submission)
        self.videos[key] = self.conductor._videos[key]
        await self.settle()
        return key

    async def settle(self) -> None:
        for _ in range(STEPS):
            await asyncio.sleep(0)
        self.check_bounds()

    def in_hand(self) -> list[tuple[Player, tuple]]:
        return [(worker, call) for worker in self.workers.values() for call in worker.waiting]

    def complete(self, worker: Player, call: tuple, error: Exception | None = None) -> None:
        worker.waiting.remove(call)
        if error is None:
            worker.answer(*call)
        else:
            call[2].set_exception(error)

    def restore(self, name: str) -> None:
        worker = self.workers[name]
        if not worker.is_ready:
            self.crew.told(worker, worker.life, "ready", [])

    def lose(self, name: str) -> None:
        worker = self.workers[name]
        worker.deaths = 0  # this is not about giving up
        self.crew.told(worker, worker.life, "lost", WorkerLostError("killed"))

    def take(self, key: int) -> bool:
        """A reader takes a chunk."""
        handle = self.handles[key]
        if not handle._chunks or key not in self.conductor._videos:
            return False
        handle._chunks.popleft()
        self.videos[key].taken()
        return True

    def want(self, key: int) -> None:
        self.read.add(key)
        if key in self.conductor._videos:
            self.videos[key].wanted()
            self.conductor._admit()

    def act(self, action: str, pick: Callable[[list], Any]) -> None:
        calls, keys = self.in_hand(), sorted(self.plans)
        if action in ("complete", "payload", "spoil") and calls:
            worker, call = pick(calls)
            if action == "complete":
                self.complete(worker, call)
            elif action == "payload":
                self.complete(worker, call, PayloadLostError("gone"))
            elif call[0] != "close":
                self.may_fail.add(self.video_of(worker, call))
                self.complete(worker, call, ArithmeticError("spoilt"))
        elif action in ("lose", "restore"):
            getattr(self, action)(pick(sorted(self.workers)))
        elif action in ("cancel", "prompt", "hold", "stop", "want", "take") and keys:
            key = pick(keys)
            if action == "want":
                self.want(key)
            elif action == "take":
                self.take(key)
            elif key in self.conductor._videos and action in ("prompt", "hold", "stop"):
                self.steer(self.videos[key], action)
            elif key in self.conductor._videos and len(self.may_fail) < 2:
                self.may_fail.add(key)
                self.videos[key].task.cancel()

    def steer(self, video: Video, action: str) -> None:
        if action == "stop":
            video.stop()
        elif action == "hold":
            self.held.add(video.key)
            video.allow(video.begun)
        elif video.begun < video.chunks:
            assert video.change_prompt("an owl", 2) == video.begun

    def video_of(self, worker: Player, call: tuple) -> int:
        """Whose call it is: those of one worker and stage are sent in the order of the attempts in hand."""
        stage = STAGES[call[0]]
        same = [each for each in worker.waiting if STAGES[each[0]] is stage]
        units = [unit for name, unit in self.crew.in_hand.values() if name == worker.name and unit.stage is stage]
        return units[same.index(call)].video

    async def drain(self, order: list[int] | None = None) -> None:
        """Let everything come to its end. The streams are read one after the other in `order`, the last first by
        default: none may wait for the reader of another one, and no file for any."""
        order = sorted(self.plans, reverse=True) if order is None else order
        while self.conductor._videos:
            for name in self.workers:
                self.restore(name)
            for video in self.conductor._videos.values():
                video.allow(video.chunks)
            await self.settle()
            left = [key for key in order if key in self.conductor._videos]
            if calls := self.in_hand():
                self.complete(*calls[0])
            elif left:
                assert all(self.plans[key].streams for key in left), "a file waits for the reader of a stream"
                self.want(left[0])
                taken = self.take(left[0])
                await self.settle()
                assert taken or self.in_hand() or left[0] not in self.conductor._videos, "nothing moves"
        await self.settle()

    # What must hold

    def first(self, video: int) -> int:
        return 0

    def check_call(self, worker: Player, method: str, arguments: list) -> None:
        stage = STAGES[method]
        in_use = sum(STAGES[each[0]] is stage for each in worker.waiting)
        assert in_use < self.workers[worker.name].capacity[stage], "a worker has too much in hand"
        assert worker.is_ready
        if stage is Stage.DENOISE:
            key = arguments[0].video
            assert arguments[0].prompt == self.videos[key]._version, "an old prompt"
            assert arguments[1] is not None and (arguments[2] is not None or not self.plans[key].starts)
            self.order.append((key, stage, worker.name))

    def check_bounds(self) -> None:
        for fault in self.faults:
            raise fault
        for key, video in self.conductor._videos.items():
            in_hand = [unit for _, unit in self.crew.in_hand.values() if unit.video == key]
            denoising = sum(unit.stage is Stage.DENOISE for unit in in_hand)
            assert video.denoised + denoising - video.delivered <= self.limits.undelivered
        under_way = [key for key, video in self.conductor._videos.items() if video.admitted.is_set()]
        streams = sum(self.plans[key].streams for key in under_way)
        allowed = 2 * self.limits.active + len(self.read) + len(self.may_fail) + len(self.held)
        assert len(under_way) <= allowed
        assert streams <= self.limits.active + len(self.read) + len(self.may_fail)

    def check_outcome(self) -> None:
        for key, plan in self.plans.items():
            chunks, handle = list(range(self.videos[key].chunks)), self.handles[key]
            done = [chunk for chunk, _ in self.denoised[key]]
            assert done == chunks[: len(done)], "a chunk before its predecessor, lost or denoised twice"
            assert self.written[key] == chunks[: len(self.written[key])], "out of order, lost or written twice"
            versions = [version for _, version in self.denoised[key]]
            assert versions == sorted(versions), "an old prompt came back"
            assert handle.is_done
            if handle._error is not None:
                assert key in self.may_fail and isinstance(handle._error, CancelledError | ArithmeticError)
                assert self.closed[key] or not self.written[key], "its files are finished"
            else:
                assert done == chunks and self.written[key] == (chunks if plan.writes else [])
                assert self.closed[key] <= (len(chunks) < plan.chunks), "only what was stopped is closed by itself"
        assert not self.crew.in_hand and not self.crew._homes and not self.conductor._endings
        assert not any(self.crew.pool._used.values()) and not any(map(self.crew.pool.waiting, Stage))


def in_a_loop(play: Coroutine) -> Any:
    return asyncio.run(asyncio.wait_for(play, 300))


@pytest.fixture(autouse=True)
def without_store(monkeypatch):
    monkeypatch.setattr(Payload, "put_again", lambda self: None)


plans = st.builds(
    Plan,
    st.integers(1, 6),
    starts=st.booleans(),
    decodes=st.booleans(),
    writes=st.booleans(),
    streams=st.booleans(),
)
limits = st.builds(Limits, undelivered=st.integers(1, 4), active=st.integers(1, 3), attempts=st.just(10**6))


async def play(limits: Limits, data: st.DataObject, first: list[Plan]) -> World:
    world = World(limits)
    for plan in first:
        await world.add(plan)
    for action in data.draw(st.lists(st.sampled_from(ACTIONS), max_size=80)):
        if action == "add" and len(world.plans) < 6:
            await world.add(data.draw(plans))
        world.act(action, lambda items: items[data.draw(st.integers(0, len(items) - 1))])
        await world.settle()
    await world.drain(data.draw(st.permutations(sorted(world.plans))))
    return world


@settings(max_examples=60, **BUSY)
@given(limits, st.lists(plans, min_size=1, max_size=3), st.data())
def test_nothing_is_lost_doubled_or_out_of_order(limits, first, data):
    in_a_loop(play(limits, data, first)).check_outcome()


def test_a_unit_that_kills_its_workers_ends_its_video_alone():
    async def run() -> World:
        world = World(Limits(attempts=2))
        for _ in range(2):
            await world.add(Plan(2, decodes=False, writes=False))
        world.complete(*world.in_hand()[0])
        await world.settle()
        world.complete(*world.in_hand()[0])
        await world.settle()
        for _ in range(2):
            name = next(worker.name for worker, call in world.in_hand() if call[1][0].video == 0)
            world.lose(name)
            await world.settle()
            world.restore(name)
            await world.settle()
        await world.drain()
        return world

    world = in_a_loop(run())
    error = world.handles[0]._error
    assert isinstance(error, PipelineError) and str(error) == "chunk 0: its workers died 2 times, so it was given up"
    assert world.handles[1]._result is not None


async def straight(world: World, *first: Plan, without: str = "") -> World:
    """No faults; calls of one method are never answered."""
    for plan in first:
        await world.add(plan)
    while able := [(worker, call) for worker, call in world.in_hand() if call[0] != without]:
        world.complete(*able[0])
        await world.settle()
    return world


def test_a_stuck_decoder_stops_the_denoiser():
    world = in_a_loop(straight(World(Limits(undelivered=3)), Plan(50), without="decode"))
    assert len(world.order) == 3


def test_the_checks_see_a_video_without_bound(monkeypatch):
    monkeypatch.setattr(Video, "_is_full", property(lambda self: False))
    with pytest.raises(AssertionError):
        in_a_loop(straight(World(Limits(undelivered=3)), Plan(50), without="decode"))


def test_the_checks_see_places_without_bound(monkeypatch):
    monkeypatch.setattr(Pool, "_free", lambda self, stage: [n for n, c in self._capacity.items() if stage in c])
    with pytest.raises(AssertionError):
        in_a_loop(straight(World(Limits()), *[Plan(3)] * 4))


def test_the_checks_see_chunks_that_do_not_wait_for_those_before(monkeypatch):
    finish = Video._finish
    monkeypatch.setattr(Video, "_finish", lambda self, chunk, made, before: finish(self, chunk, made, None))

    async def run() -> World:
        """The decoder of the second chunk is quicker."""
        world = World(Limits())
        await straight(world, Plan(2), without="decode")
        world.complete(*next(each for each in world.in_hand() if each[0].name == "decoder-1"))
        await world.settle()
        await world.drain()
        return world

    with pytest.raises(AssertionError):
        in_a_loop(run()).check_outcome()


def test_the_checks_see_streams_that_hold_up_others(monkeypatch):
    """If videos that wait for their readers counted as busy, the third would never begin."""
    monkeypatch.setattr(Video, "is_held", False)

    async def run() -> None:
        world = World(Limits(active=2))
        await straight(world, *[Plan(10, writes=False, streams=True)] * 3)
        await world.drain()

    with pytest.raises(AssertionError, match="nothing moves"):
        in_a_loop(run())


def test_streams_that_nobody_reads_wait_for_their_turn():
    """However many there are: only those in the first places, and those that are read, take memory."""

    async def run() -> World:
        world = World(Limits(active=2, undelivered=3))
        for _ in range(10):
            await world.add(Plan(10, writes=False, streams=True))
        world.want(7)
        return await straight(world)

    world = in_a_loop(run())
    assert [world.videos[key].ready for key in range(10)] == [3, 3, 0, 0, 0, 0, 0, 3, 0, 0]


def test_videos_take_turns():
    """Two long videos share one group evenly, and a third is not kept waiting by them for ever."""
    world = World(Limits(active=2), {**WORKERS, "group-1": {}})
    in_a_loop(straight(world, Plan(20), Plan(20), Plan(2))).check_outcome()
    denoised = [video for video, _, _ in world.order]
    assert Counter(denoised) == {0: 20, 1: 20, 2: 2}
    assert all(abs(Counter(denoised[:n])[0] - Counter(denoised[:n])[1]) <= 1 for n in range(1, 30))


def test_a_new_prompt_holds_from_the_next_chunk_on():
    """Also for a chunk that waits for a place already."""

    async def run() -> World:
        world = World(Limits(), {**WORKERS, "group-1": {}})
        first = await world.add(Plan(4, decodes=False, writes=False))
        await world.add(Plan(4, decodes=False, writes=False))
        while len(world.denoised[first]) < 2:
            world.complete(*world.in_hand()[0])
            await world.settle()
        assert world.crew.pool.waiting(Stage.DENOISE) == 1, "its third chunk waits for the other video"
        world.videos[first].change_prompt("an owl", 1)
        await world.drain()
        return world

    world = in_a_loop(run())
    assert world.denoised == {0: [(0, 0), (1, 0), (2, 1), (3, 1)], 1: [(chunk, 0) for chunk in range(4)]}


def test_an_error_of_the_work_restarts_its_worker():
    """After an error of CUDA every later call of that process fails, so the next video needs a new one."""

    async def run(stage: Stage, error: Exception) -> tuple[World, Player]:
        world = World(Limits())
        await world.add(Plan(1))
        await world.add(Plan(1))
        while not (found := [each for each in world.in_hand() if STAGES[each[1][0]] is stage]):
            world.complete(*world.in_hand()[0])
            await world.settle()
        worker, call = found[0]
        world.complete(worker, call, error)
        await world.settle()
        await world.drain()
        return world, worker

    for stage in (Stage.TEXT, Stage.DENOISE, Stage.DECODE, Stage.WRITE):
        world, worker = in_a_loop(run(stage, RuntimeError("CUDA error: an illegal memory access was encountered")))
        ended = [handle._error for handle in world.handles.values()]
        assert sum(error is None for error in ended) == 1 and "illegal memory" in str(ended), "it ends its video alone"
        assert worker.starts == 2, stage
    _, worker = in_a_loop(run(Stage.TEXT, ValueError("no such layer")))
    assert worker.starts == 2
    _, worker = in_a_loop(run(Stage.WRITE, OSError(28, "No space left on device")))
    assert worker.starts == 1, "a full disk does not spoil the writer"


def test_a_handle_keeps_no_chunk_of_a_video_that_failed():
    """Its error has frames, and these had the arrays in shared memory."""

    async def run() -> tuple[World, list]:
        world = World(Limits())
        await world.add(Plan(3))
        await straight(world, without="decode")
        arrays = [weakref.ref(values) for values in world.arrays]
        world.complete(*next(each for each in world.in_hand() if each[1][0] == "decode"), ArithmeticError("spoilt"))
        await world.settle()
        await world.drain()
        return world, arrays

    world, arrays = in_a_loop(run())
    world.arrays.clear()
    world.videos.clear()
    for worker in world.workers.values():
        worker.under_way.clear()
    gc.collect()
    assert isinstance(world.handles[0]._error, ArithmeticError)
    assert len(arrays) == 3 and not any(array() is not None for array in arrays)


# The pool alone


def test_a_place_that_nobody_waits_for_any_more_is_given_on():
    """Whoever is cancelled before or in the moment in which a place is given leaves it to the next."""

    async def run() -> None:
        pool = Pool()
        pool.add_worker("text", {Stage.TEXT: 1})
        for moment in ("before", "while"):
            pool.remove("text")
            first, second = (asyncio.create_task(pool.take(Stage.TEXT)) for _ in range(2))
            await asyncio.sleep(0)
            if moment == "while":
                pool.restore("text")
            first.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            pool.restore("text")
            assert await second == "text" and pool.waiting(Stage.TEXT) == 0
            pool.release("text", Stage.TEXT)
            assert not any(pool._used.values())

    in_a_loop(run())


def test_home_is_preferred_where_it_is_free():
    async def run() -> list[str]:
        pool = Pool()
        for name in ("group-0", "group-1"):
            pool.add_worker(name, {Stage.DECODE: 1})
            pool.restore(name)
        return [await pool.take(Stage.DECODE, "group-1") for _ in range(2)]

    assert in_a_loop(run()) == ["group-1", "group-0"]
