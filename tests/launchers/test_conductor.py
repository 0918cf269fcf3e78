"""Unit, without a cluster: the thread that makes videos, with workers of this process; files are real."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
import weakref
from concurrent.futures import CancelledError

import pytest

from helios_cp.files.whole_files import write_bytes
from launchers.cluster.faults import StartError, WorkerLostError
from launchers.cluster.worker import Standing
from launchers.driver import conductor as conductor_module
from launchers.driver.crew import PipelineError
from launchers.driver.video import Video
from launchers.schedule.terms import Limits
from tests.launchers.conftest import frames_in
from tests.launchers.stand_ins import FRAMES, PATIENCE, Studio


def test_a_video_comes_to_its_end(tmp_path):
    with Studio() as studio:
        result = studio.submit(3, tmp_path / "a.mp4").result(PATIENCE)
        assert result.chunks == 3 and result.latents.shape == (1, 1, 3, 2, 2)
    assert frames_in(tmp_path / "a.mp4") == 3 * FRAMES
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_nothing_is_kept_of_two_hundred_videos():
    """Some are cancelled, some fail in the caller's hands; what the conductor knew of them goes with their handles."""

    def unwanted(chunk) -> None:
        raise BrokenPipeError

    with Studio() as studio:
        seen = []
        for number in range(200):
            handle = studio.submit(2, on_chunk=unwanted if number % 10 == 4 else None)
            if number % 10 == 9:
                handle.cancel()
            with contextlib.suppress(BrokenPipeError, CancelledError):
                handle.result(PATIENCE)
            seen.append(weakref.ref(handle))
        del handle
        studio.until(lambda: gc.collect() >= 0 and not any(reference() for reference in seen))


# Closing


def test_close_ends_every_handle(tmp_path):
    """Those in hand, those that wait for their turn, and those that the thread has not heard of."""
    studio = Studio(limits=Limits(active=1), group={"denoise"})
    handles = [studio.submit(3, tmp_path / f"{number}.mp4") for number in range(4)]
    studio.until(lambda: "denoise" in studio.workers["group-0"].calls)
    is_blocked, go_on = threading.Event(), threading.Event()
    studio.conductor._post(lambda: (is_blocked.set(), go_on.wait(PATIENCE)))
    assert is_blocked.wait(PATIENCE)
    handles.append(studio.submit(3, tmp_path / "5.mp4"))
    closing = threading.Thread(target=studio.conductor.close)
    closing.start()
    studio.until(lambda: studio.conductor._is_closing)
    go_on.set()
    for handle in handles:
        with pytest.raises(CancelledError):
            handle.result(timeout=PATIENCE)
    closing.join(PATIENCE)
    assert not closing.is_alive()


def test_a_closed_pipeline_says_so(tmp_path):
    studio = Studio()
    studio.conductor.close()
    for late in (lambda: studio.submit(1), studio.conductor.status, studio.conductor.wait_until_ready):
        with pytest.raises(RuntimeError, match="the pipeline is closed"):
            late()
    studio.conductor.post(0, Video.cancel)
    with pytest.raises(RuntimeError, match="the pipeline is closed"):
        studio.conductor.change_prompt(0, "an owl", 1).result(PATIENCE)
    studio.conductor.close()


def test_close_ends_whoever_waits_for_the_workers():
    studio, errors = Studio(is_ready=False), []

    def wait() -> None:
        try:
            studio.conductor.wait_until_ready(PATIENCE)
        except RuntimeError as error:
            errors.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    with pytest.raises(TimeoutError):
        studio.conductor.wait_until_ready(0.01)
    studio.conductor.close()
    waiting.join(PATIENCE)
    assert "the pipeline is closed" in str(errors[0])


# Files of a video that ends early


def written(studio: Studio, chunks: int) -> None:
    writer = studio.workers["writer"]
    studio.until(lambda: writer.calls.count("write") > chunks)  # one more is held


def hold_the_second_write(studio: Studio, path):
    """One chunk is in the file, and the next has come to the writer, which does not answer."""
    writer = studio.workers["writer"]
    handle = studio.submit(9, path, on_chunk=lambda chunk: writer.held.add("write"))
    written(studio, 1)
    return handle


def lose(worker, error: Exception | None = None) -> None:
    """It dies, and the thread has seen it."""
    life, deadline = worker.life, time.monotonic() + PATIENCE
    worker.says("lost", error or WorkerLostError("killed"))
    while worker.life == life:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_cancelled_while_the_writer_is_lost(tmp_path):
    with Studio() as studio:
        handle = hold_the_second_write(studio, tmp_path / "a.mp4")
        writer = studio.workers["writer"]
        handle.cancel()
        lose(writer)
        writer.held.clear()
        with pytest.raises(TimeoutError):
            handle.result(timeout=0.1)
        writer.says("ready")
        with pytest.raises(CancelledError):
            handle.result(timeout=PATIENCE)
        assert frames_in(tmp_path / "a.mp4") == FRAMES
        assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_cancelled_after_the_writer_came_back(tmp_path, caplog):
    with Studio(decoder=set()) as studio:
        handle = hold_the_second_write(studio, tmp_path / "a.mp4")
        writer, decoder = studio.workers["writer"], studio.workers["decoder-0"]
        lose(writer)
        writer.says("ready")  # with nothing open; the second write is held again
        written(studio, 2)
        handle.cancel()
        writer.waiting.clear()
        lose(writer)
        writer.says("ready")
        with pytest.raises(CancelledError):
            handle.result(timeout=PATIENCE)
        assert decoder.is_ready and frames_in(tmp_path / "a.mp4") == FRAMES
        assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
        assert "cannot be finished" not in caplog.text


@pytest.mark.parametrize("is_lost", [False, True], ids=["writer", "no writer"])
def test_a_fatal_error_finishes_the_files(tmp_path, is_lost):
    with Studio(decoder=set()) as studio:
        writer = studio.workers["writer"]
        handle = hold_the_second_write(studio, tmp_path / "a.mp4")
        if is_lost:
            lose(writer)
        writer.waiting.clear()
        studio.workers["group-0"].says("broken", ValueError("no such layer"))
        with pytest.raises(PipelineError, match="group-0: ValueError: no such layer"):
            handle.result(timeout=PATIENCE)
        assert frames_in(tmp_path / "a.mp4") == FRAMES
        assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_writer_that_hangs_in_the_end(tmp_path, monkeypatch):
    """It is killed, and the files are finished by the driver."""
    monkeypatch.setattr("launchers.driver.conductor.CLOSING_SECONDS", 0.1)
    studio = Studio()
    studio.workers["writer"].held.add("close")
    handle = hold_the_second_write(studio, tmp_path / "a.mp4")
    studio.conductor.close()
    with pytest.raises(CancelledError):
        handle.result(timeout=PATIENCE)
    assert frames_in(tmp_path / "a.mp4") == FRAMES
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_file_that_cannot_be_finished_does_not_keep_its_video(tmp_path, monkeypatch, caplog):
    with Studio() as studio:
        handle = hold_the_second_write(studio, tmp_path / "a.mp4")

        def full(*_):
            raise OSError("disk full")

        writer = studio.workers["writer"]
        writer._close = full
        handle.cancel()
        writer.release()
        with pytest.raises(CancelledError):
            handle.result(timeout=PATIENCE)
    assert "a.mp4 cannot be finished: disk full" in caplog.text


def test_a_video_that_never_began_touches_no_file(tmp_path):
    chunk = tmp_path / ".a.mp4.chunks" / "chunk-00000-0.mp4"
    write_bytes(chunk, b"of an earlier run")
    with Studio(group={"denoise"}) as studio:
        handle = studio.submit(2, tmp_path / "a.mp4")
        studio.until(lambda: studio.workers["group-0"].waiting)
        handle.cancel()
        studio.workers["group-0"].release()
        with pytest.raises(CancelledError):
            handle.result(timeout=PATIENCE)
    assert chunk.read_bytes() == b"of an earlier run"


# Errors


def test_the_first_fatal_error_stays(tmp_path):
    """Whatever comes in later: answers, news of workers, calls of the user."""
    with Studio(group={"denoise"}) as studio:
        handle = studio.submit(2, tmp_path / "a.mp4")
        group = studio.workers["group-0"]
        studio.until(lambda: group.waiting)
        studio.workers["text"].says("broken", ValueError("first"))
        with pytest.raises(PipelineError, match="text: ValueError: first"):
            handle.result(timeout=PATIENCE)
        group.release()
        handle.cancel(), handle.change_prompt("an owl")
        group.says("lost", WorkerLostError("second"))
        group.says("broken", ValueError("third"))
        studio.conductor._post(lambda: 1 / 0)
        studio.conductor.status()  # all that is heard now
        with pytest.raises(PipelineError, match="first"):
            studio.submit(2).result(timeout=PATIENCE)
        with pytest.raises(PipelineError, match="first"):
            studio.conductor.wait_until_ready(PATIENCE)
        assert group.starts == 1


@pytest.mark.parametrize("bad", [0, 1], ids=["first chunk", "last chunk"])
def test_an_error_of_on_chunk_ends_its_video_alone(tmp_path, bad):
    def on_chunk(chunk) -> None:
        if chunk.index == bad:
            raise BrokenPipeError("nobody listens")

    with Studio() as studio:
        handle, other = studio.submit(2, tmp_path / "a.mp4", on_chunk=on_chunk), studio.submit(2, tmp_path / "b.mp4")
        with pytest.raises(BrokenPipeError, match="nobody listens"):
            handle.result(timeout=PATIENCE)
        assert other.result(timeout=PATIENCE).chunks == 2
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]


def test_an_error_of_the_status_ends_nothing(monkeypatch, caplog):
    """Neither for whoever asks nor for the thread, which takes a picture by itself between two calls."""

    def broken(*_):
        raise ArithmeticError("no picture")

    with Studio(group={"denoise"}) as studio:
        handle = studio.submit(2, streams=False)
        studio.until(lambda: studio.workers["group-0"].waiting)
        with monkeypatch.context() as patch:
            patch.setattr(conductor_module, "picture", broken)
            patch.setattr(conductor_module, "REFRESH", 0.01)
            with pytest.raises(ArithmeticError):
                studio.conductor.status()
            studio.until(lambda: "no picture" in caplog.text)
        studio.workers["group-0"].release()
        assert handle.result(timeout=PATIENCE).chunks == 2


# Workers that die


def wears_out(group) -> None:
    for _ in range(9):
        lose(group)


def breaks(group) -> None:
    lose(group)
    group.says("broken", ValueError("no such layer"))


def fails_to_start(group) -> None:
    for _ in range(3):  # the first ends a life that was ready
        lose(group, StartError("No module named 'launchers'", 2))


@pytest.mark.parametrize("how", [wears_out, breaks, fails_to_start])
def test_a_bad_group_does_not_end_the_videos_of_a_good_one(how):
    with Studio(groups=2) as studio:
        bad = studio.workers["group-1"]
        how(bad)
        studio.until(lambda: bad.standing is Standing.GIVEN_UP)
        assert studio.submit(3).result(timeout=PATIENCE).chunks == 3
        assert "given up" in str(studio.conductor.status()["workers"])
        how(studio.workers["group-0"])
        with pytest.raises(PipelineError, match="group-0"):
            studio.submit(3).result(timeout=PATIENCE)


def test_a_group_that_starts_again_is_hope_enough():
    """Both groups are away for a moment, and one of them for good."""
    with Studio(groups=2) as studio:
        one, other = studio.workers["group-0"], studio.workers["group-1"]
        lose(one)
        breaks(other)
        handle = studio.submit(2)
        one.says("ready")
        assert handle.result(timeout=PATIENCE).chunks == 2


@pytest.mark.parametrize(
    ("event", "value", "told"),
    [
        ("broken", ValueError("no such layer"), "group-1: ValueError: no such layer"),
        ("unplaced", "group-1 needs 12 CPU", "group-1 needs 12 CPU"),
    ],
)
def test_the_first_start_must_succeed_everywhere(event, value, told):
    with Studio(groups=2, is_ready=False) as studio:
        handle = studio.submit(1)
        studio.workers["group-0"].says("ready")
        studio.workers["group-1"].says(event, value)
        with pytest.raises(PipelineError, match=told):
            studio.conductor.wait_until_ready(PATIENCE)
        with pytest.raises(PipelineError, match=told):
            handle.result(PATIENCE)


def test_a_start_that_cannot_succeed_is_not_tried_nine_times():
    with Studio(is_ready=False) as studio:
        group = studio.workers["group-0"]
        for _ in range(2):
            lose(group, StartError("No module named 'launchers'", 2))
        with pytest.raises(PipelineError, match="group-0 failed to start 2 times in a row: No module named"):
            studio.conductor.wait_until_ready(PATIENCE)
        assert group.starts == 2


def test_a_start_that_fails_between_good_ones_counts_for_itself():
    with Studio() as studio:
        group = studio.workers["group-0"]
        for _ in range(3):
            lose(group)
            lose(group, StartError("a peer is gone", 2))
            assert group.failed_starts == 1
            group.says("ready")
            assert studio.submit(1).result(timeout=PATIENCE).chunks == 1


def test_what_is_missing_after_a_loss_is_told_before_it_is_given_up(caplog):
    with Studio() as studio:
        group = studio.workers["group-0"]
        lose(group)
        group.says("short", "group-0 needs 12 CPU")
        (shown,) = [worker for worker in studio.conductor.status()["workers"] if worker["name"] == "group-0"]
        assert shown["state"] == "group-0 needs 12 CPU" and "waiting for resources: group-0 needs 12 CPU" in caplog.text
        handle = studio.submit(1)
        group.says("ready")
        assert handle.result(timeout=PATIENCE).chunks == 1
        assert "12 CPU" not in str(studio.conductor.status())
        lose(group)
        group.says("unplaced", "group-0 needs 12 CPU")
        with pytest.raises(PipelineError, match="group-0 needs 12 CPU"):
            studio.submit(1).result(timeout=PATIENCE)


# Streams


def test_streams_can_be_read_in_any_order(tmp_path):
    """One at a time, the last first, and a file beside them: none waits for another one's reader."""
    with Studio(limits=Limits(undelivered=2, active=2)) as studio:
        streams = [studio.submit(6, streams=True) for _ in range(4)]
        assert studio.submit(2, tmp_path / "a.mp4").result(timeout=PATIENCE).chunks == 2
        for stream in reversed(streams):
            assert stream.result(timeout=PATIENCE).chunks == 6


def test_a_video_without_a_run_folder_keeps_nothing(tmp_path):
    with Studio() as studio:
        studio.submit(2, tmp_path / "a.mp4").result(PATIENCE)
        assert "keep" not in studio.workers["writer"].calls
