"""The terms of a schedule: stages of work, the course of a video through them, tasks, limits."""

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


class Status(enum.Enum):
    """What became of a video."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def has_ended(self) -> bool:
        return self not in (Status.WAITING, Status.RUNNING)


@dataclass(frozen=True)
class Limits:
    """`undelivered` chunks of a video between denoising and delivery, those in hand included; `active` videos under
    way; `attempts` at one task before its video fails, for a chunk may be what kills its workers."""

    undelivered: int = 3
    active: int = 4
    attempts: int = 10


@dataclass(frozen=True)
class Course:
    """The way of one video: chunks `first` to `chunks` − 1, and which stages they go through.

    The first `denoised` of them are denoised already, by an earlier run. `starts`: a picture or clip is encoded first.
    `streams`: a chunk counts as delivered when it has been `taken`.
    """

    chunks: int
    first: int = 0
    denoised: int = 0
    starts: bool = False
    decodes: bool = True
    writes: bool = True
    streams: bool = False


@dataclass(frozen=True)
class Task:
    """One call of one worker. `prompt` is the version of the video's prompt that it is for."""

    number: int
    video: int
    stage: Stage
    chunk: int
    prompt: int
    worker: str
