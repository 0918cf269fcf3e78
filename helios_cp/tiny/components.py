"""The VAE's encoder in closed form: a latent holds the first principal components of a square of 8 × 8 pixels.

Sixteen components of rendered clips keep more of the picture than an encoder did that was trained for some 1000 steps.
And a latent frame is the mean of its frames: the first of a chunk, which holds one frame, is coded as those of four
are. Were it coded otherwise, a transformer's error there would show as a seam.
"""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

from helios_cp.tiny.clips import render
from helios_cp.tiny.subjects import PERIOD
from helios_cp.tiny.vae import SPREAD
from helios_cp.tiny.world import TRAINED_SIZE, draw_scene

SQUARE, PATCH = 8, 2
"""Pixels to a side of a latent, and of what `patch_size` folds into channels."""
CONSTANT = 4000.0
"""A channel far above all others, so that the norm before the encoder's last layer divides by the same everywhere."""


def principal_components(count: int, *, seed: int, scenes: int = 400) -> tuple[Tensor, Tensor]:
    """Of squares of rendered frames: components `[count, 3, 8, 8]` of length 1, and the deviations `[count]` along."""
    generator = random.Random(seed)
    frames = [
        torch.from_numpy(render(draw_scene(generator), [generator.randrange(PERIOD)], *TRAINED_SIZE))[0]
        for _ in range(scenes)
    ]
    squares = torch.stack(frames).unfold(1, SQUARE, SQUARE).unfold(2, SQUARE, SQUARE).flatten(0, 2)  # [N, 3, 8, 8]
    flat = squares.flatten(1)
    values, vectors = torch.linalg.eigh(torch.cov(flat.T))
    components = vectors.T.flip(0)[:count].unflatten(1, (3, SQUARE, SQUARE))
    return components.contiguous(), values.flip(0)[:count].clamp(min=0).sqrt()


def scales_of(deviations: Tensor) -> Tensor:
    """What components are divided by, so that latents have variance 1 in the mean and the first components more.

    They keep the root of their spread: whole light and colour, where an error is seen at once, stand out for the
    transformers, and fine parts do not drown in noise.
    """
    return (deviations * deviations.mean()).sqrt()


@torch.no_grad()
def set_encoder(vae, components: Tensor, scales: Tensor) -> None:
    """Make the encoder of an `AutoencoderKLWan` without residual blocks compute the mean over time of the components.

    Patches and the first halving only move pixels into channels; the second multiplies with the components; those of
    time take means. Residual layers add 0, and what is left is one activation, which is nearly linear near 0.
    """
    encoder = vae.encoder
    for parameter in (*encoder.parameters(), *vae.quant_conv.parameters()):
        parameter.zero_()
    first_space, first_time, space, time = (
        part for block in encoder.down_blocks for part in (block.resample[1], block.time_conv)
    )
    folded = 3 * PATCH**2
    encoder.conv_in.weight[:folded, :, -1, 1, 1] = torch.eye(folded)
    for place in range(4):
        first_space.weight[folded * place : folded * (place + 1), :folded, place // 2, place % 2] = torch.eye(folded)
    count = len(components)
    # rows and columns of the square as (half, place, inside a patch); patches fold as (colour, column, row)
    split = components.reshape(count, 3, 2, 2, PATCH, 2, 2, PATCH)
    space.weight[:count, : 4 * folded, :2, :2] = split.permute(0, 3, 6, 1, 7, 4, 2, 5).reshape(count, -1, 2, 2)
    space.bias[count] = CONSTANT
    for layer in (first_time, time):
        width = layer.weight.shape[0]
        layer.weight[:, :, 1:, 0, 0] = torch.eye(width)[:, :, None] / 2
    for norm in (module for module in encoder.modules() if hasattr(module, "gamma")):
        norm.gamma.fill_(1.0)
    width = time.weight.shape[0]
    slope = math.sqrt(width) / CONSTANT / 2  # of normalising, and of SiLU at 0
    encoder.conv_out.weight[:count, :count, -1, 1, 1] = torch.diag(1 / (scales * slope))
    vae.quant_conv.weight[:count, :count, 0, 0, 0] = torch.eye(count)
    vae.quant_conv.bias[count:] = 2 * math.log(SPREAD)
