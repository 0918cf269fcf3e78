"""Pixels to latents and back, chunk by chunk, with diffusers' `AutoencoderKLWan`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

OUTPUT_TYPES = ("uint8", "float", "latent")


class Codec:
    """A VAE on this rank. `helios_cp.parallelize` has one that is split over ranks."""

    def __init__(self, vae) -> None:
        self.vae = vae

    def encode(self, videos: Sequence[Tensor]) -> list[DiagonalGaussianDistribution]:
        """The posterior of each video `[1, 3, T, H, W]` in [−1, 1]; `draw` samples from it."""
        return [self.vae.encode(video.to(self.vae.device, self.vae.dtype)).latent_dist for video in videos]

    def draw(self, posterior: DiagonalGaussianDistribution, generator: torch.Generator) -> Tensor:
        """Normalised latents `[1, C, T/4, H/8, W/8]` in fp32, drawn from a posterior."""
        mean, inverse_std = latent_statistics(self.vae)
        return ((posterior.sample(generator=generator) - mean) * inverse_std).float()

    def decode(self, latents: Tensor, output_type: str) -> Tensor | None:
        """Frames `[B, 4(T−1)+1, 8h, 8w, 3]` of one chunk's normalised latents `[B, C, T, h, w]`.

        A chunk decodes alone: nothing of its neighbours is needed. uint8, or fp32 in [0, 1] for output type "float".
        `None` on ranks that the frames do not end on.
        """
        return to_frames(self.vae.decode(denormalise(self.vae, latents), return_dict=False)[0], output_type)


def latent_statistics(vae) -> tuple[Tensor, Tensor]:
    """Mean and *inverse* standard deviation of the latents, `[1, C, 1, 1, 1]`."""
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean, device=vae.device, dtype=vae.dtype).view(shape)
    inverse_std = 1.0 / torch.tensor(vae.config.latents_std, device=vae.device, dtype=vae.dtype).view(shape)
    return mean, inverse_std


def denormalise(vae, latents: Tensor) -> Tensor:
    """Latents as the decoder takes them."""
    mean, inverse_std = latent_statistics(vae)
    return latents.to(vae.device, vae.dtype) / inverse_std + mean


def to_frames(video: Tensor, output_type: str) -> Tensor:
    """`[B, 3, T, H, W]` in [−1, 1] to `[B, T, H, W, 3]`, on the video's device.

    fp32 in [0, 1] for output type "float", else uint8, rounded.
    """
    frames = (video.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1)
    return frames if output_type == "float" else (frames * 255).round().to(torch.uint8)
