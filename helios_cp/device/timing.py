"""Seconds of named stages, without the host waiting for the device at their ends."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from helios_cp.device.device import has_streams
from helios_cp.device.streams import mark, wait_for


class HostMark:
    """A moment of the host's clock at which the device was done: a `torch.Event` where there are no streams."""

    def __init__(self, device: torch.device) -> None:
        wait_for(device)
        self._seconds = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: HostMark) -> float:
        """In milliseconds."""
        return 1000 * (end._seconds - self._seconds)


Mark = torch.Event | HostMark


def make_mark(device: torch.device) -> Mark:
    """A mark after all work given to the device so far: in its current stream, or by the clock without streams."""
    return mark(device) if has_streams(device) else HostMark(device)


@dataclass(frozen=True)
class Measured:
    """A stage, or a piece of one, from one mark to another."""

    name: str
    begin: Mark
    end: Mark


class Stopwatch:
    """Marks in the device's current stream where stages begin and end. The times are read once the device is past them.

    A stage counts its own work and the time in which the device waits for the host. It does not count work on other
    streams, such as the decoding of the chunk before. A stage may be measured in pieces; time between them is not
    counted.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._measured: list[Measured] = []

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """A stage, or a piece of one; one that fails is not counted."""
        begin = make_mark(self.device)
        yield
        self._measured.append(Measured(name, begin, make_mark(self.device)))

    def take(self) -> tuple[Measured, ...]:
        """What was measured since the last call."""
        measured = tuple(self._measured)
        self._measured.clear()
        return measured


def seconds_of(measured: Iterable[Measured]) -> dict[str, float]:
    """Seconds by stage, once the device is past all marks."""
    seconds: dict[str, float] = defaultdict(float)
    for each in measured:
        seconds[each.name] += each.begin.elapsed_time(each.end) / 1000
    return dict(seconds)
