"""FLOPs, memory and messages of the VAE's decoder (`helios_cp.model.vae`), from its config alone; memory is modelled.

Each level of the decoder doubles rows and columns. A level that doubles frames too leaves the first frame single. All
latent frames of a chunk are taken to pass a layer together.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from helios_cp.model.vae.config import VaeConfig
from helios_cp.model.vae.memory import group_bytes

FP32 = 4
TAPS = 27  # of a 3×3×3 kernel
FOLDED_TAPS = 4  # for each pixel of a folded upsampling, whose 3×3 kernel would have 9


@dataclass(frozen=True)
class Convolution:
    """`outputs` is channels; `level` counts the doublings before it, `frames` those of its output for a whole chunk.

    `weights` is the size of its kernel, and `taps` how many products of it each output needs: fewer at the start of a
    video, of which 3×3×3 kernels need no part that would see zeros only if there are fewer than three frames, and fewer
    where an upsampling is folded into it.
    """

    inputs: int
    outputs: int
    weights: int
    level: int
    frames: int

    @property
    def taps(self) -> int:
        if self.weights == TAPS:
            return 9 * min(self.frames, 3)
        return FOLDED_TAPS if self.weights == 9 else self.weights


def decoder_layers(config: VaeConfig, latent_frames: int) -> Iterator[Convolution]:
    """Every convolution of the decoder, the post-quant one first; 1×1 ones of the attention included."""
    dims = [config.decoder_dim * factor for factor in (config.dim_mult[-1], *config.dim_mult[::-1])]
    grows_in_time = config.temperal_downsample[::-1]
    top, frames = dims[0], latent_frames
    yield Convolution(config.z_dim, config.z_dim, 1, 0, frames)
    yield Convolution(config.z_dim, top, 27, 0, frames)
    yield from (Convolution(top, top, 27, 0, frames) for _ in range(4))  # two residual blocks
    yield Convolution(top, 3 * top, 1, 0, frames)
    yield Convolution(top, top, 1, 0, frames)
    for level, (before, after) in enumerate(itertools.pairwise(dims)):
        channels = before if level == 0 else before // 2
        for _ in range(config.num_res_blocks + 1):
            yield Convolution(channels, after, 27, level, frames)
            yield Convolution(after, after, 27, level, frames)
            if channels != after:
                yield Convolution(channels, after, 1, level, frames)
            channels = after
        if level == len(config.dim_mult) - 1:
            continue
        if grows_in_time[level]:
            yield Convolution(after, 2 * after, 3, level, frames - 1)
            frames = 2 * frames - 1
        yield Convolution(after, after // 2, 9, level + 1, frames)
    yield Convolution(dims[-1], config.out_channels, 27, len(config.dim_mult) - 1, frames)


def decode_flops(config: VaeConfig, latent_frames: int, rows: int, columns: int) -> int:
    """FLOPs of the decoding of one video of `[latent_frames, rows, columns]` latents; a multiply-add is two."""
    return sum(decode_flops_by_channels(config, latent_frames, rows, columns).values())


@functools.lru_cache(maxsize=256)
def decode_flops_by_channels(config: VaeConfig, latent_frames: int, rows: int, columns: int) -> Mapping[int, int]:
    """As `decode_flops`, of the layers that are so many channels wide: of input or output, whichever is wider."""
    pixels = rows * columns
    found: Counter[int] = Counter()
    for layer in decoder_layers(config, latent_frames):
        flops = 2 * layer.frames * pixels * 4**layer.level * layer.inputs * layer.outputs * layer.taps
        found[max(layer.inputs, layer.outputs)] += flops
    top = config.decoder_dim * config.dim_mult[-1]
    found[top] += latent_frames * 4 * pixels * pixels * top  # attention
    return found


@functools.lru_cache(maxsize=256)
def decode_bytes(config: VaeConfig, latent_frames: int, rows: int, columns: int, group: int) -> int:
    """Memory that a decoding in groups of `group` latent frames holds at most besides the weights, in fp32: a model.

    Beside what a group needs these are the kernels of folded upsamplings, and frames as bytes until groups are joined.
    """
    layers = list(decoder_layers(config, latent_frames))
    folded = sum(16 * layer.inputs * layer.outputs for layer in layers if layer.weights == 9)
    pixels = 3 * rows * columns * config.spatial**2 * layers[-1].frames
    joined = pixels if group < latent_frames else 0
    return group_bytes(config, group, latent_frames, rows, columns) + FP32 * folded + joined


@functools.lru_cache(maxsize=256)
def decode_traffic(config: VaeConfig, latent_frames: int, own_rows: int, columns: int, ranks: int) -> tuple[int, int]:
    """Messages and bytes sent by a rank between two others when the decoding is split over `ranks` by rows.

    A row of halo each way for every 3×3 kernel, the attention's input to all, and the frames as bytes to rank 0.
    """
    calls, sent = 2, latent_frames * own_rows * columns * config.decoder_dim * config.dim_mult[-1]
    sent *= (ranks - 1) * FP32
    for layer in decoder_layers(config, latent_frames):
        if layer.weights in (9, TAPS):
            before = layer.level - (layer.weights == 9)  # the halo is fetched before rows and columns are doubled
            calls += 1
            sent += 2 * layer.inputs * layer.frames * columns * 2**before * FP32
    last = list(decoder_layers(config, latent_frames))[-1]
    return calls, sent + last.frames * own_rows * columns * config.spatial**2 * 3
