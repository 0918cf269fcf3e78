"""What flows of pyramid stages run between: the noise levels of `HeliosScheduler`, and points to train on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from helios_cp.sampling.denoise import renoise_coefficients
from helios_cp.sampling.noise import block_noise_factor, double_nearest, per_frame


def halve(latents: Tensor) -> Tensor:
    """Bilinear half-size of `[B, C, T, h, w]`."""
    size = (latents.shape[-2] // 2, latents.shape[-1] // 2)
    return per_frame(lambda image: F.interpolate(image, size=size, mode="bilinear"), latents)


class Stages:
    """A stage runs from noise level `start` to `end` on its own grid, at timesteps from `highest` down to `lowest`."""

    def __init__(self, count: int = 3) -> None:
        from diffusers import HeliosScheduler

        scheduler = HeliosScheduler(stages=count)
        self.count, self.gamma = count, scheduler.config.gamma
        self.start = [scheduler.start_sigmas[i] for i in range(count)]
        self.end = [scheduler.end_sigmas[i] for i in range(count)]
        self.lowest = [float(scheduler.timesteps_per_stage[i].min()) for i in range(count)]
        self.highest = [float(scheduler.timesteps_per_stage[i].max()) for i in range(count)]
        self.renoise = [renoise_coefficients(scheduler.ori_start_sigmas[i], self.gamma) for i in range(count)]
        self._factor = block_noise_factor(self.gamma, 4).float()

    def timestep(self, stage: int, sigma: Tensor) -> Tensor:
        """The timestep, floored as the sampler floors it, of noise levels `sigma` in 0 … 1 within a stage."""
        return (self.lowest[stage] + sigma * (self.highest[stage] - self.lowest[stage])).floor()

    def enter(self, stage: int, ended: Tensor) -> Tensor:
        """The point where a stage starts, from that where the one before ended, at half its size."""
        alpha, beta = self.renoise[stage]
        doubled = double_nearest(ended)
        return alpha * doubled + beta * self.block_noise(doubled)

    def block_noise(self, like: Tensor) -> Tensor:
        """Noise as of `helios_cp.sampling.noise.block_noise`, from torch's own generator."""
        batch, channels, frames, height, width = like.shape
        blocks = torch.randn(batch, channels, frames, height // 2, width // 2, 4, device=like.device)
        blocks = (blocks @ self._factor.to(like.device).T).unflatten(-1, (2, 2))
        return blocks.transpose(4, 5).reshape(like.shape)

    def points(self, clean: Tensor, stage: int, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `points_at`, for clean latents `[B, C, T, h, w]` at full size."""
        for _ in range(self.count - 1 - stage):
            clean = halve(clean)
        return self.points_at(clean, stage, start)

    def points_at(self, clean: Tensor, stage: int, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Start and end of a stage's straight flow for clean latents at its own size.

        Stage 0 starts from white noise n and ends at e·n + (1 − e)·x. A later stage starts where the one before ends,
        doubled and renoised as the sampler does. With another `start`, as a model made it, its errors count as noise,
        and the flow leads away from them.
        """
        coarse = halve(clean) if stage else None
        if start is None:
            start = self.enter(stage, _noisy(coarse, self.end[stage - 1])) if stage else torch.randn_like(clean)
        noise = self.noise_of(stage, start, coarse)
        return start, self.end[stage] * noise + (1 - self.end[stage]) * clean

    def clean_of(self, stage: int, start: Tensor, end: Tensor, coarse: Tensor | None) -> Tensor:
        """The clean latents of a stage that led from `start` to `end`; see `noise_of`."""
        return (end - self.end[stage] * self.noise_of(stage, start, coarse)) / (1 - self.end[stage])

    def noise_of(self, stage: int, start: Tensor, coarse: Tensor | None) -> Tensor:
        """The noise in the start of a stage, where `coarse` are the clean latents of the stage before.

        n = (start − (1 − s)·double(x₋)) / s, which is also that of the stage's end (Pyramid Flow, arXiv:2410.05954,
        eq. 9 and 10).
        """
        if stage == 0:
            return start
        return (start - (1 - self.start[stage]) * double_nearest(coarse)) / self.start[stage]


def _noisy(clean: Tensor, level: float) -> Tensor:
    return level * torch.randn_like(clean) + (1 - level) * clean
