"""The VAE split over the ranks of a group along the height, equal to the unsplit one.

Each rank runs the same modules on its rows alone. The layers that look at other rows get them from `SplitRows`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from helios_cp.config.execution import Execution
from helios_cp.model.codec import Codec, denormalise
from helios_cp.model.vae.autoencoder import Autoencoder
from helios_cp.model.vae.sweep import Rows
from parallel.collectives import Group
from parallel.halo import fetch_borders
from parallel.segments import split

LATENT_ROWS = 3  # dim of the rows in [B, C, T, h, w]
FRAME_ROWS = 2  # in [B, T, H, W, C]


@dataclass(frozen=True)
class SplitRows(Rows):
    """Consecutive rows on each rank of a group; `rows` are those of the latents, of all ranks."""

    group: Group
    rows: Sequence[int]
    is_whole = False

    def fetch(self, states: Tensor, above: int, below: int) -> None:
        fetch_borders(states, self.group, FRAME_ROWS, above, below)

    def gather(self, states: Tensor) -> Tensor:
        return torch.cat(self.group.all_gather(states, self.rows, FRAME_ROWS), FRAME_ROWS)


class SplitCodec(Codec):
    """The VAE split by rows over the ranks that share it with rank 0, where frames and posteriors end.

    Raises `ValueError` for more ranks than rows of latents.
    """

    def __init__(self, vae: Autoencoder | None, group: Group, execution: Execution | None = None) -> None:
        super().__init__(vae, execution)
        self.share = group

    @property
    def is_local(self) -> bool:
        return super().is_local and self.share.size == 1

    def encode(self, videos: Sequence[Tensor | None]) -> list[Tensor | None]:
        """As `Codec.encode`; ranks other than 0 pass a `None` for each video and get one back."""
        if self.vae is None:
            return [None] * len(videos)
        if self.share.size == 1:
            return super().encode(videos)
        parameters = [self._encode_split(video) for video in videos]
        return [None if each is None else each.float() for each in parameters]

    def decode(self, latents: Tensor, output_type: str) -> Tensor | None:
        if self.vae is None:
            return None
        if self.share.size == 1:
            return super().decode(latents, output_type)
        rows = self._rows(latents.shape[LATENT_ROWS])
        own = latents.split(rows.rows, LATENT_ROWS)[self.share.rank]
        frames = self._decode(denormalise(self.vae, own), output_type, rows)
        return self._gather(frames, [self.vae.config.spatial * size for size in rows.rows], FRAME_ROWS)

    def _encode_split(self, video: Tensor | None) -> Tensor | None:
        """The parameters on rank 0 of the group, from its video, of which every rank is sent its rows."""
        shape = self.share.broadcast_object(None if video is None else tuple(video.shape))
        if shape is None:
            raise ValueError("video None on rank 0 of the group: rank 0 must hold the whole video")
        factor = self.vae.config.spatial
        rows = self._rows(shape[LATENT_ROWS] // factor)
        pixels = [factor * size for size in rows.rows]
        pixels[-1] += shape[LATENT_ROWS] % factor  # too few for a row of latents
        return self._gather(self._encode(self._scatter(video, pixels, shape), rows), rows.rows, LATENT_ROWS)

    def _rows(self, rows: int) -> SplitRows:
        if self.share.size > rows:
            raise ValueError(f"VAE over {self.share.size} ranks: at most {rows} are allowed, the rows of the latents")
        return SplitRows(self.share, split(rows, self.share.size))

    def _agree(self, group: int) -> int:
        own = torch.tensor([group], device=self.vae.device)
        return int(torch.cat(self.share.all_gather(own, [1] * self.share.size, 0)).min())

    def _scatter(self, video: Tensor | None, rows: Sequence[int], shape: Sequence[int]) -> Tensor:
        """This rank's rows of rank 0's video, of which each rank is sent its own only."""
        like = torch.empty(0, device=self.vae.device, dtype=self.vae.dtype)
        if self.share.rank > 0:
            own = (*shape[:LATENT_ROWS], rows[self.share.rank], *shape[LATENT_ROWS + 1 :])
            return self.share.exchange([], [(0, own)], like, "scatter").wait()[0]
        parts = video.to(like).split(rows, LATENT_ROWS)
        self.share.exchange(list(enumerate(parts))[1:], [], like, "scatter").wait()
        return parts[0]

    def _gather(self, own: Tensor, rows: Sequence[int], dim: int) -> Tensor | None:
        """The rows of all ranks end to end on rank 0, None elsewhere."""
        if self.share.rank > 0:
            self.share.exchange([(0, own)], [], own, "gather").wait()
            return None
        shapes = [(*own.shape[:dim], size, *own.shape[dim + 1 :]) for size in rows]
        others = self.share.exchange([], list(enumerate(shapes))[1:], own, "gather").wait()
        return torch.cat([own, *others], dim)
