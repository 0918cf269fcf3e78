"""Unit, without a cluster: how a worker starts and stops, with Ray's calls replaced, and what its errors mean."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    ObjectLostError,
    RayTaskError,
    RuntimeEnvSetupError,
    UnserializableException,
    WorkerCrashedError,
)

from launchers.cluster import worker as module
from launchers.cluster.cluster import STARTS, ClusterError, Needs, connected
from launchers.cluster.faults import PayloadLostError, StartError, WorkerLostError, fault_of, start_fault_of
from launchers.cluster.worker import Recipe, Worker
from launchers.messages.messages import ActorInfo
from launchers.messages.versions import VersionError, check_versions, own_versions
from launchers.schedule.terms import Stage

PATIENCE = 300
"""Seconds for what takes none."""


class Rank:
    """Stands for an actor's class."""


class Group:
    """A placement group that has room after so many looks."""

    def __init__(self, looks: int) -> None:
        self.looks = looks
        self.waits: list[float] = []

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        return len(self.waits) >= self.looks


class Ray:
    """Counts what is reserved and created; `before` is called with "group" or "actor" as soon as there is one."""

    def __init__(self, monkeypatch, looks: int = 1, versions: dict | None = None) -> None:
        self.looks = looks
        self.groups: list = []
        self.actors: list = []
        self.removed: list = []
        self.killed: list = []
        self.hangs = False
        self.after = lambda kind: None
        self.versions = own_versions() if versions is None else versions
        monkeypatch.setattr(module, "placement_group", self.placement_group)
        monkeypatch.setattr(module, "remove_placement_group", self.removed.append)
        monkeypatch.setattr(module, "PlacementGroupSchedulingStrategy", lambda *_: None)
        monkeypatch.setattr(module, "shortage", lambda name, needs: f"{name} needs {needs}")
        monkeypatch.setattr(module, "ray", self)

    def placement_group(self, bundles, strategy):
        self.groups.append(Group(self.looks))
        self.after("group")
        return self.groups[-1]

    def remote(self, **_):
        def make(kind):
            return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self.create))

        return make

    def create(self):
        never = SimpleNamespace(future=lambda: SimpleNamespace(add_done_callback=lambda _: None))
        watch = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: never))
        load = SimpleNamespace(remote=lambda: None)
        actor = SimpleNamespace(load=load, rendezvous=load, watch=watch)
        self.actors.append(actor)
        self.after("actor")
        return actor

    def get(self, references, timeout):
        if self.hangs:
            raise GetTimeoutError
        return [ActorInfo("far", "node", 1, self.versions) for _ in references]

    def kill(self, actor) -> None:
        self.killed.append(actor)


@pytest.fixture
def news():
    return []


@pytest.fixture
def worker(news):
    return gang(1, news)


def until(is_so) -> None:
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("moment", ["group", "actor"])
def test_a_stop_in_the_middle_of_a_start_leaves_nothing(monkeypatch, worker, moment):
    """It comes when the cluster has given something of which the worker does not know yet."""
    ray = Ray(monkeypatch)
    is_there, go_on = threading.Event(), threading.Event()

    def after(kind: str) -> None:
        if kind == moment:
            is_there.set()
            go_on.wait(PATIENCE)

    ray.after = after
    worker.start()
    assert is_there.wait(PATIENCE)
    worker.stop()
    go_on.set()
    until(lambda: ray.killed == ray.actors and ray.removed == ray.groups)
    assert len(ray.groups) == 1 and len(ray.actors) == (moment == "actor")


def test_a_stop_gives_everything_back(monkeypatch, worker, news):
    ray = Ray(monkeypatch)
    worker.start()
    until(lambda: news)
    assert news[0][:2] == (1, "ready")
    worker.stop()
    assert ray.killed == ray.actors and ray.removed == ray.groups and len(ray.actors) == len(ray.groups) == 1


def test_the_first_start_waits_for_its_patience(monkeypatch, worker, news):
    ray = Ray(monkeypatch, looks=3)
    worker.start()
    until(lambda: len(news) == 2)
    assert [event for _, event, _ in news] == ["unplaced", "ready"]
    assert ray.groups[0].waits[0] == 15 and "group-0 needs 1 CPU" in news[0][2]


def test_a_restart_tells_within_fifteen_seconds_and_gives_up_within_ninety(monkeypatch, worker, news):
    ray = Ray(monkeypatch, looks=10)
    worker.life = 1
    worker.start()
    until(lambda: len(news) == 3)
    assert [event for _, event, _ in news] == ["short", "unplaced", "ready"]
    assert ray.groups[0].waits[0] <= 15 and sum(ray.groups[0].waits[:2]) <= 90
    assert "group-0 needs 1 CPU" in news[0][2]


def test_a_short_patience_holds_for_the_first_start_alone(monkeypatch, worker, news):
    ray = Ray(monkeypatch, looks=2)
    worker.patience = 1.0
    worker.start()
    until(lambda: len(news) == 2)
    assert ray.groups[0].waits[0] == 1 and news[0][1] == "unplaced"


def test_another_version_on_a_node_is_told(monkeypatch, worker, news):
    Ray(monkeypatch, versions={**own_versions(), "torch": "1.0.0"})
    worker.start()
    until(lambda: news)
    (_, event, error) = news[0]
    assert event == "broken" and isinstance(error, VersionError)
    assert "far has torch 1.0.0, the driver has" in str(error)


def test_builds_of_one_version_are_the_same():
    assert "+" not in own_versions()["torch"]
    check_versions([ActorInfo("far", "node", 1, own_versions())], own_versions())
    with pytest.raises(VersionError, match="far has ray None"):
        check_versions([ActorInfo("far", "node", 1, {**own_versions(), "ray": None})], own_versions())


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_start_that_hangs_is_told(monkeypatch, news, ranks):
    """An actor that never loads, and a gang whose first rank never says where to meet."""
    ray = Ray(monkeypatch)
    ray.hangs = True
    worker = gang(ranks, news)
    worker.start()
    until(lambda: news)
    (_, event, error) = news[0]
    assert event == "lost" and isinstance(error, StartError) and error.attempts == 2
    assert re.fullmatch(r"group-0 did not .* within \d+ s", str(error))


def gang(ranks: int, news: list) -> Worker:
    recipe = Recipe("group-0", ((Rank, (), 0),) * ranks, Needs(({"CPU": 1},)), {Stage.DENOISE: 1})
    return Worker(recipe, lambda worker, life, event, value: news.append((life, event, value)), patience=15.0)


class Reference:
    """Stands for `ObjectRef`."""

    def __init__(self) -> None:
        self._future = Future()

    def future(self) -> Future:
        return self._future


class Actor:
    """Takes a call by `denoise`, or refuses to be sent one."""

    def __init__(self, refusal: Exception | None = None) -> None:
        self.sent: list[Reference] = []
        self.refusal = refusal
        self.denoise = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self.remote))

    def remote(self) -> Reference:
        if self.refusal is not None:
            raise self.refusal
        self.sent.append(Reference())
        return self.sent[-1]


def test_a_call_of_a_worker_that_is_not_there(worker):
    with pytest.raises(WorkerLostError, match="group-0 is not there"):
        worker.call("denoise", [], gang=True)


def test_a_call_that_reached_some_ranks_is_a_lost_gang(worker):
    """They wait for the others, so they must not count as free. What no rank got is an error of the call."""
    worker._actors = [Actor(), Actor(ConnectionError("no way\nthere"))]
    with pytest.raises(WorkerLostError, match="group-0: denoise reached 1 of 2 ranks: no way there"):
        worker.call("denoise", [], gang=True)
    worker._actors.reverse()
    with pytest.raises(ConnectionError, match="no way"):
        worker.call("denoise", [], gang=True)


def test_a_gang_has_answered_once_all_ranks_have(monkeypatch, worker):
    ray = Ray(monkeypatch)
    worker._actors = [Actor(), Actor()]

    async def play() -> list:
        answer = asyncio.ensure_future(worker.call("denoise", [], gang=True))
        worker._actors[0].sent[0].future().set_result(None)
        await asyncio.sleep(0.01)
        assert not answer.done()
        worker._actors[1].sent[0].future().set_result(None)
        return await answer

    ray.get = lambda references, timeout: ["a result"] * len(references)
    (payload,) = asyncio.run(play())
    assert payload.value == "a result" and payload.reference is worker._actors[0].sent[0]


def test_the_first_error_of_a_gang_is_told_at_once(worker):
    worker._actors = [Actor(), Actor()]

    async def play() -> None:
        answer = asyncio.ensure_future(worker.call("denoise", [], gang=True))
        worker._actors[1].sent[0].future().set_exception(raised(ArithmeticError("not a number")))
        await answer

    with pytest.raises(ArithmeticError, match="not a number"):
        asyncio.run(play())


def test_a_stop_fails_the_calls_under_way(monkeypatch, worker):
    Ray(monkeypatch)
    worker._actors = [Actor()]

    async def play() -> None:
        answer = asyncio.ensure_future(worker.call("denoise", []))
        await asyncio.sleep(0)
        worker.stop()
        await answer

    with pytest.raises(WorkerLostError, match="group-0 was stopped"):
        asyncio.run(play())


def raised(error: Exception) -> Exception:
    """As it comes from a worker."""
    return RayTaskError("denoise", "Traceback ...\n" + repr(error), error)


@pytest.mark.parametrize("error", [WorkerCrashedError(), ActorUnavailableError("gone", b"0" * 16)])
def test_deaths(error):
    assert type(fault_of(error)) is WorkerLostError is type(start_fault_of(error))


def test_a_lost_payload_is_no_death_unless_at_a_start():
    error = ObjectLostError("0" * 56, "", "")
    assert isinstance(fault_of(error), PayloadLostError)
    assert isinstance(start_fault_of(error), WorkerLostError)


def test_only_ranks_of_a_gang_lose_each_other():
    """An error of a rank's own that only sounds like that is no lost connection."""
    error = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer")
    assert fault_of(raised(error)) is error
    assert isinstance(fault_of(raised(error), in_gang=True), WorkerLostError)
    assert start_fault_of(raised(error)) is error
    fault = start_fault_of(raised(error), in_gang=True)
    assert isinstance(fault, StartError) and fault.attempts == 3
    error = RuntimeError("Timed out while fetching the weights")
    assert fault_of(raised(error), in_gang=True) is error is start_fault_of(raised(error), in_gang=True)


def test_what_no_other_try_can_change_is_told_in_a_line():
    text = "Traceback (most recent call last):\n  File ...\nModuleNotFoundError: No module named 'launchers'"
    task_error = RayTaskError("Rank.__init__", text, ModuleNotFoundError("No module named 'launchers'"))
    fault = start_fault_of(ActorDiedError(task_error))
    assert isinstance(fault, StartError) and fault.attempts == 2
    assert str(fault) == "ModuleNotFoundError: No module named 'launchers'"
    assert isinstance(start_fault_of(RuntimeEnvSetupError("no such archive")), StartError)


def test_an_error_that_does_not_unpickle_is_that_of_the_work():
    text = "Traceback (most recent call last):\n  File ...\nav.error.InvalidDataError: not a picture"
    for fault in (fault_of(UnserializableException(text)), start_fault_of(UnserializableException(text))):
        assert type(fault) is RuntimeError and str(fault) == "av.error.InvalidDataError: not a picture"


def test_a_private_instance_is_tried_again_and_its_failure_is_one_line(monkeypatch):
    """Ray raises a bare `Exception` where a busy machine does not start it in 30 s."""
    tried = []

    def init(address, **_):
        tried.append(address)
        raise Exception("The current node\ntimed out during startup.")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with pytest.raises(ClusterError) as caught, connected("local"):
        pass
    assert tried == ["local"] * STARTS
    assert str(caught.value).startswith(
        "Ray does not start on this machine (The current node timed out during startup.);"
    )
