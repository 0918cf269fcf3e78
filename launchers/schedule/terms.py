"""The stages of work, one unit of it, and limits."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Stage(enum.Enum):
    """The kinds of work, in the order of a chunk's way."""

    TEXT = "text"
    START = "start"
    DENOISE = "denoise"
    DECODE = "decode"
    WRITE = "write"


@dataclass(frozen=True)
class Unit:
    """One stage of one chunk of a video. `chunk` is 0 for stages of the whole video."""

    video: int
    stage: Stage
    chunk: int = 0


@dataclass(frozen=True)
class Limits:
    """`undelivered` chunks of a video between denoising and delivery, those in hand included; `active` videos under
    way; `attempts` at one unit before its video fails, because a chunk may be what kills its workers."""

    undelivered: int = 3
    active: int = 4
    attempts: int = 10
