"""FLOPs, weights, memory and messages of the Wan VAE (diffusers' `AutoencoderKLWan`), from its config alone.

Each stage of the decoder doubles rows and columns. Latent frames go through one at a time: a stage that doubles frames
too leaves the first frame single.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

FP32 = 4
CACHED_FRAMES = 2  # of the input of every 3×3×3 convolution
LIVE_TENSORS = 7  # at full size inside a residual block, half of a padded input and its cache among them


@dataclass(frozen=True)
class VaeConfig:
    """The keys of `vae/config.json` that decide sizes. Defaults are those of Helios-14B."""

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)


@dataclass(frozen=True)
class Convolution:
    """`outputs` is channels; `level` counts the doublings before it, `frames` those of its output for a whole chunk."""

    inputs: int
    outputs: int
    kernel: int
    level: int
    frames: int
    caches: bool = True


def decoder_layers(config: VaeConfig, latent_frames: int) -> Iterator[Convolution]:
    """Every convolution of the decoder, the post-quant one first; 1×1 ones of the attention included."""
    dims = [config.base_dim * factor for factor in (config.dim_mult[-1], *config.dim_mult[::-1])]
    grows_in_time = config.temperal_downsample[::-1]
    top, frames = dims[0], latent_frames
    yield Convolution(config.z_dim, config.z_dim, 1, 0, frames, caches=False)
    yield Convolution(config.z_dim, top, 27, 0, frames)
    yield from (Convolution(top, top, 27, 0, frames) for _ in range(4))  # two residual blocks
    yield Convolution(top, 3 * top, 1, 0, frames, caches=False)
    yield Convolution(top, top, 1, 0, frames, caches=False)
    for level, (before, after) in enumerate(itertools.pairwise(dims)):
        channels = before if level == 0 else before // 2
        for _ in range(config.num_res_blocks + 1):
            yield Convolution(channels, after, 27, level, frames)
            yield Convolution(after, after, 27, level, frames)
            if channels != after:
                yield Convolution(channels, after, 1, level, frames, caches=False)
            channels = after
        if level == len(config.dim_mult) - 1:
            continue
        if grows_in_time[level]:
            yield Convolution(after, 2 * after, 3, level, frames - 1)
            frames = 2 * frames - 1
        yield Convolution(after, after // 2, 9, level + 1, frames, caches=False)
    yield Convolution(dims[-1], 3, 27, len(config.dim_mult) - 1, frames)


def decode_flops(config: VaeConfig, latent_frames: int, rows: int, columns: int) -> int:
    """FLOPs of the decoding of one video of `[latent_frames, rows, columns]` latents; a multiply-add is two."""
    return sum(decode_flops_by_channels(config, latent_frames, rows, columns).values())


@functools.lru_cache(maxsize=256)
def decode_flops_by_channels(config: VaeConfig, latent_frames: int, rows: int, columns: int) -> Mapping[int, int]:
    """As `decode_flops`, of the layers that are so many channels wide: of input or output, whichever is wider."""
    pixels = rows * columns
    found: Counter[int] = Counter()
    for layer in decoder_layers(config, latent_frames):
        flops = 2 * layer.frames * pixels * 4**layer.level * layer.inputs * layer.outputs * layer.kernel
        found[max(layer.inputs, layer.outputs)] += flops
    top = config.base_dim * config.dim_mult[-1]
    found[top] += latent_frames * 4 * pixels * pixels * top  # attention
    return found


@functools.lru_cache(maxsize=256)
def parameters(config: VaeConfig) -> int:
    """Of encoder and decoder together."""
    return decoder_parameters(config) + _encoder_parameters(config)


def decoder_parameters(config: VaeConfig) -> int:
    """Of the decoder and the convolution before it."""
    layers = list(decoder_layers(config, 1))
    weights = sum((layer.inputs * layer.kernel + 1) * layer.outputs for layer in layers)
    return weights + _norms(layers, config.base_dim * config.dim_mult[-1], config.base_dim * config.dim_mult[0])


def _norms(layers: list[Convolution], middle: int, last: int) -> int:
    """A scale a channel before each convolution of a residual block, before attention and before the last one."""
    inside = [layer for layer in layers[1:-1] if layer.kernel == 27]
    return sum(layer.inputs for layer in inside[1:]) + middle + last


def _encoder_parameters(config: VaeConfig) -> int:
    dims = [config.base_dim * factor for factor in (1, *config.dim_mult)]
    total = (3 * 27 + 1) * dims[0]
    for level, (channels, after) in enumerate(itertools.pairwise(dims)):
        for _ in range(config.num_res_blocks):
            total += (channels * 27 + 1) * after + (after * 27 + 1) * after + channels + after
            total += (channels + 1) * after if channels != after else 0
            channels = after
        if level < len(config.dim_mult) - 1:
            total += (after * 9 + 1) * after
            total += (after * 3 + 1) * after if config.temperal_downsample[level] else 0
    top, doubled = dims[-1], 2 * config.z_dim
    total += 4 * (top * 27 + 1) * top + 4 * top  # two residual blocks
    total += (top + 1) * 3 * top + (top + 1) * top + top  # attention
    return total + top + (top * 27 + 1) * doubled + (doubled + 1) * doubled


@functools.lru_cache(maxsize=256)
def decode_bytes(config: VaeConfig, latent_frames: int, rows: int, columns: int) -> int:
    """Memory that a decoding holds at most besides the weights, in fp32: a model, not a count.

    Caches of two frames a convolution, the tensors of a residual block at full size, and the video twice, as it grows
    by concatenation.
    """
    layers = list(decoder_layers(config, latent_frames))
    pixels = rows * columns
    cached = sum(CACHED_FRAMES * layer.inputs * pixels * 4**layer.level for layer in layers if layer.caches)
    last = layers[-1]
    frames = 2 ** sum(config.temperal_downsample)  # of one latent frame
    widest = max(layer.inputs for layer in layers if layer.level == last.level and layer.kernel == 27)
    live = LIVE_TENSORS * frames * widest * pixels * 4**last.level
    video = 2 * last.frames * 3 * pixels * 4**last.level
    return FP32 * (cached + live + video)


@functools.lru_cache(maxsize=256)
def decode_traffic(config: VaeConfig, latent_frames: int, own_rows: int, columns: int, ranks: int) -> tuple[int, int]:
    """Messages and bytes sent by a rank between two others when the decoding is split over `ranks` by rows.

    A row of halo each way for every 3×3 kernel, the attention's input to all, and the frames as bytes to rank 0.
    """
    calls, sent = latent_frames + 1, latent_frames * own_rows * columns * config.base_dim * config.dim_mult[-1]
    sent *= (ranks - 1) * FP32
    for layer in decoder_layers(config, latent_frames):
        if layer.kernel in (9, 27):
            before = layer.level - (layer.kernel == 9)  # the halo is fetched before rows and columns are doubled
            calls += latent_frames
            sent += 2 * layer.inputs * layer.frames * columns * 2**before * FP32
    last = 4 ** (len(config.dim_mult) - 1)
    frames = list(decoder_layers(config, latent_frames))[-1].frames
    return calls, sent + frames * own_rows * columns * last * 3
