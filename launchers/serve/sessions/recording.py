"""A session on disk: what it is asked to make, by whom it may be steered, and every change; enough to go on with it.

session.json   this recording, written whole at every change
take-000/      a run folder (see `helios_cp.generate.run_folder`); a reset begins the next
media/         see `launchers.serve.media.store`
video.mp4      all takes, once the session is done
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from helios_cp.config.json_types import from_json
from helios_cp.config.request import Request, ScheduledPrompt
from helios_cp.files.whole_files import write_json

FORMAT = 1
FILE = "session.json"
STATES = ("queued", "running", "paused", "done")


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


@dataclass
class Take:
    """A run from a seed and a prompt. `first_chunk` counts over the session; `chunks` is known when it has ended."""

    first_chunk: int
    seed: int
    prompt: str
    chunks: int | None = None


@dataclass
class Recording:
    """`control` and `view` are digests of the tokens. `request` is resolved; takes replace its
    seed and prompt. One that `is_endless` goes on until it is stopped, or has all the chunks that the server allows."""

    id: str
    folder: Path
    request: Request
    control: str
    view: str
    lead: float
    is_endless: bool = True
    state: str = "queued"
    why: str = ""
    created: float = field(default_factory=time.time)
    ended: float | None = None
    takes: list[Take] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        values = {"format": FORMAT, **asdict(self)}
        del values["folder"]
        return values

    def write(self, values: dict[str, Any]) -> None:
        """What `to_json` gave: whole on disk, or as it was before, whenever the process is killed."""
        write_json(self.folder / FILE, values)

    @classmethod
    def load(cls, folder: Path) -> Recording:
        """Raises `ValueError` for what is no recording."""
        try:
            values = json.loads((folder / FILE).read_text(encoding="utf-8"))
            if values.pop("format") != FORMAT or values["state"] not in STATES:
                raise ValueError("it is of another version")
            values["request"] = from_json(Request, values["request"])
            values["takes"] = [Take(**each) for each in values["takes"]]
            values["changes"] = [Change(**each) for each in values["changes"]]
            return cls(folder=folder, **values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / FILE}: this is no recording of a session: {error}") from None

    def changes_from(self, chunk: int) -> list[Change]:
        """Those of the newest take that hold from a chunk or a later one on."""
        return [each for each in self._shown(len(self.takes) - 1) if each.chunk >= chunk]

    def add_unanswered(self, shown: Mapping[int, ScheduledPrompt]) -> None:
        """Take up changes that chunks on disk were made of, though the server was killed before it had recorded and
        answered them. `shown` has the prompts of the newest take so far, each by the chunk from which on it holds."""
        begun = self.takes[-1]
        known = {(begun.first_chunk, begun.prompt)}
        known |= {(each.chunk, each.prompt) for each in self.changes_from(begun.first_chunk)}
        for chunk, entry in shown.items():
            if (chunk, entry.prompt) not in known:
                take, transition = len(self.takes) - 1, entry.transition or 1
                new = Change(f"unanswered-{chunk}", entry.prompt, transition, take, chunk)
                self.changes = with_change(self.changes, new)

    def prompt_at(self, take: int, chunk: int) -> str:
        """The newest prompt in a chunk of a take; in a transition the older ones are mixed with it."""
        shown = [each for each in self._shown(take) if each.chunk <= chunk]
        return max(shown, key=lambda each: each.chunk).prompt if shown else self.takes[take].prompt

    def _shown(self, take: int) -> list[Change]:
        """The changes of a take that no later one has replaced."""
        return [each for each in self.changes if each.take == take and each.superseded_by is None]

    @property
    def media(self) -> Path:
        return self.folder / "media"

    def run_folder(self, take: int) -> Path:
        return self.folder / f"take-{take:03d}"

    def segments(self, chunks: int) -> Iterator[Path]:
        """The MP4 segments of the first chunks of the session, over all takes."""
        for number, take in enumerate(self.takes):
            count = chunks - take.first_chunk if take.chunks is None else take.chunks
            for chunk in range(count):
                yield self.run_folder(number) / f"chunk-{chunk:05d}-0.mp4"

    def schedule(self, take: int, chunks: int) -> dict[str, Any]:
        """What `--prompt-schedule-file` takes to make `chunks` chunks of a take again."""
        begun = self.takes[take]
        shown = [each for each in self._shown(take) if each.chunk < begun.first_chunk + chunks]
        borders = [begun.first_chunk, *(each.chunk for each in shown), begun.first_chunk + chunks]
        lengths = [after - before for before, after in pairwise(borders)]
        entries: list[dict[str, Any]] = [{"prompt": begun.prompt, "chunks": lengths[0]}]
        for each, length in zip(shown, lengths[1:], strict=True):
            entries.append({"prompt": each.prompt, "chunks": length, "transition": each.transition})
        if lengths[0] == 0:  # a change took over before the first chunk, with nothing to mix with
            entries = entries[1:]
            entries[0].pop("transition")
        request = for_viewers(self.request)
        for name in ("prompt", "prompt_schedule", "sigmas"):
            request.pop(name)
        frames = chunks * self.request.frames_per_chunk
        return {"prompt_schedule": entries, **request, "seed": [begun.seed], "num_frames": frames}


def for_viewers(request: Request) -> dict[str, Any]:
    """A request for those who may watch: files by their names alone."""
    values = asdict(request)
    values |= {name: Path(values[name]).name for name in ("image", "video") if values[name] is not None}
    if request.lora is not None:
        values["lora"] = [{"path": Path(each.path).name, "weight": each.weight} for each in request.lora]
    return values
