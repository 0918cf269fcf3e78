"""Unit: what ranks say when one of them fails, and how long they wait for each other; over a store in this process."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from signal import SIGTERM

import pytest
import torch
import torch.distributed as dist

from helios_cp.pipeline import world as module
from helios_cp.pipeline.world import Ranks, World, is_lost_connection

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:38326"
NCCL = "NCCL error in: NCCLUtils.cpp:1, {}, NCCL version 2.28\n{}: ..."


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError(GLOO), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (dist.DistNetworkError("failed to recv, got 0 bytes"), True),
        (dist.DistStoreError("wait timeout after 60000ms, keys: /helios_cp/decided"), True),
        (dist.DistBackendError(NCCL.format("remote process exited", "ncclRemoteError")), True),
        (dist.DistBackendError("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=9)"), True),
        (dist.DistBackendError(NCCL.format("unhandled cuda error", "ncclUnhandledCudaError")), False),
        (dist.DistBackendError(NCCL.format("invalid usage", "ncclInvalidUsage")), False),
        (RuntimeError("NCCL is not built into this torch"), False),
        (RuntimeError("Timed out while the picture was decoded"), False),
        (RuntimeError("Socket /tmp/gloo of the writer: Connection reset"), False),
        (torch.OutOfMemoryError("CUDA out of memory; NCCL holds 2 GB"), False),
        (ConnectionResetError("Connection reset by peer"), False),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_lost_connection_is_told_by_its_type(error, expected):
    assert is_lost_connection(error) == expected


def worlds(monkeypatch, size: int = 2, timeout: float = 60) -> list[World]:
    """Ranks of one job."""
    store = dist.HashStore()
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store, 0, size)]))
    return [World(Ranks(rank, rank, size, size), timeout) for rank in range(size)]


def test_the_rank_that_failed_is_shown_and_not_one_that_missed_it(monkeypatch, capsys):
    """Although it comes second, as it had files to close; with its traceback, NCCL in its text or not."""
    first, second = worlds(monkeypatch)
    monkeypatch.setattr(module, "GRACE", 1000.0)
    waits = threading.Event()
    monkeypatch.setattr(module.time, "sleep", lambda _: waits.set())
    with ThreadPoolExecutor(1) as thread:
        lost = thread.submit(first._report, RuntimeError(GLOO))
        assert waits.wait(60)
        try:
            raise RuntimeError("NCCL: no such file")
        except RuntimeError as error:
            second._report(error)
        lost.result()
    told = capsys.readouterr().err
    assert told.startswith("rank 1 failed:\nTraceback") and "RuntimeError: NCCL: no such file" in told
    assert "rank 0" not in told


def test_a_rank_that_nobody_explains_is_told_as_lost(monkeypatch, capsys):
    """Although torchrun ends it meanwhile."""
    first, _ = worlds(monkeypatch)
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(clock, "sleep", lambda seconds: (Clock.sleep(clock, seconds), signal.raise_signal(SIGTERM)))
    before = signal.getsignal(SIGTERM)
    try:
        first._report(RuntimeError(GLOO))
    finally:
        signal.signal(SIGTERM, before)
    assert capsys.readouterr().err.startswith("rank 0: another rank does not answer: it was killed, ")


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_nobody_waits_for_ever(monkeypatch):
    """For a machine that is silent for the whole timeout; it is named."""
    first, _, last = worlds(monkeypatch, size=3, timeout=60)
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    last._store.set("helios_cp/prepared/2", "here")
    last._store.add("helios_cp/prepared", 1)
    with pytest.raises(TimeoutError, match=r"^rank 1 of 3 gave no sign of life for --timeout 60 s before"):
        first.prepare(lambda: None)
    assert 60 < clock.now < 61


def test_a_machine_with_signs_of_life_is_waited_for(monkeypatch):
    """For an hour, far longer than the timeout, as downloads last. It gives them while its step is under way."""
    first, second = worlds(monkeypatch, timeout=60)
    second.ranks = Ranks(1, 0, 1, 2)  # of another machine
    clock, is_over = Clock(), threading.Event()

    def sleep(_: float) -> None:
        if is_over.wait(0.001):
            return  # no time passes while the other rank arrives
        before = first._store.add("helios_cp/beats", 0)
        while first._store.add("helios_cp/beats", 0) == before and not is_over.is_set():
            pass
        clock.now += 50
        if clock.now > 3600:
            is_over.set()

    monkeypatch.setattr(clock, "sleep", sleep)
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "BEAT", 0.001)
    with ThreadPoolExecutor(1) as thread:
        step = thread.submit(second.prepare, is_over.wait)
        first.prepare(lambda: None)
        step.result()
    assert clock.now > 3600
