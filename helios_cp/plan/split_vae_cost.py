"""What decoding costs a rank beyond its share of the whole when `pipeline.split_vae` splits the VAE by rows; counted.

A rank joins the rows of its neighbours to its own before every convolution, makes keys and values of the attention for
the whole frame, and launches as many kernels for its rows as one rank does for all of them. All of it is integer
arithmetic on the config; of passes over memory it is the difference to the share of the whole decoding, in fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from helios_cp.plan.vae_cost import CACHED_FRAMES, FP32, Convolution, VaeConfig, decoder_layers

NORM = 6  # kernels: the norm of the channels, its bound, the quotient, two scales, a bias
RESIDUAL = 2 * NORM + 3  # two norms, two activations, the sum
ATTENTION = NORM + 5  # convolutions before and after, a copy of q, k and v, the attention, the sum


@dataclass(frozen=True)
class SplitExtra:
    """On a rank between two others. `bytes` of copies and `flops` beyond its share of the whole; `kernels` in all."""

    flops: int
    bytes: int
    kernels: int


@functools.lru_cache(maxsize=256)
def split_extra(
    config: VaeConfig, latent_frames: int, rows: int, own_rows: int, columns: int, ranks: int
) -> SplitExtra:
    """For the whole of a chunk, of whose `rows` of latents this rank has `own_rows`."""
    neighbours = min(ranks - 1, 2)
    copied = 0.0
    kernels = decode_kernels(config, latent_frames)
    for layer in decoder_layers(config, latent_frames):
        for step, frames in enumerate(_frames_of_steps(layer, latent_frames)):
            if layer.kernel == 27:
                scale = 2**layer.level
                sizes = (scale * own_rows, scale * rows, scale * columns)
                copied += layer.inputs * _causal_bytes(frames, _cached(step), *sizes, neighbours)
                kernels += _causal_kernels(_cached(step))
            elif layer.kernel == 9:
                scale = 2 ** (layer.level - 1)  # the halo is fetched before rows and columns are doubled
                width = scale * columns
                copied += layer.inputs * frames * (_halo_bytes(scale * own_rows, width, neighbours) + 10 * width)
                kernels += 3
    top = config.base_dim * config.dim_mult[-1]
    others = (rows - own_rows) * columns
    copied += latent_frames * top * (6 * rows - 4 * own_rows) * columns
    kernels += latent_frames * 4  # the frame joined, its keys and values apart from the queries
    return SplitExtra(latent_frames * 2 * others * top * 2 * top, round(FP32 * copied), kernels)


def _causal_bytes(frames: int, cached: int, own: int, whole: int, width: int, neighbours: int) -> float:
    """Elements a channel that a 3×3×3 convolution copies beyond its share, of `own` of `whole` rows."""
    filled, wide = frames + cached, (own + 2) * width
    copied = _halo_bytes(own, width, neighbours) * frames
    copied += 2 * min(filled, CACHED_FRAMES) * 2 * width  # borders kept for the next frames
    if cached:
        copied += 2 * cached * wide + 2 * filled * wide
    if cached < CACHED_FRAMES:
        copied += filled * wide + (frames + CACHED_FRAMES) * wide
    unsplit = filled * whole * width + (frames + CACHED_FRAMES) * (whole + 2) * (width + 2)
    unsplit += 2 * filled * whole * width * (cached > 0)
    return copied - unsplit * own / whole


def _halo_bytes(own: int, width: int, neighbours: int) -> int:
    """Elements a channel and frame: rows packed for the neighbours, zeros where there is none, all rows joined."""
    return 2 * neighbours * width + (2 - neighbours) * width + 2 * (own + 2) * width


def _causal_kernels(cached: int) -> int:
    """Those that fetch rows and join them to the frames before, less the padding that they replace."""
    return 3 + (cached > 0) + (cached < CACHED_FRAMES)


def _cached(step: int) -> int:
    """Frames that a convolution keeps of the steps before."""
    return min(step, CACHED_FRAMES)


def _frames_of_steps(layer: Convolution, latent_frames: int) -> Iterator[int]:
    """Frames that a layer makes of each latent frame: one of the first."""
    yield 1
    for _ in range(latent_frames - 1):
        yield (layer.frames - 1) // (latent_frames - 1)


@functools.lru_cache(maxsize=256)
def decode_kernels(config: VaeConfig, latent_frames: int) -> int:
    """Kernels of an unsplit decoding in eager PyTorch in fp32."""
    total = 2 + 1 + latent_frames - 1  # the post-quant convolution, the bound of the pixels, frames joined
    blocks = 2 + len(config.dim_mult) * (config.num_res_blocks + 1)
    total += latent_frames * (blocks * RESIDUAL + ATTENTION + NORM + 1)
    later = range(1, latent_frames)
    for layer in list(decoder_layers(config, latent_frames))[1:]:
        if layer.kernel == 3:  # frames are doubled, but for the first
            frames = layer.frames // max(latent_frames - 1, 1)
            total += sum(4 + (step > 1) + (1 + (step == 1)) * (frames < CACHED_FRAMES) for step in later)
            continue
        for step, frames in enumerate(_frames_of_steps(layer, latent_frames)):
            if layer.kernel == 27:
                total += 3 + (step > 0) * (1 + (frames < CACHED_FRAMES))
            elif layer.kernel == 9:
                total += 2
            elif layer.level or layer.outputs not in (layer.inputs, 3 * layer.inputs):
                total += 2  # the shortcut of a residual block
    return total
