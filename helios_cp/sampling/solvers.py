"""One step of the sampler without the host waiting for the device: diffusers' arithmetic, bit for bit on a CPU.

diffusers' schedulers make small tensors, look up sigmas and solve a 2 × 2 system on the device, and the host waits for
each. Here these stay on the CPU, with the schedule, and the device computes only products and sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from helios_cp.device.device import has_float64

UNIPC = {
    "scheduler_type": "unipc",
    "prediction_type": "flow_prediction",
    "predict_x0": True,
    "use_flow_sigmas": True,
    "thresholding": False,
    "solver_p": None,
    "solver_order": 2,
    "solver_type": "bh2",
    "lower_order_final": True,
    "disable_corrector": [],
}
"""The configuration of every Helios checkpoint's `HeliosScheduler`, as far as it decides on the steps."""

Solver = Callable[[Tensor, Tensor], Tensor]
"""`(velocity, latents) -> latents of the next step`, called for the steps of one stage in order."""


def solver_on(device: torch.device, scheduler, start: Tensor) -> Solver:
    """`make_solver`, whose steps run on the device, or on the CPU where the device has no float64."""
    return make_solver(scheduler, start) if has_float64(device) else HostSolver(make_solver(scheduler, start.cpu()))


def make_solver(scheduler, start: Tensor) -> Solver:
    """The solver for a stage that begins with the latents `start`, after `scheduler.set_timesteps(…, device="cpu")`.

    The scheduler's own step serves what no Helios checkpoint has: Euler, other orders, other predictions.
    """
    from diffusers import HeliosDMDScheduler, HeliosScheduler  # a second, which planning need not wait for

    if type(scheduler) is HeliosDMDScheduler and scheduler.config.stages > 1:
        return DmdSolver(scheduler.sigmas, scheduler.timesteps, start)
    if type(scheduler) is HeliosScheduler and UNIPC.items() <= scheduler.config.items():
        return UniPcSolver(scheduler.sigmas)
    return SchedulerSteps(scheduler, start)


@dataclass
class SchedulerSteps:
    """The steps of a diffusers scheduler itself."""

    scheduler: Any
    start: Tensor
    index: int = 0

    def __call__(self, velocity: Tensor, latents: Tensor) -> Tensor:
        timesteps, options = self.scheduler.timesteps, {}
        if "scheduler_type" not in self.scheduler.config:  # DMD, where the stage's start serves again as its noise
            options = {
                "cur_sampling_step": self.index,
                "dmd_noisy_tensor": self.start,
                "dmd_sigmas": self.scheduler.sigmas,
                "dmd_timesteps": timesteps,
                "all_timesteps": timesteps,
            }
        timestep = timesteps[self.index]
        self.index += 1
        return self.scheduler.step(velocity, timestep, latents, return_dict=False, **options)[0]


class DmdSolver:
    """x0 = xt − σ·v in fp64, then back to the next σ with the stage's start as noise (DMD, arXiv:2405.14867)."""

    def __init__(self, sigmas: Tensor, timesteps: Tensor, start: Tensor) -> None:
        # A step looks up its σ by its timestep, truncated to a whole number.
        nearest = [(timesteps.double() - int(timestep)).abs().argmin() for timestep in timesteps]
        self.sigmas = [float(sigmas[index]) for index in nearest]
        self.start = start
        self.index = 0

    def __call__(self, velocity: Tensor, latents: Tensor) -> Tensor:
        clean = (latents.double() - self.sigmas[self.index] * velocity.double()).to(velocity.dtype)
        self.index += 1
        if self.index == len(self.sigmas):
            return clean
        sigma = self.sigmas[self.index]
        return ((1 - sigma) * clean.double() + sigma * self.start.double()).to(self.start.dtype)


class UniPcSolver:
    """UniPC of order 2 with B(h) = e^h − 1, for data prediction (arXiv:2302.04867, algorithms 5 and 6).

    The first step, and the last, are of order 1. Coefficients are CPU tensors without dims, in the dtype of the
    schedule, which PyTorch passes to kernels as numbers: the dtype of the latents stays.
    """

    def __init__(self, sigmas: Tensor) -> None:
        self.sigmas = sigmas
        self.alphas = 1 - sigmas
        self.clamped = sigmas.clamp(min=1e-8)
        self.lambdas = self.alphas.log() - self.clamped.log()
        self.index = 0
        self.clean: list[Tensor] = []  # predictions of the steps before, the latest last
        self.last_order = 0
        self.last_latents: Tensor | None = None

    def __call__(self, velocity: Tensor, latents: Tensor) -> Tensor:
        index, steps = self.index, len(self.sigmas) - 1
        clean = latents - self.sigmas[index] * velocity
        if index > 0:
            latents = self._correct(clean)
        self.clean = [*self.clean, clean][-2:]
        self.last_order = min(2, steps - index, index + 1)
        self.last_latents = latents
        self.index += 1
        return self._predict(latents)

    def _predict(self, latents: Tensor) -> Tensor:
        """From the latents of step `index - 1` to those of step `index`."""
        target, source = self.index, self.index - 1
        scaled, phi, _ = self._exponentials(target, source, latents)
        following = scaled - self.alphas[target] * phi * self.clean[-1]
        if self.last_order == 2:
            ratio = self._ratio(target, source, source - 1)
            slope = (self.clean[-2] - self.clean[-1]) / ratio
            following = following - self.alphas[target] * phi * (0.5 * slope)
        return following.to(latents.dtype)

    def _correct(self, clean: Tensor) -> Tensor:
        """The latents of step `index` once more, with what was predicted there."""
        target, source = self.index, self.index - 1
        scaled, phi, h = self._exponentials(target, source, self.last_latents)
        before = self.clean[-1]
        following = scaled - self.alphas[target] * phi * before
        change = clean - before
        if self.last_order == 1:
            correction = 0.5 * change
        else:
            ratio = self._ratio(target, source, source - 1)
            weights = self._weights(ratio, phi, h).to(clean.dtype)
            slope = (self.clean[-2] - before) / ratio
            correction = weights[0] * slope + weights[1] * change
        return (following - self.alphas[target] * phi * correction).to(self.last_latents.dtype)

    def _exponentials(self, target: int, source: int, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """σt/σs · latents, e^(−h) − 1 and −h, where h is the step in log signal-to-noise."""
        h = -(self.lambdas[target] - self.lambdas[source])
        return self.clamped[target] / self.clamped[source] * latents, torch.expm1(h), h

    def _ratio(self, target: int, source: int, earlier: int) -> Tensor:
        step = self.lambdas[target] - self.lambdas[source]
        return (self.lambdas[earlier] - self.lambdas[source]) / step

    @staticmethod
    def _weights(ratio: Tensor, phi: Tensor, h: Tensor) -> Tensor:
        """Of the slope before and the one just found, so that the corrector is of order 2 (equation 10)."""
        ratios = torch.stack([ratio, torch.ones_like(ratio)])
        second = phi / h - 1
        third = second / h - 0.5
        right = torch.stack([second / phi, third * 2 / phi])
        return torch.linalg.solve(torch.stack([torch.ones_like(ratios), ratios]), right)


@dataclass
class HostSolver:
    """A solver on the CPU: each step fetches the latents and sends them back, 2.2 MB a chunk in fp32 at 384×640."""

    solve: Solver

    def __call__(self, velocity: Tensor, latents: Tensor) -> Tensor:
        return self.solve(velocity.cpu(), latents.cpu()).to(latents.device)
