"""Wall-clock seconds of named stages."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from helios_cp.device import wait_for


class Stopwatch:
    """Adds up seconds by name; waits for the device so that a stage is charged with its own work.

    It waits for the current stream alone: what runs beside it, such as the decoding of the chunk before, goes on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._paused = 0.0

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        wait_for(self.device)
        start, paused = time.perf_counter(), self._paused
        try:
            yield
            wait_for(self.device)
        finally:
            self.seconds[name] += time.perf_counter() - start - (self._paused - paused)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What passes inside is charged to no stage, not even to one that is being measured."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - start
