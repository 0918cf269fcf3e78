"""Ray, the shared cluster: a node removed and processes killed by SIGKILL, while one pipeline has videos under way.

Equality is exact: work done twice comes out the same.
"""

from __future__ import annotations

import math
import os
import random
import signal
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from ray.util.placement_group import placement_group, remove_placement_group

from helios_cp.config.layout import Layout
from launchers.driver.pipeline import ChunkPipeline, PipelineError
from launchers.driver.timeline import Event
from launchers.schedule.terms import Limits, Stage
from parallel.mesh import Degrees
from tests.launchers.conftest import PATIENCE, STORE_BYTES, frames_in, small

pytestmark = pytest.mark.ray

SHARES = {"decoder": 7, "rank": 4, "group": 4, "writer": 8, "text": 7}
"""Of thirty kills; a group takes longest to start again."""

FAULTS = int(os.environ.get("HELIOS_CP_FAULTS", "4"))
KILLS = {kind: math.ceil(FAULTS * share / 30) for kind, share in SHARES.items()}
"""One or two of each, as the node that goes takes most of them with it before; HELIOS_CP_FAULTS asks for more."""

STALLED = PATIENCE
"""Seconds without a kill or a finished chunk after which nothing moves any more: restarts included, a few on a quiet
machine."""

REQUESTS = [small(seed=(seed,), num_frames=5 * 33) for seed in range(3)]


class Videos:
    """Keeps a few videos under way, and checks each that ends."""

    def __init__(self, pipeline, expected, folder) -> None:
        self.pipeline = pipeline
        self.expected = expected
        self.folder = folder
        self.handles = []

    def keep_under_way(self, count: int) -> None:
        while sum(not handle.is_done for handle, _, _ in self.handles) < count:
            number = len(self.handles)
            request = REQUESTS[number % len(REQUESTS)]
            path = self.folder / f"{number}.mp4"
            handle = self.pipeline.submit(request, output=[path], keep_latents=True)
            self.handles.append((handle, request, path))

    def events(self) -> list[Event]:
        """What has been done of them."""
        keys = {handle.key for handle, _, _ in self.handles}
        return [event for event in list(self.pipeline.events) if event.video in keys]

    def check_all(self, progress: Progress) -> None:
        while not all(handle.is_done for handle, _, _ in self.handles):
            progress.check()
            time.sleep(0.1)
        for handle, request, path in self.handles:
            result = handle.result(timeout=PATIENCE)
            assert np.array_equal(result.latents, self.expected(request)), path.name
            assert frames_in(path) == 5 * 33, "every frame once"
        assert not list(self.folder.glob(".*")), "no partial file is left"


class Progress:
    """Fails once the pipeline has made nothing for `STALLED` seconds, however long all takes on a busy machine."""

    def __init__(self, pipeline: ChunkPipeline) -> None:
        self.pipeline = pipeline
        self.moved()

    def moved(self) -> None:
        self.latest, self.since = self._latest(), time.monotonic()

    def check(self, *facts: object) -> None:
        if self._latest() is not self.latest:
            self.moved()
        assert time.monotonic() < self.since + STALLED, (facts, self.pipeline.status())

    def _latest(self) -> object:
        events = self.pipeline.events  # another thread adds to it, so there is no going through it
        return events[-1] if events else None


class Killer:
    """Kills processes, each of them once: one that is dying already does not count again."""

    def __init__(self) -> None:
        self.killed: set[int] = set()

    def victims(self, pipeline: ChunkPipeline, kind: str) -> list[int]:
        """Living processes of a random ready worker: one of them for "rank", all for "group"; none if none is ready."""
        name = "group" if kind == "rank" else kind
        ready = [worker for worker in pipeline.workers.values() if worker.name.startswith(name) and worker.is_ready]
        pids = [place.pid for place in list(random.choice(ready).places)] if ready else []
        if self.killed & set(pids):
            return []  # the pipeline does not know yet
        return pids if kind == "group" else random.sample(pids, min(len(pids), 1))

    def kill(self, pids: list[int]) -> bool:
        """Whether there were any."""
        found = False
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            self.killed.add(pid)
            found = True
        return found


@pytest.fixture(scope="module")
def node(cluster):
    """A node with room for all workers."""
    node = cluster.add_node(num_cpus=8, object_store_memory=STORE_BYTES)
    yield node
    if node in cluster.worker_nodes:
        cluster.remove_node(node)


@pytest.fixture(scope="module")
def pipeline(model, node):
    """The first node is full when it starts, so most of it lands on the one that then goes. One group makes all videos:
    what another does meanwhile is in serve/test_cluster.py."""
    full = placement_group([{"CPU": 6, "head": 1}], strategy="STRICT_PACK")
    assert full.wait(PATIENCE)
    layout, limits = Layout(Degrees(ulysses=2)), Limits(active=4, attempts=10**6)
    with ChunkPipeline(model, decoders=2, layout=layout, limits=limits, timeout=60, patience=PATIENCE) as pipeline:
        pipeline.wait_until_ready(PATIENCE)
        remove_placement_group(full)
        yield pipeline


@pytest.fixture(scope="module")
def undisturbed(pipeline, alone):
    """The latents of each request before anything dies."""
    found = {}
    for request in REQUESTS:
        found[request] = pipeline.submit(request, decode=False, keep_latents=True).result(PATIENCE).latents
        reference = alone(request)
        assert np.abs(found[request] - reference).max() <= 1e-4 * (reference.max() - reference.min())
    return found


def test_a_node_goes(cluster, node, pipeline, undisturbed, tmp_path):
    gone = [w.name for w in pipeline.workers.values() if any(p.node == node.node_id for p in w.places)]
    assert gone, {w.name: w.places for w in pipeline.workers.values()}
    before = pipeline.crew.pool.handed_out.copy()
    videos, progress = Videos(pipeline, undisturbed.__getitem__, tmp_path), Progress(pipeline)
    videos.keep_under_way(3)
    while not any(event.stage == "write" for event in videos.events()):
        progress.check()
        time.sleep(0.01)
    cluster.remove_node(node, allow_graceful=False)
    videos.keep_under_way(4)
    videos.check_all(progress)
    denoised = Counter((event.video, event.chunk) for event in videos.events() if event.stage == "denoise")
    chunks = 5 * len(videos.handles)
    assert len(denoised) == chunks and set(denoised.values()) == {1}, "finished work is not redone"
    in_flight = sum(name.startswith("group") for name in gone)
    # A video's next chunk is handed out once more where what it starts from went with the node before it began.
    handed_out = pipeline.crew.pool.handed_out - before
    assert handed_out[Stage.DENOISE] <= chunks + in_flight + len(videos.handles)
    while any(place.node == node.node_id for w in pipeline.workers.values() for place in w.places if w.is_ready):
        progress.check()  # one that had nothing left to do is missed last
        time.sleep(0.1)


def test_kills_at_random_moments(pipeline, undisturbed, tmp_path):
    """Of decoders, ranks, whole groups, the writer and the text encoder."""
    random.seed(5)
    before = pipeline.crew.pool.handed_out.copy()
    videos = Videos(pipeline, undisturbed.__getitem__, tmp_path)
    left, killer, progress = dict(KILLS), Killer(), Progress(pipeline)
    while sum(left.values()):
        progress.check(left)
        kind = max(left, key=lambda kind: left[kind] / KILLS[kind] + random.random() / 4)
        victims = killer.victims(pipeline, kind) if left[kind] else []
        if victims:
            videos.keep_under_way(3)
        time.sleep(random.uniform(0.0, 0.3))
        if killer.kill(victims):
            left[kind] -= 1
            progress.moved()
    videos.check_all(progress)

    handed_out = pipeline.crew.pool.handed_out - before
    chunks = 5 * len(videos.handles)
    assert chunks <= handed_out[Stage.DENOISE] <= chunks + KILLS["rank"] + KILLS["group"], "only what was in hand"
    assert chunks <= handed_out[Stage.DECODE] <= chunks + KILLS["decoder"]
    assert chunks <= handed_out[Stage.WRITE] <= chunks + 4 * KILLS["writer"]


def test_work_that_kills_its_workers_is_given_up(pipeline, monkeypatch):
    """After so many attempts its video fails and says so; the chunk takes long enough to be hit every time."""
    crew = pipeline.crew
    monkeypatch.setattr(crew, "limits", replace(crew.limits, attempts=2))
    slow = small(height=256, width=256, pyramid_num_inference_steps_list=(1000, 1000, 1000))
    handle = pipeline.submit(slow, decode=False)
    killer, progress = Killer(), Progress(pipeline)
    while not handle.is_done:
        progress.check()
        for name in denoising(pipeline):
            killer.kill([place.pid for place in pipeline.workers[name].places[:1] if place.pid not in killer.killed])
        time.sleep(0.1)
    with pytest.raises(PipelineError, match="died 2 times"):
        handle.result(PATIENCE)
    assert len(killer.killed) == 2


def denoising(pipeline: ChunkPipeline) -> list[str]:
    """The groups that have a chunk in hand."""
    workers = pipeline.status()["workers"]
    return [worker["name"] for worker in workers if any(task.startswith("denoise") for task in worker["in hand"])]
