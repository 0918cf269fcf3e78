"""Whether a chunk can be decoded while the next one is denoised: both have to fit into the device's memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

from helios_cp.device.memory import MARGIN, MemoryMeter

WORK = {"denoise", "decode"}


class Room:
    """What denoising and decoding need beside all that stays on the device; measured once for each size of video."""

    def __init__(self, meter: MemoryMeter) -> None:
        self.meter = meter
        self._needed: dict[Hashable, dict[str, int]] = defaultdict(dict)

    @contextmanager
    def measured(self, size: Hashable, work: str) -> Iterator[None]:
        """Notes what one of `WORK` needs, which runs inside, and nothing beside it. The first time only.

        Nothing is noted where nobody can tell how much is free.
        """
        if work in self._needed[size] or self.meter.free() is None:
            yield
            return
        self.meter.begin()
        yield
        self._needed[size][work] = self.meter.needed()

    def has_both(self, size: Hashable) -> bool:
        """Whether both fit together, asked while none of them runs. No while one was not measured.

        Yes where nobody can tell how much is free.
        """
        free, needed = self.meter.free(), self._needed[size]
        return free is None or (needed.keys() == WORK and free >= MARGIN * sum(needed.values()))
