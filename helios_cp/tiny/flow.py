"""Base and Mid: flow matching on whole latents, and on the stages of a pyramid."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from helios_cp.model.transformer import HeliosTransformer
from helios_cp.sampling.denoise import shift_mu
from helios_cp.tiny.examples import Batch, draw_batch
from helios_cp.tiny.forward import embed_text, velocity
from helios_cp.tiny.latents import Clips
from helios_cp.tiny.pyramid import Stages, halve

STAGE_SHARES = (0.25, 0.30, 0.45)
"""How often a stage of the pyramid is trained: the last has most to learn, to copy the details of the frame before."""
BATCH = {"base": (6,), "mid": (20, 14, 6)}
SUBJECT_WEIGHT = 4.0
"""What an error on the subject counts, where one elsewhere counts 1."""
FIRST_WEIGHT = 3.0
"""What an error in a chunk's first latent frame counts, because seams show there."""
COARSE_WEIGHT = 1.0
"""What errors of whole regions count beside single ones: light or colour that is off is what most shows at a seam."""

Loss = Callable[[random.Random], tuple[Tensor, dict[str, float]]]


def make_loss(variant: str, model: HeliosTransformer, clips: Clips, text_encoder, scale: float = 1.0) -> Loss:
    """The loss of a batch for "base" or "mid"; `scale` multiplies the sizes of batches, for a faster device."""
    stages = Stages()

    def loss(generator: random.Random) -> tuple[Tensor, dict[str, float]]:
        stage = generator.choices((0, 1, 2), STAGE_SHARES)[0] if variant == "mid" else 0
        batch = draw_batch(clips, text_encoder, generator, max(1, round(BATCH[variant][stage] * scale)))
        noisy, timestep, target = _flow_of_base(batch) if variant == "base" else _flow_of_stage(stages, batch, stage)
        device = noisy.device
        with torch.autocast(device.type, torch.bfloat16):
            text = embed_text(model, batch.states, batch.mask)
            errors = velocity(model, noisy, timestep, text, batch.past) - target
        losses = weighted(errors, batch.subject) / target.square().mean()
        starts = torch.tensor([kind == "text" for kind in batch.kinds], device=device)
        figures = {
            f"{stage}{name}": losses[chosen].mean().item()
            for name, chosen in (("text", starts), ("past", ~starts))
            if chosen.any()
        }
        return losses.mean(), figures

    return loss


def weighted(errors: Tensor, subject: Tensor) -> Tensor:
    """The mean square `[B]` of errors `[B, C, T, h, w]`, more weight where the subject is and in the first frame, and
    that of their means over regions of 4 × 4, as if they added up there like noise.

    `subject` `[B or 1, 1, T or 1, h, w]` may be larger.
    """
    while subject.shape[-1] > errors.shape[-1]:
        subject = halve(subject)
    weight = (1 + (SUBJECT_WEIGHT - 1) * subject).expand(-1, -1, errors.shape[2], -1, -1).clone()
    weight[:, :, 0] *= FIRST_WEIGHT
    single = (errors.square() * weight).mean((1, 2, 3, 4)) / weight.mean((1, 2, 3, 4))
    region = min(4, errors.shape[-2] // 2)
    if region == 1:
        return single
    coarse = F.avg_pool3d(errors, (1, region, region)).square() * region**2
    coarse = coarse.mean((1, 3, 4))
    coarse = (coarse.sum(1) + (FIRST_WEIGHT - 1) * coarse[:, 0]) / (coarse.shape[1] + FIRST_WEIGHT - 1)
    return single + COARSE_WEIGHT * coarse


def evenly(count: int, device: torch.device) -> Tensor:
    """`count` numbers in 0 … 1, one from each of as many equal parts, in random order: less noise than free ones."""
    return ((torch.randperm(count) + torch.rand(count)) / count).to(device)


def _flow_of_base(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, timesteps and velocity; noise levels are logit-normal and shifted as the sampler shifts them."""
    clean = batch.clean
    sigma = torch.sigmoid(torch.special.ndtri(evenly(len(clean), clean.device).clamp(1e-3, 1 - 1e-3)))
    shift = math.exp(shift_mu(clean[0, 0].numel() // 4))
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    noise, level = torch.randn_like(clean), sigma.view(-1, 1, 1, 1, 1)
    return level * noise + (1 - level) * clean, sigma * 1000, noise - clean


def _flow_of_stage(stages: Stages, batch: Batch, stage: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `_flow_of_base`, for a stage of the pyramid, whose noise levels are uniform."""
    start, end = stages.points(batch.clean, stage)
    sigma = evenly(len(start), start.device) * 0.999
    level = sigma.view(-1, 1, 1, 1, 1)
    return level * start + (1 - level) * end, stages.timestep(stage, sigma), start - end
