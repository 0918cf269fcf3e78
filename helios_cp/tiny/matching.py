"""Distribution matching: what Distilled makes becomes as likely as what Mid, with guidance, would make.

Regression makes means: where a caption leaves a choice, its guesses are blurred. Here nobody says what a noise should
become. A critic, which starts as Mid, learns the flow of what the student makes; where it and Mid disagree, the student
has too much or too little of something, and goes the way of Mid (Yin et al., arXiv:2405.14867). The stages that Mid
teaches are matched, each at its own size. The regression goes on beside it, because it holds seams down.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from helios_cp.model.transformer import HeliosTransformer
from helios_cp.sampling.denoise import guide
from helios_cp.tiny import forward
from helios_cp.tiny.distill import GUIDANCE, TAUGHT_STAGES
from helios_cp.tiny.examples import draw_batch
from helios_cp.tiny.flow import BATCH, Loss, evenly
from helios_cp.tiny.forward import embed_text, velocity
from helios_cp.tiny.latents import Clips
from helios_cp.tiny.pyramid import Stages
from helios_cp.tiny.rollout import FewSteps
from helios_cp.tiny.sample import encode, make_plan

MATCHED_STAGES = range(TAUGHT_STAGES)
MATCHING = 0.5
"""What matching counts beside the regression."""


class Pair(nn.Module):
    """The student, and the critic that learns what it makes: trained together, so that one state holds both."""

    def __init__(self, student: HeliosTransformer, critic: HeliosTransformer) -> None:
        super().__init__()
        self.student, self.critic = student, critic


def is_matrix(name: str) -> bool:
    """Hidden matrices of both."""
    return forward.is_matrix(name.split(".", 1)[1])


def make_loss(
    pair: Pair, teacher: HeliosTransformer, clips: Clips, text_encoder, regression: Loss, scale: float = 1.0
) -> Loss:
    """The loss of a batch: the student's by `regression` and by matching, and the critic's."""
    sampler, plan = FewSteps(Stages()), make_plan("mid", GUIDANCE)
    device = next(pair.parameters()).device

    def loss(generator: random.Random) -> tuple[Tensor, dict[str, float]]:
        total, figures = regression(generator)
        stage = generator.choice(MATCHED_STAGES)
        batch = draw_batch(clips, text_encoder, generator, max(1, round(BATCH["mid"][stage] * scale)))
        with torch.autocast(device.type, torch.bfloat16):
            text = embed_text(pair.student, batch.states, batch.mask)
            start, coarse = sampler.start(pair.student, stage, torch.randn_like(batch.clean), text, batch.past)
            *_, end = sampler.guesses(pair.student, stage, start, text, batch.past)
            clean = sampler.stages.clean_of(stage, start, end.detach(), coarse)

            before, after = sampler.stages.points_at(clean, stage)
            sigma = evenly(len(clean), device) * 0.999
            level, times = sigma.view(-1, 1, 1, 1, 1), sampler.stages.timestep(stage, sigma)
            noisy = level * before + (1 - level) * after
            texts = [
                embed_text(teacher, batch.states, batch.mask),
                encode(teacher, text_encoder, [""] * len(clean)),
            ]
            with torch.no_grad():
                guided = guide(*(velocity(teacher, noisy, times, each, batch.past) for each in texts), plan)
            seen = embed_text(pair.critic, batch.states, batch.mask)
            judged = velocity(pair.critic, noisy, times, seen, batch.past)
        wanted = noisy - level * guided
        away = level * (guided - judged.detach())  # where the critic would end, less where Mid would
        away = away / (after - wanted).abs().mean((1, 2, 3, 4), keepdim=True).clamp(min=1e-3)
        matching = 0.5 * (end - (end - away).detach()).square().mean()
        criticism = (judged - (before - after)).square().mean() / (before - after).square().mean()
        figures |= {f"{stage}matching": matching.item(), f"{stage}critic": criticism.item()}
        return total + MATCHING * matching + criticism, figures

    return loss
