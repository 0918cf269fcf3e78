"""One finished chunk of a video, as a pipeline yields it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from helios_cp.sampling.state import ChunkState


@dataclass(frozen=True)
class Chunk:
    """One finished chunk.

    `latents` `[B, C, T, h, w]` fp32; `frames` `[B, 33, H, W, 3]`, uint8 or fp32 in [0, 1], or `None` for output type
    "latent". The next chunk starts from `state`; saved, it resumes the video. `seconds` by stage, as the device took
    them; "decode" may overlap the next chunk, so the stages can sum to more than the wall time. `skipped` are the steps
    that left blocks out (see `helios_cp.model.block_cache`), of those that had a forward, counted from 0.
    """

    index: int
    latents: Tensor
    frames: Tensor | None
    state: ChunkState
    seconds: dict[str, float]
    skipped: tuple[int, ...] = ()
