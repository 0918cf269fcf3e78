"""The stages of work, one unit of it, limits, and which workers no pipeline can have.

Nothing here imports Ray or torch: a bad flag is answered at once.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from helios_cp.config.errors import RequestError


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


def check_workers(groups: int, decoders: int, vae_parallel: int) -> None:
    """Raises `RequestError`."""
    if groups < 1:
        raise RequestError(f"--groups {groups}: at least 1 is allowed")
    if decoders < 0:
        raise RequestError(f"--decoders {decoders}: 0 or more are allowed; with 0 each group decodes its own chunks")
    if vae_parallel != 1:
        raise RequestError(
            f"--vae-parallel {vae_parallel}: one worker decodes a chunk here, beside denoising; use more --decoders"
        )


def check_spread(spread: bool, ring: int) -> None:
    """Raises `RequestError` for a ring of one part, which cannot be spread."""
    if spread and ring == 1:
        raise RequestError(
            "--spread: it puts each part of the ring on a node of its own; give it beside --ring 2 or more"
        )


def check_offload(offload: str, decoders: int) -> None:
    """Raises `RequestError` where the VAE would stay on the card beside a transformer that has no room there."""
    if offload != "none" and decoders == 0:
        raise RequestError(
            f"--offload {offload} with --decoders 0: the VAE needs a worker of its own; give --decoders 1"
        )
