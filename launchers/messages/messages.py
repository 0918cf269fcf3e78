"""What travels between the driver and its workers; nothing here needs torch, so light workers start without it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from helios_cp.config.request import Request, ScheduledPrompt

if TYPE_CHECKING:
    from helios_cp.files.chunk_files import ChunkFiles
    from launchers.messages.arrays import Array, StateArrays


Schedule = tuple[ScheduledPrompt, ...]


@dataclass(frozen=True)
class ActorInfo:
    """Where an actor runs, and the versions there of what must be the same everywhere."""

    host: str
    node: str
    pid: int
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Span:
    """When a unit of work began and ended, in seconds since 1970, and its parts in seconds."""

    begin: float
    end: float
    parts: dict[str, float]


class Clock:
    """Measures one unit of work in parts."""

    def __init__(self) -> None:
        self.begin = self._last = time.time()
        self.parts: dict[str, float] = {}

    def part(self, name: str) -> None:
        """What passed since the last part was this one."""
        now = time.time()
        self.parts[name] = now - self._last
        self._last = now

    def span(self) -> Span:
        return Span(self.begin, self._last, self.parts)


@dataclass(frozen=True)
class ChunkJob:
    """Which chunk to denoise. `prompt` is the version of the prompt, which `request` holds already."""

    video: int
    prompt: int
    request: Request


@dataclass(frozen=True)
class Text:
    """Embeddings of a request's prompts `[B, L, text_dim]`, or of its schedule's entries from `first` on; and of its
    negative prompt where guidance needs one."""

    prompts: Array
    negative: Array | None
    span: Span
    first: int = 0


@dataclass(frozen=True)
class NextStart:
    """What the chunk after starts from. The latents travel beside it."""

    state: StateArrays
    span: Span


@dataclass(frozen=True)
class Decoded:
    """A chunk's MP4 segments, one a video of the batch, as bytes in arrays; none where no file is written."""

    segments: tuple[np.ndarray, ...]
    span: Span


@dataclass(frozen=True)
class VideoFiles:
    """The files of one video: an MP4 for each of its batch, joined in the end from `chunks`, a run folder or another.

    With `latents` a file of all latents is made of them too.
    """

    video: int
    paths: tuple[Path, ...]
    chunks: ChunkFiles
    latents: Path | None = None


@dataclass(frozen=True)
class Written:
    """A chunk is on disk."""

    span: Span
