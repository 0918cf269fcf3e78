"""The distribution of latents that the encoder gives for a video."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from helios_cp.device.streams import to_device

LOG_VARIANCES = (-30.0, 20.0)
"""The range that diffusers' `DiagonalGaussianDistribution` keeps them in."""


@dataclass(frozen=True)
class Posterior:
    """A normal distribution of each latent. `parameters` `[B, 2C, T, h, w]`: the means, then the log-variances."""

    parameters: Tensor

    @property
    def mean(self) -> Tensor:
        return self.parameters.chunk(2, dim=1)[0]

    @property
    def log_variance(self) -> Tensor:
        return self.parameters.chunk(2, dim=1)[1].clamp(*LOG_VARIANCES)

    def sample(self, generator: torch.Generator) -> Tensor:
        """Latents `[B, C, T, h, w]`, with noise drawn on the generator's own device, as diffusers draws it."""
        mean = self.mean
        noise = torch.randn(mean.shape, generator=generator, device=generator.device, dtype=mean.dtype)
        return mean + torch.exp(0.5 * self.log_variance) * to_device(noise, mean.device)
