"""Denoising of one chunk: a single stage (Base) or a pyramid of stages (Mid, Distilled), as plain functions.

The order of the random draws and every rounding follow diffusers' `HeliosPipeline` and `HeliosPyramidPipeline`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from helios_cp.config.sampling_plan import SamplingPlan
from helios_cp.device.streams import to_device
from helios_cp.sampling.noise import block_noise, double_nearest, halve_noise
from helios_cp.sampling.solvers import solver_on

SHIFT = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
"""Keys of a scheduler's config that the shift follows from, and what they are where it has none."""

Predict = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""`(latents [B, C, T, h, w], timestep [1]) -> (velocity for the prompt, for the negative prompt or None)`."""


@dataclass(frozen=True)
class Step:
    """Progress within a chunk: `index` of `total` steps is done, in pyramid stage `stage` of `stages`."""

    chunk: int
    stage: int
    stages: int
    index: int
    total: int


def denoise(
    noise: Tensor,
    predict: Predict,
    plan: SamplingPlan,
    scheduler,
    generators: Sequence[torch.Generator],
    *,
    chunk: int,
    dtype: torch.dtype,
    measure: Callable[[str], AbstractContextManager] = lambda name: nullcontext(),
) -> Iterator[Step | Tensor]:
    """Turn `noise` `[B, C, T, h, w]` at full resolution into the chunk's latents of that shape.

    Yields a `Step` after each step, and last the latents. `scheduler` is diffusers' `HeliosScheduler` or
    `HeliosDMDScheduler`; its state is changed. `dtype` is that of the model. `measure` times a named stage, without the
    time that the caller takes between two steps. The host does not wait for the device: the schedule stays on the host,
    and timesteps and noise of a stage are sent while the device computes the step before.
    """
    stages = len(plan.steps)
    latents = noise
    for _ in range(stages - 1):
        latents = halve_noise(latents)
    done, total = 0, plan.total_steps(chunk)
    for stage in range(stages):
        name = f"denoise_{stage + 1}"
        with measure(name):
            set_timesteps(scheduler, plan, stage, latents, first_chunk=chunk == 0)
            if stage > 0:
                latents = double_nearest(latents)
                alpha, beta = renoise_coefficients(scheduler.ori_start_sigmas[stage], scheduler.config.gamma)
                fresh = block_noise(
                    latents.shape[1:], scheduler.config.gamma, plan.patch_size, generators, latents.device
                )
                latents = alpha * latents + beta * fresh.to(dtype)
            timesteps = scheduler.timesteps.to(torch.int64 if plan.is_pyramid else torch.float32)
            timesteps = to_device(timesteps, latents.device)
            solve = solver_on(latents.device, scheduler, latents)
        for step, timestep in enumerate(timesteps.split(1)):
            with measure(name):
                if plan.is_zeroed(stage, step):
                    velocity = torch.zeros_like(latents, dtype=dtype)
                else:
                    velocity = guide(*predict(latents, timestep), plan)
                latents = solve(velocity, latents)
            done += 1
            yield Step(chunk, stage, stages, done, total)
    yield latents


def guide(conditional: Tensor, unconditional: Tensor | None, plan: SamplingPlan) -> Tensor:
    """Combine the two velocities by classifier-free guidance, or by CFG-Zero* with its optimised scale."""
    if unconditional is None:
        return conditional
    if plan.is_cfg_zero_star:
        unconditional = unconditional * projection(conditional, unconditional)
    return unconditional + plan.guidance_scale * (conditional - unconditional)


def projection(conditional: Tensor, unconditional: Tensor) -> Tensor:
    """⟨c, u⟩ / (‖u‖² + 1e-8) for each sample, taken in fp32 (CFG-Zero*, arXiv:2503.18886)."""
    c, u = conditional.flatten(1).float(), unconditional.flatten(1).float()
    scale = (c * u).sum(1) / (u.square().sum(1) + 1e-8)
    return scale.view(-1, *[1] * (conditional.ndim - 1)).to(conditional.dtype)


def renoise_coefficients(start_sigma: float, gamma: float) -> tuple[float, float]:
    """α and β of `α · upsampled + β · block noise` on entry to a finer stage (Pyramid Flow, arXiv:2410.05954).

    `start_sigma` is the noise level at which the stage starts before the correction. They keep the signal's mean and
    the noise's covariance continuous over the jump in resolution.
    """
    signal = 1 - start_sigma
    alpha = 1 / (math.sqrt(1 + 1 / gamma) * (1 - signal) + signal)
    return alpha, alpha * (1 - signal) / math.sqrt(gamma)


def shift_mu(tokens: int, config: Mapping[str, Any] = SHIFT) -> float:
    """Shift of the noise schedule, linear in the number of tokens (as in FLUX); `config` is a scheduler's."""
    base, most, base_shift, max_shift = (config.get(name, default) for name, default in SHIFT.items())
    slope = (max_shift - base_shift) / (most - base)
    return tokens * slope + base_shift - slope * base


def set_timesteps(scheduler, plan: SamplingPlan, stage: int, latents: Tensor, *, first_chunk: bool) -> None:
    """Set the scheduler for a stage, on the CPU.

    `latents` are those before the stage's upsample, whose size gives the shift.
    """
    tokens = math.prod(latents.shape[-3:]) // math.prod(plan.patch_size)
    mu = shift_mu(tokens, scheduler.config)
    steps = plan.steps[stage]
    if plan.is_pyramid:
        amplify = plan.amplify_first_chunk and first_chunk
        scheduler.set_timesteps(steps, stage, device="cpu", mu=mu, is_amplify_first_chunk=amplify)
    else:
        sigmas = np.linspace(0.999, 0.0, steps + 1)[:-1] if plan.sigmas is None else np.array(plan.sigmas)
        scheduler.set_timesteps(steps, device="cpu", sigmas=sigmas, mu=mu)
