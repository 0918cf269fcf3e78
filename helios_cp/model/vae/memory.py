"""How many latent frames go through a VAE together, by the memory that a group needs beside the weights.

The formula is a model: it counts the tensors of a residual block at its largest, and the frames that are kept for the
group that follows. `tests/plan/test_vae_cost.py` holds it against running code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from helios_cp.model.vae.config import VaeConfig
from helios_cp.model.vae.kernels import ON_CARD

LIVE = 3
"""Tensors of a residual block at a time: what came in, the buffer that a convolution reads, and its result."""
SHARE = 0.4
"""Share of the free memory. The rest is for workspaces of convolutions and for denoising the next chunk."""
LARGEST = 2**31  # elements of a tensor that every convolution kernel can count


def group_bytes(config: VaeConfig, group: int, frames: int, rows: int, columns: int, itemsize: int = 4) -> int:
    """Bytes that a decoding or encoding of `frames` latent frames needs at most, in groups of `group`.

    Of one video; `rows` and `columns` are those of the latents on this rank.
    """
    kept = _kept(config, rows, columns) if group < frames else 0
    return itemsize * (max(_elements(config, group, rows, columns)) + kept + ON_CARD)


def choose_group(config: VaeConfig, shape: tuple[int, ...], itemsize: int, free: int) -> int:
    """The most latent frames of `shape` `[B, C, T, h, w]` at a time that fit into a share of `free` bytes.

    Groups are the whole, a half, a quarter and so on. One frame at a time is the least, and is tried in any case.
    """
    batch, _, frames, rows, columns = shape
    group = frames
    while group > 1:
        largest = batch * max(_elements(config, group, rows, columns)) // LIVE
        if batch * group_bytes(config, group, frames, rows, columns, itemsize) <= SHARE * free and largest < LARGEST:
            break
        group = math.ceil(group / 2)
    return group


def _levels(config: VaeConfig) -> Iterator[tuple[int, int, bool]]:
    """Channels, pixels to each of the latents, and whether frames double after it, from the latents' level up."""
    base = max(config.base_dim, config.decoder_dim)
    grows_in_time = (*config.temperal_downsample[::-1], False)
    for level, (factor, grows) in enumerate(zip(config.dim_mult[::-1], grows_in_time, strict=True)):
        yield factor * base, 4**level, grows


def _elements(config: VaeConfig, group: int, rows: int, columns: int) -> list[int]:
    """Of the tensors of a residual block at each level."""
    found, frames = [], group
    for width, pixels, grows in _levels(config):
        found.append((LIVE * frames + 2) * width * rows * columns * pixels)
        frames *= 2 if grows else 1
    return found


def _kept(config: VaeConfig, rows: int, columns: int) -> int:
    """Of the frames that convolutions keep: two of the input of each."""
    levels = list(_levels(config))
    convolutions = [2 * (config.num_res_blocks + 1) + grows for _, _, grows in levels]
    convolutions[0] += 4  # of the middle block
    convolutions[-1] += 1  # the last convolution
    sizes = [width * rows * columns * pixels for width, pixels, _ in levels]
    return sum(2 * count * size for count, size in zip(convolutions, sizes, strict=True))
