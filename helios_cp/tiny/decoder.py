"""The VAE's decoder, trained on short rendered clips.

Chunks are encoded and decoded alone, so the decoder meets a border as two unlike latents: the last, of four frames, and
the first of the next chunk, of one. It learns here to decode both so that the picture goes on, and to see past some
noise, because a transformer's latents are not clean.
"""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor

from helios_cp.tiny.clips import render
from helios_cp.tiny.subjects import PERIOD
from helios_cp.tiny.vae import decode, psnr, reconstruction_loss
from helios_cp.tiny.world import TRAINED_SIZE, draw_scene

NOISE = 0.15
"""The largest noise on latents; its square root is uniform, so most is small."""
BORDER_WEIGHT, FIRST_WEIGHT = 2.0, 2.0


def draw_neighbours(generator: random.Random, pixels: int = 28 * 64 * 128) -> tuple[Tensor, Tensor]:
    """The end of a chunk and the start of the next, `[B, 3, T, H, W]` each, of 9 or 13 and of 5 frames."""
    frames, following = generator.choice((9, 13)), 5
    height, width = TRAINED_SIZE
    clips = []
    for _ in range(max(1, pixels // ((frames + following) * height * width))):
        first = generator.randrange(PERIOD)
        clips.append(
            torch.from_numpy(render(draw_scene(generator), range(first, first + frames + following), height, width))
        )
    video = torch.stack(clips).permute(0, 4, 1, 2, 3)
    return video[:, :, :frames], video[:, :, frames:]


def training_loss(vae, generator: random.Random) -> tuple[Tensor, dict[str, float]]:
    """One batch."""
    device = next(vae.parameters()).device
    targets = [
        video.to(device).contiguous(memory_format=torch.channels_last_3d) for video in draw_neighbours(generator)
    ]
    level = NOISE * generator.random() ** 2
    outs = []
    with torch.autocast(device.type, torch.bfloat16):
        for target in targets:
            with torch.no_grad():
                mean = vae.encode(target).latent_dist.mean
            outs.append(decode(vae, mean + level * errors_like(mean)).float())
    border = F.l1_loss(outs[1][:, :, 0] - outs[0][:, :, -1], targets[1][:, :, 0] - targets[0][:, :, -1])
    first = sum(
        F.l1_loss(out[:, :, 0], target[:, :, 0])
        + F.l1_loss(out[:, :, 1] - out[:, :, 0], target[:, :, 1] - target[:, :, 0])
        for out, target in zip(outs, targets, strict=True)
    )
    loss = sum(reconstruction_loss(out, target) for out, target in zip(outs, targets, strict=True))
    figures = {"psnr": psnr(outs[0], targets[0]), "psnr_first": psnr(outs[1][:, :, :1], targets[1][:, :, :1])}
    return loss + FIRST_WEIGHT * first + BORDER_WEIGHT * border, figures | {"border": border.item()}


def errors_like(latents: Tensor) -> Tensor:
    """Errors as a transformer makes them, of variance near 1: half of them smooth, because it errs on whole things."""
    batch, channels, frames, height, width = latents.shape
    coarse = torch.randn(batch, channels, frames, height // 4, width // 4, device=latents.device)
    smooth = F.interpolate(coarse, size=(frames, height, width), mode="trilinear") * 1.27
    return (smooth + torch.randn_like(latents)) * 0.5**0.5
