"""Work that runs on a device while the host goes on: marks in its streams, copies from and to the host, and clocks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from helios_cp.device.device import has_streams


def wait_for(device: torch.device) -> None:
    """Wait for what the current stream was given so far; work on other streams goes on."""
    if has_streams(device):
        torch.accelerator.current_stream(device).synchronize()
    elif device.type != "cpu":
        torch.accelerator.synchronize(device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. From the host it goes through pinned memory, so the host does not wait for the copy."""
    if tensor.device.type != "cpu" or not has_streams(device):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """A copy in pinned host memory. It is complete once a later mark is reached; without streams, at once.

    torch gives unused pinned memory to later copies of the same size, and only after the copy itself is done.
    """
    if not has_streams(tensor.device):
        return tensor.cpu()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


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
    if not has_streams(device):
        return HostMark(device)
    event = torch.Event(device, enable_timing=True)
    event.record(torch.accelerator.current_stream(device))
    return event


class Pace:
    """Keeps the host one step ahead of the device and no more.

    Without it the host could queue a whole chunk in a moment. Its progress would be wrong, a stop would come late, and
    finished frames would wait. One step ahead is enough to keep the device busy.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._last: Mark | None = None

    def step(self) -> None:
        """A step was queued; waits for the one before it."""
        if not has_streams(self.device):
            return
        before, self._last = self._last, make_mark(self.device)
        if before is not None:
            before.synchronize()


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
    seconds: Counter[str] = Counter()
    for each in measured:
        seconds[each.name] += each.begin.elapsed_time(each.end) / 1000
    return dict(seconds)
