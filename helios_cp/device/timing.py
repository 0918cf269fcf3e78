"""Seconds of named stages, without the host waiting for the device at their ends."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from helios_cp.device.device import has_streams
from helios_cp.device.streams import mark, wait_for


class Mark(Protocol):
    """A place in a stream's work, as `torch.Event` is."""

    def query(self) -> bool: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end: Any) -> float: ...


class HostMark:
    """A moment of the host's clock, at which the device had done all that it was given."""

    def __init__(self, device: torch.device) -> None:
        wait_for(device)
        self._seconds = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: HostMark) -> float:
        """In milliseconds."""
        return 1000 * (end._seconds - self._seconds)


def make_mark(device: torch.device) -> Mark:
    """Behind what the device was given so far: in its current stream, or by the clock where it has no streams."""
    return mark(device) if has_streams(device) else HostMark(device)


@dataclass(frozen=True)
class Span:
    """A stage from one mark to another, but for the pauses in it."""

    name: str
    begin: Mark
    end: Mark
    pauses: tuple[tuple[Mark, Mark], ...]

    @property
    def seconds(self) -> float:
        paused = sum(begin.elapsed_time(end) for begin, end in self.pauses)
        return (self.begin.elapsed_time(self.end) - paused) / 1000


@dataclass(frozen=True)
class Times:
    """Stages that are on their way."""

    spans: tuple[Span, ...]

    def read(self) -> dict[str, float]:
        """Seconds by name, once the device is past all marks."""
        seconds: dict[str, float] = defaultdict(float)
        for span in self.spans:
            seconds[span.name] += span.seconds
        return dict(seconds)


class Stopwatch:
    """Marks where stages begin and end in the device's current stream; their times are read when it has passed there.

    A stage is charged with its own work and with the device's waiting for the host in it, not with what runs on other
    streams, such as the decoding of the chunk before. `make_mark` stands for `helios_cp.device.timing.make_mark`.
    """

    def __init__(self, device: torch.device, make_mark: Callable[[torch.device], Mark] = make_mark) -> None:
        self.device = device
        self._make_mark = make_mark
        self._spans: list[Span] = []
        self._pauses: list[tuple[Mark, Mark]] = []

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """A stage; one that fails is not counted."""
        begin, before = self._mark(), len(self._pauses)
        yield
        self._spans.append(Span(name, begin, self._mark(), tuple(self._pauses[before:])))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What passes inside is charged to no stage, not even to one that is being measured.

        While the device still has work the host's pause costs it nothing, and nothing is taken off.
        """
        begin = self._mark()
        yield
        self._pauses.append((begin, self._mark()))

    def take(self) -> Times:
        """What was measured since the last call; between stages only."""
        times = Times(tuple(self._spans))
        self._spans.clear()
        self._pauses.clear()
        return times

    def _mark(self) -> Mark:
        return self._make_mark(self.device)
