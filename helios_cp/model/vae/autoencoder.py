"""The VAE: encoder, decoder, and how a video goes through them in groups of frames."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from helios_cp.model.vae.config import VaeConfig
from helios_cp.model.vae.halves import Decoder, Encoder
from helios_cp.model.vae.kernels import NormSilu, norm_silu
from helios_cp.model.vae.layers import PointConvolution
from helios_cp.model.vae.resampling import FoldedUpsampling
from helios_cp.model.vae.sweep import Rows, Sweep

FRAMES = 4  # pixel frames to a step of diffusers' encoder, after the first; a rest of fewer is left out


class Autoencoder(nn.Module):
    """Equal to diffusers' `AutoencoderKLWan` of the same parameters, under the same names.

    A video goes through all at once, or in groups of `group` latent frames, which gives the same with less memory.
    `rows` says where the rows of the video lie; the rows that go in and come out are those here. Weights, like videos,
    lie channels last in memory.
    """

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        self.norm_silu: NormSilu = norm_silu
        self.encoder = Encoder(config)
        self.quant_conv = PointConvolution(2 * config.z_dim, 2 * config.z_dim)
        self.post_quant_conv = PointConvolution(config.z_dim, config.z_dim)
        self.decoder = Decoder(config)
        for layer in self.modules():
            if isinstance(layer, nn.Conv3d):
                layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last_3d)
            elif isinstance(layer, nn.Conv2d):
                layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)

    def fold(self) -> None:
        """Make anew what is derived from the weights, after these were written in place. Loading does it by itself."""
        for layer in self.modules():
            if isinstance(layer, FoldedUpsampling):
                layer.fold()

    @property
    def dtype(self) -> torch.dtype:
        return self.post_quant_conv.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.post_quant_conv.weight.device

    def decode_groups(self, latents: Tensor, group: int | None = None, rows: Rows | None = None) -> Iterator[Tensor]:
        """Frames `[B, t, H, W, 3]` in [−1, 1] of one group of latents `[B, C, T, h, w]` after the other.

        The first latent frame makes one frame, each other makes 4 where two levels double frames.
        """
        states = self.post_quant_conv(latents.movedim(1, -1).to(self.device, self.dtype).contiguous()).total()
        sweep = Sweep(rows or Rows(), self.norm_silu)
        parts = states.split(group or states.shape[1], 1)
        for index, part in enumerate(parts):
            sweep.is_first, sweep.is_last = index == 0, index == len(parts) - 1
            yield unpatchify(self.decoder(part, sweep), self.config.patch_size or 1).clamp_(-1, 1)

    def decode(self, latents: Tensor, group: int | None = None, rows: Rows | None = None) -> Tensor:
        """The video `[B, 3, T', H, W]` in [−1, 1] of latents `[B, C, T, h, w]`."""
        return join(list(self.decode_groups(latents, group, rows))).movedim(-1, 1)

    def encode(self, video: Tensor, group: int | None = None, rows: Rows | None = None) -> Tensor:
        """Mean and log-variance `[B, 2C, T, h, w]` of the latents of a video `[B, 3, T', H, W]` in [−1, 1].

        Of frames that lie elsewhere, or in another dtype, a group at a time is brought here. Raises `ValueError` for a
        height or width that `patch_size` does not divide.
        """
        sweep = Sweep(rows or Rows(), self.norm_silu)
        steps = 1 + (video.shape[2] - 1) // FRAMES
        group = group or steps
        means = []
        for first in range(0, steps, group):
            last = min(first + group, steps)
            sweep.is_first, sweep.is_last = first == 0, last == steps
            part = video[:, :, max(FRAMES * (first - 1) + 1, 0) : FRAMES * (last - 1) + 1]
            part = patchify(part.movedim(1, -1).to(self.device, self.dtype), self.config.patch_size or 1)
            means.append(self.quant_conv(self.encoder(part, sweep)).total())
        return join(means).movedim(-1, 1)


def join(groups: list[Tensor]) -> Tensor:
    """Groups of frames `[B, t, ...]` end to end."""
    return groups[0] if len(groups) == 1 else torch.cat(groups, 1)


def patchify(video: Tensor, size: int) -> Tensor:
    """Squares of size × size pixels of `[B, T, H, W, C]` folded into channels, column before row as diffusers does."""
    if size == 1:
        return video
    height, width = video.shape[2:4]
    if height % size or width % size:
        raise ValueError(f"video of {height} × {width} pixels: both must be multiples of patch_size {size}")
    video = video.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # [B, T, h, p, w, q, C]
    return video.permute(0, 1, 2, 4, 6, 5, 3).flatten(4)


def unpatchify(video: Tensor, size: int) -> Tensor:
    """The inverse of `patchify`."""
    if size == 1:
        return video
    video = video.unflatten(-1, (-1, size, size))  # [B, T, h, w, C, q, p]
    return video.permute(0, 1, 2, 6, 3, 5, 4).flatten(4, 5).flatten(2, 3)
