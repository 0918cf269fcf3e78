"""The sampler's steps for devices without float64, which the step of DMD computes in."""

from __future__ import annotations

import torch
from torch import Tensor

from helios_cp.device.device import has_float64
from helios_cp.sampling.solvers import Solver, make_solver


def solver_on(device: torch.device, scheduler, start: Tensor) -> Solver:
    """`make_solver`, whose steps run on the device, or on the CPU where the device has no float64."""
    return make_solver(scheduler, start) if has_float64(device) else HostSolver(make_solver(scheduler, start.cpu()))


class HostSolver:
    """A solver on the CPU: each step fetches the latents and sends them back, 2.2 MB a chunk in fp32 at 384×640."""

    def __init__(self, solve: Solver) -> None:
        self.solve = solve

    def __call__(self, velocity: Tensor, latents: Tensor) -> Tensor:
        return self.solve(velocity.cpu(), latents.cpu()).to(latents.device)
