"""When the next chunk may begin: by the media time that its controller has played, never by how fast chunks are made.

A generator that is faster than playback would run ahead, and every change of prompt would be late by that lead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
