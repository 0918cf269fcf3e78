"""Which worker takes the next call: each has so many places a stage, given out in the order of asking.

A video asks for its next chunk once the last one is done. It then waits behind the videos that asked before, so videos
take turns.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict, deque
from collections.abc import Mapping

from launchers.schedule.terms import Stage


class Pool:
    """The places of all workers. Workers are known by name. Used inside one event loop.

    `handed_out` counts the places of each stage that were ever given.
    """

    def __init__(self) -> None:
        self.handed_out: Counter[Stage] = Counter()
        self._capacity: dict[str, Mapping[Stage, int]] = {}
        self._present: set[str] = set()
        self._used: Counter[tuple[str, Stage]] = Counter()
        self._waiting: dict[Stage, deque[tuple[asyncio.Future[str], str | None]]] = defaultdict(deque)

    def add_worker(self, name: str, capacity: Mapping[Stage, int]) -> None:
        """Make a worker known, with its places of each stage. It is absent until `restore`."""
        self._capacity[name] = dict(capacity)

    def restore(self, name: str) -> None:
        """A worker is there, or there again."""
        self._present.add(name)
        for stage in self._capacity[name]:
            self._give_out(stage)

    def remove(self, name: str) -> None:
        """A worker is gone. Its places that are in use still have to be released."""
        self._present.discard(name)

    async def take(self, stage: Stage, home: str | None = None) -> str:
        """Wait for a place; returns its worker: `home` where that is free, else the one with the least to do."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting[stage].append((turn, home))
        self._give_out(stage)
        try:
            return await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # a place was given in the same moment
                self.release(turn.result(), stage)
            elif (turn, home) in self._waiting[stage]:
                self._waiting[stage].remove((turn, home))
            raise

    def release(self, name: str, stage: Stage) -> None:
        """Give back a place of `take`."""
        self._used[name, stage] -= 1
        self._give_out(stage)

    def waiting(self, stage: Stage) -> int:
        """How many wait for a place."""
        return len(self._waiting[stage])

    def _give_out(self, stage: Stage) -> None:
        waiting = self._waiting[stage]
        while waiting and (free := self._free(stage)):
            turn, home = waiting.popleft()
            if not turn.cancelled():
                name = home if home in free else free[0]
                self._used[name, stage] += 1
                self.handed_out[stage] += 1
                turn.set_result(name)

    def _free(self, stage: Stage) -> list[str]:
        """Workers with a free place, those with the least to do first."""
        used = {name: self._used[name, stage] for name in self._capacity if name in self._present}
        free = [name for name, count in used.items() if count < self._capacity[name].get(stage, 0)]
        return sorted(free, key=used.__getitem__)
