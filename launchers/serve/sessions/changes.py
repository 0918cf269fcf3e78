"""Changes of prompt: every accepted one has an id, and is told as received, started, active and completed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Change:
    """A change of prompt. `chunk` is the first that shows it, counted over the session; the new prompt holds alone from
    `transition` chunks on. `superseded_by` is the event that replaced it before any chunk showed it, and `chunk` then
    the first that shows that event."""

    event_id: str
    prompt: str
    transition: int
    take: int
    chunk: int
    superseded_by: str | None = None

    @property
    def last(self) -> int:
        """The chunk in which its transition is complete."""
        return self.chunk + self.transition - 1

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Told:
    """What a chunk's metadata say of events: ids that begin, that are under way, and that are complete with it."""

    started: tuple[str, ...] = ()
    active: tuple[str, ...] = ()
    completed: tuple[str, ...] = ()
    superseded: tuple[str, ...] = ()


def told_of(changes: Sequence[Change], take: int, chunk: int) -> Told:
    """The events of a chunk. A change is active from its first chunk until its transition is complete, and is cut short
    by the next one."""
    shown = [each for each in changes if each.take == take and each.superseded_by is None]
    started = [each for each in shown if each.chunk == chunk]
    newest = max((each.chunk for each in shown if each.chunk <= chunk), default=-1)
    current = [each for each in shown if each.chunk == newest and chunk <= each.last]
    completed = [each for each in current if each.last == chunk]
    gone = [each for each in changes if each.take == take and each.superseded_by and each.chunk == chunk]
    return Told(*(tuple(each.event_id for each in events) for events in (started, current, completed, gone)))


def with_change(changes: Sequence[Change], new: Change) -> list[Change]:
    """The changes and a new one. The latest wins: those that no chunk has shown are marked, and are told of as replaced
    with the chunk that shows the new one."""
    return [
        replace(each, superseded_by=each.superseded_by or new.event_id, chunk=new.chunk)
        if each.take == new.take and each.chunk >= new.chunk
        else each
        for each in changes
    ] + [new]
