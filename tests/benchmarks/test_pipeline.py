"""Unit: the figures of `benchmarks.pipeline`, from records of work made up so that they are known."""

from __future__ import annotations

from concurrent.futures import CancelledError

import pytest

from benchmarks.pipeline.__main__ import (
    STAGES,
    growth,
    hand_over_seconds,
    outcome,
    quartiles,
    stage_seconds,
    steady_seconds,
)
from launchers.driver.timeline import Event

DENOISE, DECODE, WRITE = 2.0, 3.0, 0.5
HAND_OVER = 0.25


def serial(chunks: int) -> list[Event]:
    """One chunk after the other, with a hand-over before each stage."""
    events, now = [], 0.0
    for chunk in range(chunks):
        for stage, seconds in zip(STAGES, (DENOISE, DECODE, WRITE), strict=True):
            events.append(Event(stage, stage, 0, chunk, now, now + seconds))
            now += seconds + HAND_OVER
    return events


def pipelined(chunks: int) -> list[Event]:
    """Decoding beside the next denoising, which it holds up."""
    events = []
    for chunk in range(chunks):
        begin = 10 + chunk * (DECODE + HAND_OVER)
        events.append(Event("denoise", "denoise", 0, chunk, begin - DENOISE, begin))
        events.append(Event("decode", "decode", 0, chunk, begin, begin + DECODE))
        events.append(Event("write", "write", 0, chunk, begin + DECODE, begin + DECODE + WRITE))
    return events


def test_one_chunk_after_the_other():
    events = serial(12)
    assert stage_seconds(events, "decode") == DECODE
    assert steady_seconds(events) == DENOISE + DECODE + WRITE + 3 * HAND_OVER
    assert hand_over_seconds(events, STAGES) == [3 * HAND_OVER] * 11
    assert hand_over_seconds(events, ("denoise",)) == [DECODE + WRITE + 3 * HAND_OVER] * 11


def test_stages_beside_each_other():
    events = pipelined(12)
    assert steady_seconds(events) == DECODE + HAND_OVER
    assert hand_over_seconds(events, ("decode",)) == [HAND_OVER] * 11


def test_what_happens_at_the_ends_is_left_out():
    events = pipelined(12)
    slow = [Event(e.worker, e.stage, 0, e.chunk, e.begin, e.end + 100 * (e.chunk == 11)) for e in events]
    assert steady_seconds(slow) == DECODE + HAND_OVER


def test_quartiles():
    assert quartiles([1.0, 2.0, 3.0]) == {"median_seconds": 2.0, "lower_quartile": 1.0, "upper_quartile": 3.0}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 100, 100, 100, 100, 100, 100, 100], 0.0),  # warming up is not growth
        ([100, 100, 100, 100, 100, 130, 100, 100], 0.0),  # nor is a step that comes back
        ([100, 100, 100, 100, 110, 110, 110, 110], 0.1),
    ],
)
def test_growth(values, expected):
    assert growth(values) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ends_with", "expected"), [(None, "finished"), (CancelledError(), "cancelled"), (ValueError(), "failed")]
)
def test_outcome(ends_with, expected):
    class Handle:
        def result(self):
            if ends_with is not None:
                raise ends_with

    assert outcome(Handle()) == expected
