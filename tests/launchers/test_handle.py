"""Unit, without a pipeline: what a handle gives to whoever waits for a video."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from launchers.driver.handle import VideoChunk, VideoHandle

PATIENCE = 300
"""Seconds for what takes none."""


class Maker:
    """Makes a chunk as soon as fewer than `undelivered` lie there, in the calling thread."""

    def __init__(self, chunks: int, undelivered: int = 3) -> None:
        self.chunks = chunks
        self.made = self.used = 0
        self.undelivered = undelivered
        self.is_wanted = False
        self.handle = VideoHandle(self, 0, streams=True, keep_latents=False, on_chunk=None)

    def post(self, key: int, call) -> None:
        call(self)

    def wanted(self) -> None:
        self.is_wanted = True
        self.go_on()

    def taken(self) -> None:
        self.used += 1
        self.go_on()

    def go_on(self) -> None:
        while self.made < self.chunks and self.made - self.used < self.undelivered:
            self.handle.deliver(VideoChunk(self.made, np.zeros(1), None, {}))
            self.made += 1
        if self.used == self.chunks:
            self.handle.finish(self.chunks, ())


@pytest.mark.parametrize("timeout", [None, PATIENCE])
def test_the_result_of_a_stream_that_nobody_takes(timeout):
    maker = Maker(10)
    assert maker.handle.result(timeout).chunks == 10
    assert maker.used == 10


def test_result_keeps_to_its_timeout():
    maker = Maker(10)
    maker.chunks = 11  # the last never comes
    maker.go_on = lambda: None
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match=r"video 0 is not finished after 0\.05 s"):
        maker.handle.result(0.05)
    assert time.monotonic() - begin >= 0.05 and maker.is_wanted


def test_result_takes_nothing_from_another_reader():
    """It waits beside it, and drops the rest once the reader has left."""
    maker, seen, has_begun, go_on = Maker(6), [], threading.Event(), threading.Event()

    def read() -> None:
        for chunk in maker.handle:
            seen.append(chunk.index)
            has_begun.set()
            go_on.wait(PATIENCE)
            if chunk.index == 3:
                break

    reader = threading.Thread(target=read)
    reader.start()
    assert has_begun.wait(PATIENCE)
    with pytest.raises(TimeoutError):
        maker.handle.result(0.05)
    go_on.set()
    assert maker.handle.result(PATIENCE).chunks == 6
    reader.join(PATIENCE)
    assert seen == [0, 1, 2, 3] and maker.used == 6


def test_result_inside_the_loop_takes_the_rest():
    maker = Maker(6)
    chunks = iter(maker.handle)
    assert next(chunks).index == 0
    maker.used += 1  # as leaving the loop would say
    assert maker.handle.result(PATIENCE).chunks == 6


@pytest.mark.parametrize("error", [None, OSError("no space left")])
def test_the_end_is_told_once(error):
    told = []
    handle = VideoHandle(None, 0, streams=False, keep_latents=False, on_chunk=None, on_end=told.append)
    if error is None:
        handle.finish(1, ())
    else:
        handle.end(error)
    assert handle.is_done
    handle.end(RuntimeError("the pipeline is closed"))
    assert told == [error]
