"""Pixels to latents and back, chunk by chunk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from helios_cp.config.execution import Execution
from helios_cp.device.device import has_tf32
from helios_cp.device.memory import free_host_memory, free_memory
from helios_cp.device.streams import to_device
from helios_cp.model.vae.autoencoder import FRAMES, Autoencoder, join
from helios_cp.model.vae.memory import choose_group
from helios_cp.model.vae.sweep import Rows

OUTPUT_TYPES = ("uint8", "float", "latent")
LOG_VARIANCES = (-30.0, 20.0)  # the range that diffusers' `DiagonalGaussianDistribution` keeps them in


class Codec:
    """A VAE on this rank. `pipeline.split_codec` has one that is split over ranks.

    An execution brings it into a dtype and says whether convolutions in fp32 may run on TF32 tensor cores; without one
    both stay as they are. `group` is how many latent frames go through the VAE together; where it is `None`, that
    depends on the memory that is free when a size of video comes first.
    """

    def __init__(self, vae: Autoencoder | None, execution: Execution | None = None) -> None:
        self.vae = vae
        self.tf32 = None if execution is None else execution.tf32
        self.group = None if execution is None else execution.vae_group
        if vae is not None and execution is not None:
            vae.to(getattr(torch, execution.vae_dtype))
        self._chosen: dict[tuple[int, ...], int] = {}

    @property
    def is_local(self) -> bool:
        """Whether this rank decodes without other ranks. Only then may it decode beside other work.

        Ranks that share a VAE exchange rows, while those of the denoising exchange tokens. NCCL does not promise
        progress to two communicators at work on one card, unless all ranks run their operations in one order.
        """
        return self.vae is not None

    @property
    def last_group(self) -> int | None:
        """How many latent frames went through together last, for a report; `None` before the first."""
        return next(reversed(self._chosen.values()), None)

    def encode(self, videos: Sequence[Tensor]) -> list[Tensor]:
        """The posterior of each video `[1, 3, T, H, W]` in [−1, 1], to `draw` from.

        That is mean and log-variance of its latents, `[1, 2C, T/4, H/8, W/8]` in fp32: the noise is then the same for
        every dtype of the VAE.
        """
        return [self._encode(video).float() for video in videos]

    def draw(self, posterior: Tensor, generator: torch.Generator) -> Tensor:
        """Normalised latents `[1, C, T/4, H/8, W/8]` in fp32, drawn from a posterior."""
        mean, inverse_std = latent_statistics(self.vae)
        return (sample(posterior, generator) - mean) * inverse_std

    def decode(self, latents: Tensor, output_type: str) -> Tensor | None:
        """Frames `[B, 4(T−1)+1, 8h, 8w, 3]` of one chunk's normalised latents `[B, C, T, h, w]`.

        A chunk decodes alone: nothing of its neighbours is needed. uint8, or fp32 in [0, 1] for output type "float".
        `None` on ranks that the frames do not end on.
        """
        return self._decode(denormalise(self.vae, latents), output_type)

    def convolutions(self) -> AbstractContextManager[None]:
        """Convolutions inside run in the precision that this codec states."""
        return contextlib.nullcontext() if self.tf32 is None else convolution_tf32(self.tf32)

    def _decode(self, latents: Tensor, output_type: str, rows: Rows | None = None) -> Tensor:
        """Frames of these rows of denormalised latents."""
        group = self._group(tuple(latents.shape))
        with self.convolutions():
            parts = (to_frames(part, output_type=output_type) for part in self.vae.decode_groups(latents, group, rows))
            return join(list(parts))

    def _encode(self, video: Tensor, rows: Rows | None = None) -> Tensor:
        """Mean and log-variance of these rows of a video."""
        factor = self.vae.config.spatial
        steps = 1 + (video.shape[2] - 1) // FRAMES
        shape = (len(video), 0, steps, video.shape[3] // factor, video.shape[4] // factor)
        with self.convolutions():
            return self.vae.encode(video, self._group(shape), rows)

    def _group(self, shape: tuple[int, ...]) -> int:
        """Latent frames at a time, of latents `[B, C, T, h, w]` on this rank."""
        if shape not in self._chosen:
            vae, device = self.vae, self.vae.device
            free = free_host_memory() if device.type == "cpu" else free_memory(device)
            self._chosen[shape] = self.group or self._agree(choose_group(vae.config, shape, vae.dtype.itemsize, free))
        return self._chosen[shape]

    def _agree(self, group: int) -> int:
        """What all ranks that share the VAE can do."""
        return group


def vae_settings(execution: Execution, device: torch.device) -> dict[str, Any]:
    """How the VAE runs on a device by an execution, for a report."""
    is_tf32 = execution.tf32 and execution.vae_dtype == "float32" and has_tf32(device)
    return {"dtype": execution.vae_dtype, "convolutions": "tf32" if is_tf32 else execution.vae_dtype}


@contextmanager
def convolution_tf32(allowed: bool) -> Iterator[None]:
    """Inside, cuDNN's convolutions in fp32 may use TF32, or must not; matrix products are left alone.

    torch has the older name `allow_tf32` and the newer `conv.fp32_precision` for it. The older one sets both, whereas
    after the newer one alone the older cannot be read, which torch's own compiler does.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    try:
        older = cudnn.allow_tf32
    except RuntimeError:  # somebody has set the newer names apart
        older = None
    cudnn.allow_tf32 = allowed
    if not allowed and cudnn.conv.fp32_precision == "tf32":  # as torch.backends.fp32_precision says for all
        cudnn.conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        if older is not None:
            cudnn.allow_tf32 = older
        if (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) != before:
            cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = before


def latent_statistics(vae) -> tuple[Tensor, Tensor]:
    """Mean and *inverse* standard deviation of the latents, `[1, C, 1, 1, 1]` in fp32."""
    values = torch.tensor([vae.config.latents_mean, vae.config.latents_std], dtype=torch.float32)
    mean, std = to_device(values, vae.device).view(2, 1, vae.config.z_dim, 1, 1, 1)
    return mean, 1.0 / std


def sample(posterior: Tensor, generator: torch.Generator) -> Tensor:
    """Latents from their means and log-variances, with noise drawn on the generator's own device, as diffusers does."""
    mean, log_variance = posterior.chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=generator, device=generator.device, dtype=mean.dtype)
    return mean + torch.exp(0.5 * log_variance.clamp(*LOG_VARIANCES)) * to_device(noise, mean.device)


def denormalise(vae: Autoencoder, latents: Tensor) -> Tensor:
    """Latents as the decoder takes them, in fp32 on its device."""
    mean, inverse_std = latent_statistics(vae)
    return latents.to(vae.device, torch.float32) / inverse_std + mean


def to_frames(video: Tensor, output_type: str) -> Tensor:
    """Pixels in [−1, 1] to fp32 in [0, 1] for output type "float", else to uint8, rounded. Contiguous."""
    frames = (video.float() / 2 + 0.5).clamp_(0, 1)
    return (frames if output_type == "float" else frames.mul_(255).round_().to(torch.uint8)).contiguous()
