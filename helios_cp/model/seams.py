"""Seams between chunks: the first frames of a chunk matched to the last one of the chunk before.

Every chunk is decoded alone and starts from noise of its own, so light and colour may jump at its first frame. Only low
frequencies are matched, because details move. The last frames of a chunk stay as they are. So nothing adds up from
chunk to chunk, and a chunk needs only the latents of the one before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

FRAMES = 8  # frames over which the match fades out
BLOCKS = 8  # low frequencies are means of so many blocks over the smaller side of the picture

Decode = Callable[[Tensor], Tensor | None]
"""Latents `[B, C, T, h, w]` to frames `[B, T', H, W, 3]`, or to `None` on ranks without frames."""


def match_seam(frames: Tensor, before: Tensor) -> Tensor:
    """Frames `[B, T, H, W, 3]` with their start matched to `before` `[B, H, W, 3]`; uint8, or fp32 in [0, 1].

    Frame i takes 1 − i/8 of the difference between the low frequencies of `before` and its own. It does not take the
    difference of the first frame, because that frame is often off by itself.
    """
    is_whole = frames.dtype == torch.uint8
    count = min(FRAMES, frames.shape[1])
    starts = frames[:, :count].float()
    away = _low((before.float()[:, None] - starts).flatten(0, 1)).unflatten(0, (-1, count))
    weight = 1 - torch.arange(count, device=frames.device, dtype=torch.float32) / FRAMES
    matched = starts + weight.view(1, -1, 1, 1, 1) * away
    matched = matched.round_().clamp_(0, 255).to(torch.uint8) if is_whole else matched.clamp_(0, 1)
    return torch.cat([matched, frames[:, count:]], 1)


def _low(pictures: Tensor) -> Tensor:
    """The low frequencies of `[B, H, W, 3]`."""
    height, width = pictures.shape[1:3]
    side = min(height, width) / BLOCKS
    blocks = (max(1, round(height / side)), max(1, round(width / side)))
    small = F.interpolate(pictures.permute(0, 3, 1, 2), size=blocks, mode="area")
    return F.interpolate(small, size=(height, width), mode="bilinear").permute(0, 2, 3, 1)


@dataclass(eq=False)
class SeamMatcher:
    """Decodes the chunks of a video in order, each of them once, and matches it to the one before.

    `before` are the latents of the chunk before the first one, which is decoded too; `None` for the start of a video.
    """

    decode: Decode
    before: Tensor | None
    _last: Tensor | None = None

    def __call__(self, latents: Tensor) -> Tensor | None:
        if self.before is not None:
            self._decode(self.before)
            self.before = None
        last = self._last
        frames = self._decode(latents)
        return frames if last is None or frames is None else match_seam(frames, last)

    def _decode(self, latents: Tensor) -> Tensor | None:
        """Frames, of which the last is kept as it is before matching."""
        frames = self.decode(latents)
        self._last = None if frames is None else frames[:, -1].clone()
        return frames
