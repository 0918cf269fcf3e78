"""The few-step sampler of Distilled in training: its steps, and what the student itself makes of earlier ones."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from helios_cp.model.transformer import HeliosTransformer
from helios_cp.sampling.denoise import set_timesteps
from helios_cp.tiny.forward import Past, velocity
from helios_cp.tiny.pyramid import Stages, halve
from helios_cp.tiny.sample import make_plan, make_scheduler

Text = tuple[Tensor, Tensor]
"""What `helios_cp.tiny.forward.embed_text` returns."""


class FewSteps:
    """Two steps a stage, without guidance."""

    def __init__(self, stages: Stages) -> None:
        self.stages = stages
        self.plan, self.scheduler = make_plan("distilled", 1.0), make_scheduler("distilled")

    def guesses(
        self, student: HeliosTransformer, stage: int, start: Tensor, text: Text, past: Past
    ) -> Iterator[Tensor]:
        """Where each step of a stage guesses it ends. A step sees the guess before it, without its gradient."""
        before = start if stage == 0 else halve(start)
        set_timesteps(self.scheduler, self.plan, stage, before, first_chunk=False)
        sigmas, latents = self.scheduler.sigmas.tolist(), start
        for timestep, sigma, following in zip(
            self.scheduler.timesteps.long().tolist(), sigmas, sigmas[1:], strict=False
        ):
            times = torch.full((len(start),), float(timestep), device=start.device)
            guess = latents - sigma * velocity(student, latents, times, text, past)
            yield guess
            latents = ((1 - following) * guess + following * start).detach()

    @torch.no_grad()
    def start(
        self, student: HeliosTransformer, stage: int, noise: Tensor, text: Text, past: Past
    ) -> tuple[Tensor, Tensor | None]:
        """Where the student starts `stage` after its own earlier stages, from `noise` at full size.

        With it come the clean latents of the stage before, None for the first.
        """
        start, coarse = noise, None
        for _ in range(self.stages.count - 1):
            start = halve(start) * 2
        for earlier in range(stage):
            *_, end = self.guesses(student, earlier, start, text, past)
            coarse = self.stages.clean_of(earlier, start, end, coarse)
            start = self.stages.enter(earlier + 1, end)
        return start, coarse

    @torch.no_grad()
    def chunk(self, student: HeliosTransformer, noise: Tensor, text: Text, past: Past) -> Tensor:
        """The latents that the student makes of `noise`, both `[B, C, 9, h, w]`."""
        last = self.stages.count - 1
        start, _ = self.start(student, last, noise, text, past)
        *_, made = self.guesses(student, last, start, text, past)
        return made
