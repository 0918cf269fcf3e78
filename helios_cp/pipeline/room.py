"""Whether a chunk can be decoded while the next one is denoised: both have to fit into the device's memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

from helios_cp.device.memory import MARGIN, MemoryMeter

WORK = {"denoise", "decode"}


class Room:
    """The memory that denoising and decoding take beside what stays on the device, measured once a size of video."""

    def __init__(self, meter: MemoryMeter) -> None:
        self.meter = meter
        self._needed: dict[Hashable, dict[str, int]] = defaultdict(dict)

    @contextmanager
    def measured(self, size: Hashable, work: str) -> Iterator[None]:
        """Measures one of `WORK`, which runs inside with nothing beside it. It does so the first time only.

        It measures nothing where nobody can tell how much memory is free.
        """
        if work in self._needed[size] or self.meter.free() is None:
            yield
            return
        self.meter.begin()
        yield
        self._needed[size][work] = self.meter.needed()

    def has_both(self, size: Hashable) -> bool:
        """Whether both fit together. Ask while neither runs. False until both were measured.

        True where nobody can tell how much memory is free.
        """
        free, needed = self.meter.free(), self._needed[size]
        return free is None or (needed.keys() == WORK and free >= MARGIN * sum(needed.values()))
