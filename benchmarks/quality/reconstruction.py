"""The embedded VAE alone, as the package loads it: rendered clips against what is left of them as latents."""

from __future__ import annotations

import random

import numpy as np
import torch

from benchmarks.quality.figures import likeness
from helios_cp.tiny.clips import render
from helios_cp.tiny.judging import seam
from helios_cp.tiny.latents import FRAMES
from helios_cp.tiny.world import TRAINED_SIZE, draw_scene
from helios_cp.weights.load import load_vae, resolve

MODEL = "tiny-distilled"
"""Any of the family: its VAE is that of all three."""
CHUNKS, SEED = 2, 11


@torch.no_grad()
def reconstruction(count: int, device: torch.device) -> dict[str, float | int | None]:
    """PSNR, SSIM and seam of `count` clips of combinations that are never trained on, two chunks each.

    Every chunk is encoded and decoded alone, as videos are. The seam of the rendered clips is beside it.
    """
    vae, generator = load_vae(resolve(MODEL, weights=()), device), random.Random(SEED)
    clips = [render(draw_scene(generator, held_out=True), range(CHUNKS * FRAMES), *TRAINED_SIZE) for _ in range(count)]
    rendered, decoded = [to_bytes(clip) for clip in clips], []
    for clip in clips:
        chunks = torch.from_numpy(clip.reshape(CHUNKS, FRAMES, *clip.shape[1:])).permute(0, 4, 1, 2, 3)
        means = vae.encode(chunks)[:, : vae.config.z_dim]
        decoded.append(to_bytes(vae.decode(means).permute(0, 2, 3, 4, 1).flatten(0, 1).cpu().numpy()))
    return {
        "clips": count,
        **likeness(decoded, rendered),
        "seam": float(np.mean([seam(video) for video in decoded])),
        "seam_rendered": float(np.mean([seam(video) for video in rendered])),
    }


def to_bytes(frames: np.ndarray) -> np.ndarray:
    """Values in [−1, 1] as uint8."""
    return ((np.clip(frames, -1, 1) + 1) * 127.5).round().astype(np.uint8)
