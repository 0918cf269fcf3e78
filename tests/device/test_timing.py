"""Unit: seconds of stages by marks in a device's stream, on clocks that are simulated; only rounding is tolerated."""

from __future__ import annotations

import pytest
import torch

from helios_cp.device import timing
from helios_cp.device.timing import Stopwatch, seconds_of


def test_what_passes_between_the_pieces_of_a_stage_is_charged_to_none(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    watch = Stopwatch(torch.device("cpu"))
    for seconds in (2, 1, 4):
        with watch.measure("denoise"):
            now[0] += seconds
        now[0] += 30
    assert seconds_of(watch.take()) == {"denoise": 7}
    assert watch.take() == ()


class Clocks:
    """The time on a host and on a device that works through what it is given, in milliseconds."""

    def __init__(self) -> None:
        self.host = self.device = 0.0

    def launch(self, milliseconds: float) -> None:
        """Takes the host 1 ms."""
        self.host += 1
        self.device = max(self.device, self.host) + milliseconds

    def mark(self, _) -> ClockMark:
        return ClockMark(max(self.host, self.device))


class ClockMark:
    """When the device gets there. Nobody waits for it."""

    def __init__(self, time: float) -> None:
        self.time = time

    def elapsed_time(self, end: ClockMark) -> float:
        return end.time - self.time


@pytest.fixture
def clocks(monkeypatch) -> Clocks:
    found = Clocks()
    monkeypatch.setattr(timing, "mark", found.mark)
    return found


def test_a_stage_is_charged_with_the_devices_time(clocks):
    """The host queues two stages of 100 ms in 3 ms; it is late for the third by 300 ms, which that is charged with."""
    watch = Stopwatch(torch.device("cuda"))
    with watch.measure("first"):
        clocks.launch(100)
    with watch.measure("second"):
        clocks.launch(60)
        clocks.launch(40)
    assert clocks.host == 3
    with watch.measure("third"):
        clocks.host += 500
        clocks.launch(10)
    assert seconds_of(watch.take()) == pytest.approx({"first": 0.101, "second": 0.1, "third": 0.313})


@pytest.mark.parametrize(("pause", "charged"), [(50, 0.211), (400, 0.212)])
def test_a_pause_costs_what_the_device_is_idle(clocks, pause, charged):
    """It has 201 ms of work when the pause begins: a short one costs nothing, of a long one the rest is taken off.

    The device then waits for the next launch, for 1 ms.
    """
    watch = Stopwatch(torch.device("cuda"))
    with watch.measure("denoise"):
        clocks.launch(200)
    clocks.host += pause
    with watch.measure("denoise"):
        clocks.launch(10)
    assert seconds_of(watch.take())["denoise"] == pytest.approx(charged)
