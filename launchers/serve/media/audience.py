"""Everybody who follows a session. A slow one reads from disk at its own pace and holds up nobody."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol


class Follower(Protocol):
    """A connection. `next` is the chunk that it sends next."""

    next: int

    def say(self, message: dict[str, Any]) -> None:
        """Send a message soon; never waits."""

    def wake(self) -> None:
        """There may be a chunk to send."""

    def end(self, code: int, reason: str) -> None:
        """Close the connection after what it has to send."""


class Audience:
    """No chunk is kept for anybody: a follower holds the number of its next one, and takes the bytes from the store."""

    def __init__(self) -> None:
        self._followers: set[Follower] = set()

    def __len__(self) -> int:
        return len(self._followers)

    def __iter__(self) -> Iterator[Follower]:
        return iter(tuple(self._followers))

    def join(self, follower: Follower) -> None:
        self._followers.add(follower)

    def leave(self, follower: Follower) -> None:
        self._followers.discard(follower)

    def say(self, message: dict[str, Any]) -> None:
        for follower in self:
            follower.say(message)

    def wake(self) -> None:
        for follower in self:
            follower.wake()

    def end(self, code: int, reason: str) -> None:
        for follower in self:
            follower.end(code, reason)
