"""Unit: chunks are written in the background, in order, one at a time; errors and stops lose nothing."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from helios_cp.files.chunk_files import ChunkFiles
from helios_cp.generate.__main__ import main
from helios_cp.generate.background import BackgroundWriter
from helios_cp.generate.progress import ProgressReporter
from helios_cp.generate.run_folder import RunFolder
from helios_cp.generate.stopping import Stopped


class Slow:
    """A `write` that waits to be released for each item."""

    def __init__(self) -> None:
        self.release = threading.Semaphore(0)
        self.begins = threading.Semaphore(0)
        self.begun: list[int] = []
        self.written: list[int] = []
        self.threads: set[str] = set()

    def __call__(self, item: int) -> None:
        self.begun.append(item)
        self.begins.release()
        self.threads.add(threading.current_thread().name)
        assert self.release.acquire(timeout=60)
        self.written.append(item)


def test_one_item_is_in_hand_and_the_next_put_waits_for_it():
    slow = Slow()
    with BackgroundWriter(slow) as writer:
        writer.put(0)  # comes back though nothing is written
        assert slow.written == []
        assert slow.begins.acquire(timeout=60)
        second = threading.Thread(target=writer.put, args=(1,))
        second.start()
        second.join(0.1)
        assert second.is_alive() and slow.begun == [0], "a second item is taken while one is in hand"
        slow.release.release()
        second.join(60)
        assert not second.is_alive() and slow.written == [0]
        slow.release.release()
    assert slow.written == [0, 1] and len(slow.threads) == 1
    assert threading.current_thread().name not in slow.threads


def test_many_items_keep_their_order():
    written = []
    with BackgroundWriter(written.append) as writer:
        for item in range(200):
            writer.put(item)
    assert written == list(range(200))


def failing(item: int) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("how", ["check", "put", "wait", "end"])
def test_an_error_of_writing_is_raised(how):
    calls = []

    def write(item):
        calls.append(item)
        failing(item)

    with pytest.raises(OSError, match="No space"), BackgroundWriter(write) as writer:
        writer.put(0)
        if how == "check":
            while True:
                writer.check()
        elif how != "end":
            writer.put(1) if how == "put" else writer.wait()
            pytest.fail("no error")
    assert calls == [0], "something is written after an error"


def test_a_check_does_not_wait():
    slow = Slow()
    with BackgroundWriter(slow) as writer:
        writer.check()
        writer.put(0)
        writer.check()
        assert slow.written == []
        slow.release.release()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Stopped])
def test_what_is_in_hand_is_written_before_an_error_passes(error):
    slow = Slow()
    with pytest.raises(error), BackgroundWriter(slow) as writer:
        writer.put(0)
        threading.Timer(0.05, slow.release.release).start()
        raise Stopped(2) if error is Stopped else error
    assert slow.written == [0]


def test_which_of_two_errors_is_told():
    with pytest.raises(RuntimeError, match="the lens"), BackgroundWriter(failing) as writer:
        writer.put(0)
        raise RuntimeError("the lens")
    with pytest.raises(OSError, match="No space"), BackgroundWriter(failing) as writer:
        writer.put(0)
        raise Stopped(2)


# In a run

QUICK = ["--height", "64", "--width", "64", "--pyramid-steps", "1", "1", "1", "--dtype", "float32", "--device", "cpu"]


@pytest.fixture
def folder(tmp_path, cache, presets, monkeypatch) -> Path:
    monkeypatch.setenv("HELIOS_CP_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_chunks_are_committed_in_order_beside_the_next(folder, monkeypatch):
    """Each commit waits until the next chunk has begun; what is counted as finished has its files."""
    begun = [threading.Event() for _ in range(4)]
    committed, step, save = [], ProgressReporter.step, RunFolder.commit
    begun[3].set()

    def mark(self, now):
        step(self, now)
        begun[now.chunk].set()

    def commit(self, chunk, segments):
        assert begun[chunk.index + 1].wait(60), "the next chunk waits for this one to be written"
        assert self.count() == chunk.index
        save(self, chunk, segments)
        committed.append(chunk.index)
        assert RunFolder.open(folder / "run").count() == chunk.index + 1

    monkeypatch.setattr(ProgressReporter, "step", mark)
    monkeypatch.setattr(RunFolder, "commit", commit)
    assert main([*QUICK, "--prompt", "a", "--num-frames", "99", "--checkpoint-dir", "run"]) == 0
    assert committed == [0, 1, 2]


def test_a_full_disk_stops_the_run_soon(folder, monkeypatch, capfd):
    """Writing chunk 0 fails: chunk 2 is never begun, and the one line says why."""
    chunks, step = set(), ProgressReporter.step

    def full(*_):
        raise OSError(28, "No space left on device", "out.mp4")

    monkeypatch.setattr(ProgressReporter, "step", lambda self, now: (chunks.add(now.chunk), step(self, now)))
    monkeypatch.setattr(ChunkFiles, "save", full)
    assert main([*QUICK, "--prompt", "a", "--num-frames", "330"]) == 1
    assert chunks <= {0, 1}
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("helios_cp.generate: error: ") and "No space left on device: 'out.mp4'" in last
