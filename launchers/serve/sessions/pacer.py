"""Lets the maker of a session go on, one chunk after the other, as its controller's player goes on.

The next chunk begins by the media time that is played, never by how fast chunks are made: a generator that is faster
than playback would run ahead, and every change of prompt would be late by that lead.
"""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass

from launchers.driver.handle import VideoHandle
from launchers.serve.media.audience import Follower
from launchers.serve.media.store import MediaStore

UNREAD = 2
"""Chunks beyond the lead that may lie between the maker and a controller that does not read."""

EXTRAPOLATED_SECONDS = 1.0
"""For how long a player that has moved is taken to play on, until it tells its position again."""

ROUNDING = 1e-6
"""Seconds: two times that are nearer to each other are the same."""


def allowed(played: float, lead: float) -> int:
    """How many chunks may have begun when `played` chunks are played: chunk n begins once n - played < lead.

    A change that comes in is on screen after at most `lead` chunks and the one that has begun just before it. At least
    one is allowed, as nothing can be played before it is made.
    """
    return max(1, math.ceil(played + lead - 1e-9))


@dataclass
class Playhead:
    """Where the controller's player is, in seconds of media; times are those of a monotonic clock.

    A player that tells its position is believed. One that never does, and a session without a controller, is taken to
    play in real time what is ready, and to wait at its end.
    """

    position: float = 0.0
    at: float = 0.0
    is_told: bool = False
    moves: bool = True

    def told(self, position: float, now: float, ready: float) -> None:
        """A player tells where it is; nobody has played what is not `ready`."""
        position = min(position, ready)
        self.moves = position > self.position
        self.position, self.at, self.is_told = position, now, True

    def left(self, now: float, ready: float) -> None:
        """The player that told its position is gone: go on by the clock from where it was."""
        self.position, self.at = self.seconds(now, ready), now
        self.is_told, self.moves = False, True

    def seconds(self, now: float, ready: float) -> float:
        """Media seconds played at a time, of those `ready`."""
        passed = now - self.at if self.moves else 0.0
        if self.is_told:
            passed = min(passed, EXTRAPOLATED_SECONDS)
        return min(ready, self.position + passed)

    def waited(self, now: float, ready: float) -> None:
        """Time in which nothing was `ready` to play counts for nothing; call it before more is ready."""
        if not self.is_told:
            self.position, self.at = self.seconds(now, ready), now

    def seconds_until_past(self, position: float, now: float, ready: float) -> float | None:
        """How long until it may be past a position; `None` if only news can bring it there."""
        if position > ready - ROUNDING:
            return None
        missing = position - self.seconds(now, ready)
        if missing < 0:
            return 0.0
        is_known = not self.is_told or position < self.position + EXTRAPOLATED_SECONDS
        return missing if self.moves and is_known else None


class Pacer:
    """`granted` chunks of the take that begins with chunk `first` of the session may have begun.

    `reader` is the controller's connection. While `is_paused`, only `step` grants more.
    """

    def __init__(self, store: MediaStore, lead: float) -> None:
        self.lead = lead
        self.reader: Follower | None = None
        self.is_paused = False
        self.first = 0
        self.granted = 0
        self.playhead = Playhead()
        self._store = store
        self._handle: VideoHandle | None = None
        self._news = asyncio.Event()

    @property
    def played(self) -> float:
        """Seconds of media that the controller's player has played, or the clock in its place."""
        return self.playhead.seconds(time.monotonic(), self._store.seconds)

    @property
    def is_held(self) -> bool:
        """Whether the next chunk waits for a controller that does not read what it was sent."""
        reads = self._most_unread()
        return reads is not None and reads <= self.first + self.granted < self._allowed()

    def restart(self, first: int) -> None:
        """A take begins, or goes on with the chunks that are ready; nothing is granted before `steer`."""
        self._handle, self.first = None, first
        self.granted = len(self._store.chunks) - first

    def steer(self, handle: VideoHandle) -> None:
        """From now on let this video go on."""
        self._handle = handle
        self.wake()

    def wake(self) -> None:
        """Something that counts here has changed."""
        self._news.set()

    def told(self, seconds: float) -> None:
        """The player tells its position."""
        self.playhead.told(seconds, time.monotonic(), self._store.seconds)
        self.wake()

    def waited(self) -> None:
        """More is about to be ready."""
        self.playhead.waited(time.monotonic(), self._store.seconds)

    def skip(self) -> None:
        """All that is ready counts as played."""
        self.playhead = Playhead(self._store.seconds, time.monotonic())

    def reads(self, reader: Follower | None) -> None:
        """Another controller, or none any more."""
        self.reader = reader
        self.playhead.left(time.monotonic(), self._store.seconds)
        self.wake()

    def pause(self) -> None:
        """Grant nothing beyond the chunk in hand."""
        self.is_paused = True
        self.granted = min(self.granted, len(self._store.chunks) - self.first + 1)
        self._handle.allow(self.granted)

    def resume(self) -> None:
        self.is_paused = False
        self.wake()

    def step(self) -> None:
        self.granted += 1
        self._handle.allow(self.granted)

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            self._news.clear()
            wait = None
            if self._handle is not None and not self.is_paused:
                may = self._may_begin()
                if may > self.granted:
                    self.granted = may
                    self._handle.allow(may)
                wait = self._seconds_until_next()
            try:
                await asyncio.wait_for(self._news.wait(), wait)
            except TimeoutError:
                continue

    def _may_begin(self) -> int:
        """Chunks of this take."""
        reads, count = self._most_unread(), self._allowed()
        return max((count if reads is None else min(count, reads)) - self.first, 0)

    def _allowed(self) -> int:
        return allowed(self.played / self._store.chunk_seconds, self.lead)

    def _most_unread(self) -> int | None:
        """Chunks that may begin before the controller has read more: one that does not read holds up its own session,
        and nothing else."""
        return None if self.reader is None else self.reader.next + math.ceil(self.lead) + UNREAD

    def _seconds_until_next(self) -> float | None:
        if self.is_held:
            return None
        target = (self.first + self.granted - self.lead) * self._store.chunk_seconds
        wait = self.playhead.seconds_until_past(target, time.monotonic(), self._store.seconds)
        return None if wait is None else wait + 0.001  # so that the clock is past it
