"""Pixels to latents and back, chunk by chunk, with diffusers' `AutoencoderKLWan`."""

from __future__ import annotations

import torch
from torch import Tensor


def _statistics(vae) -> tuple[Tensor, Tensor]:
    """Mean and *inverse* standard deviation of the latents, `[1, C, 1, 1, 1]`."""
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean, device=vae.device, dtype=vae.dtype).view(shape)
    inverse_std = 1.0 / torch.tensor(vae.config.latents_std, device=vae.device, dtype=vae.dtype).view(shape)
    return mean, inverse_std


def encode(vae, video: Tensor):
    """The posterior of `video` `[1, 3, T, H, W]` in [−1, 1]; `sample` draws from it."""
    return vae.encode(video.to(vae.device, vae.dtype)).latent_dist


def sample(vae, posterior, generator: torch.Generator) -> Tensor:
    """Normalised latents `[1, C, T/4, H/8, W/8]` in fp32, drawn from a posterior."""
    mean, inverse_std = _statistics(vae)
    return ((posterior.sample(generator=generator) - mean) * inverse_std).float()


def decode(vae, latents: Tensor) -> Tensor:
    """Video `[B, 3, 4(T−1)+1, 8h, 8w]` in [−1, 1] of one chunk's normalised latents `[B, C, T, h, w]`.

    A chunk decodes alone: nothing of its neighbours is needed.
    """
    mean, inverse_std = _statistics(vae)
    return vae.decode(latents.to(vae.device, vae.dtype) / inverse_std + mean, return_dict=False)[0]


def to_unit(video: Tensor) -> Tensor:
    """`[B, 3, T, H, W]` in [−1, 1] to `[B, T, H, W, 3]` in [0, 1], fp32."""
    return (video.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1)


def to_uint8(video: Tensor) -> Tensor:
    """`[B, 3, T, H, W]` in [−1, 1] to `[B, T, H, W, 3]` in 0–255, rounded, on the video's device."""
    return (to_unit(video) * 255).round().to(torch.uint8)
