"""Changes of prompt: every accepted one has an id, and is told as received, started, active and completed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


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


def told_of(changes: Sequence[Change], take: int, chunk: int) -> dict[str, tuple[str, ...]]:
    """What a chunk's metadata say of events: ids that begin, that are under way, that are complete with it, and that
    never come. A change is active from its first chunk until its transition is complete, and is cut short by the next
    one."""
    mine = [each for each in changes if each.take == take]
    shown = [each for each in mine if each.superseded_by is None]
    newest = max((each.chunk for each in shown if each.chunk <= chunk), default=-1)
    current = [each for each in shown if each.chunk == newest and chunk <= each.last]
    events = {
        "started": [each for each in shown if each.chunk == chunk],
        "active": current,
        "completed": [each for each in current if each.last == chunk],
        "superseded": [each for each in mine if each.superseded_by and each.chunk == chunk],
    }
    return {name: tuple(each.event_id for each in found) for name, found in events.items()}


def with_change(changes: Sequence[Change], new: Change) -> list[Change]:
    """The changes and a new one. The latest wins: those that no chunk has shown are marked, and are told of as replaced
    with the chunk that shows the new one."""
    return [
        replace(each, superseded_by=each.superseded_by or new.event_id, chunk=new.chunk)
        if each.take == new.take and each.chunk >= new.chunk
        else each
        for each in changes
    ] + [new]
