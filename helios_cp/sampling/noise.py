"""Random numbers: every draw of a video comes from its own CPU generator, so that all devices and layouts agree.

Functions that take `generators` draw one sample `[1, …]` from each and return the batch `[B, …]`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from helios_cp.device.streams import to_device


def make_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def normal(shape: Sequence[int], generators: Sequence[torch.Generator], device: torch.device) -> Tensor:
    """Standard normal `[B, *shape]` in fp32."""
    return to_device(torch.cat([torch.randn(1, *shape, generator=generator) for generator in generators]), device)


def block_noise_factor(gamma: float, block: int) -> Tensor:
    """Lower Cholesky factor L `[block, block]` of the covariance (1+γ)I − γ11ᵀ of the noise within a patch.

    The covariance is that of Pyramid Flow's renoising (arXiv:2410.05954). For γ = 1/3 and 4 pixels it is
    singular, and its factor exists only in fp64 with 1e-8 added to the diagonal; fp32 fails or gives other samples.
    """
    ones = torch.ones(block, block, dtype=torch.float64)
    identity = torch.eye(block, dtype=torch.float64)
    return torch.linalg.cholesky((1 + gamma + 1e-8) * identity - gamma * ones)


def block_noise(
    shape: Sequence[int],
    gamma: float,
    patch_size: tuple[int, int, int],
    generators: Sequence[torch.Generator],
    device: torch.device,
) -> Tensor:
    """Noise `[B, C, T, h, w]` for `shape` `(C, T, h, w)`, correlated within each patch of a frame, in fp32."""
    channels, frames, height, width = shape
    _, ph, pw = patch_size
    factor = block_noise_factor(gamma, ph * pw).float()
    blocks = channels * frames * (height // ph) * (width // pw)
    samples = [torch.randn(blocks, ph * pw, generator=generator) @ factor.T for generator in generators]
    grid = torch.stack(samples).view(len(samples), channels, frames, height // ph, width // pw, ph, pw)
    return to_device(grid.transpose(4, 5).reshape(len(samples), channels, frames, height, width), device)


def per_frame(function, latents: Tensor) -> Tensor:
    """Apply a function of images `[N, C, h, w]` to every frame of `[B, C, T, h, w]`."""
    frames = latents.transpose(1, 2)
    return function(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).transpose(1, 2)


def halve_noise(noise: Tensor) -> Tensor:
    """Bilinear half-size of `[B, C, T, h, w]`, doubled so that the variance of white noise stays 1."""
    size = (noise.shape[-2] // 2, noise.shape[-1] // 2)
    return per_frame(lambda image: F.interpolate(image, size=size, mode="bilinear") * 2, noise)


def double_nearest(latents: Tensor) -> Tensor:
    """Nearest double-size of `[B, C, T, h, w]`."""
    size = (latents.shape[-2] * 2, latents.shape[-1] * 2)
    return per_frame(lambda image: F.interpolate(image, size=size, mode="nearest"), latents)
