"""Decoding one chunk: diffusers' VAE, as it comes and channels last, and ours, on one rank and split over several.

The functions here run on every rank of one world at once, in step.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from benchmarks.measuring.convolution import Convolution
from benchmarks.measuring.device_rates import tf32
from benchmarks.measuring.product import Product
from benchmarks.measuring.timing import Timing, interleave
from benchmarks.models.full_size import random_vae
from benchmarks.models.peer_vae import peer_vae, to_channels_last
from benchmarks.ranks.groups import in_step, make_group, nothing, rank_device
from helios_cp.config.checkpoint import VAE_SPATIAL
from helios_cp.model.codec import Codec, convolution_tf32, denormalise
from helios_cp.model.vae.config import VaeConfig
from helios_cp.pipeline.parallelize import SplitCodec
from helios_cp.plan.vae_cost import decode_flops
from helios_cp.runtime.compilation import compile_vae
from parallel.collectives import Meter

WARMUP = 0  # every program runs once before, for its frames to be compared
BOUNDS = {"product": Product, "convolution": Convolution}
"""What says how fast the device can compute; of the two the faster one counts."""

FRAMES_PER_LATENT = 4


@dataclass(frozen=True)
class Precision:
    """In what the VAE computes; `tf32` says whether fp32 may run on TF32 tensor cores."""

    name: str
    dtype: torch.dtype
    tf32: bool = False


PRECISIONS = {
    "fp32": Precision("fp32", torch.float32),
    "tf32": Precision("tf32", torch.float32, tf32=True),
    "bf16": Precision("bf16", torch.bfloat16),
}
# In levels of grey, the largest difference of a pixel from diffusers' in the same precision. Ours rounds the same
# values, so that one level is what another order of additions can leave in fp32; TF32 keeps 11 bits, bf16 8.
LEVELS = {"fp32": 1, "tf32": 8, "bf16": 32}


@dataclass(frozen=True)
class Case:
    """One chunk of a video of `size` (height, width) pixels, the precisions, and the ranks to split it over.

    `in_a_row` is how often `BOUNDS` compute their product or convolution in one call.
    """

    vae: VaeConfig
    size: tuple[int, int]
    precisions: tuple[str, ...]
    ranks: tuple[int, ...]
    device_type: str = "cpu"
    latent_frames: int = 9
    compiles: bool = False
    in_a_row: int = 8

    @property
    def latent_size(self) -> tuple[int, int]:
        return self.size[0] // VAE_SPATIAL, self.size[1] // VAE_SPATIAL

    @property
    def frames(self) -> int:
        return FRAMES_PER_LATENT * (self.latent_frames - 1) + 1

    @property
    def flops(self) -> int:
        return decode_flops(self.vae, self.latent_frames, *self.latent_size)


ON_CPU = Case(VaeConfig(), (128, 128), ("fp32",), (2,))
ON_GPU = Case(VaeConfig(), (384, 640), ("fp32", "tf32", "bf16"), (), "cuda", compiles=True)


@dataclass(frozen=True)
class RankTimes:
    """As one rank sees them, by program. `traffic` is (collectives, bytes sent) of the rank in one call.

    `levels` is by how many levels of grey a pixel differs at most from diffusers' in the same precision, and
    `levels_of_fp32` from its fp32; both as rank 0 finds them. `bound_flops` are those of a call of each of `BOUNDS`.
    """

    timings: dict[str, Timing]
    traffic: dict[str, tuple[int, int]]
    levels: dict[str, int]
    levels_of_fp32: dict[str, int]
    bound_flops: dict[str, int]


def theirs(precision: str) -> str:
    return f"diffusers, {precision}"


def ours(precision: str, ranks: int = 1) -> str:
    return f"ours, {precision}, {ranks} rank{'s' * (ranks > 1)}"


def channels_last(precision: str) -> str:
    """diffusers with weights and latents laid out channel by channel."""
    return f"diffusers, {precision}, channels last"


def compiled(precision: str) -> str:
    return f"ours, {precision}, compiled"


def names(case: Case, precision: str) -> list[str]:
    """Of the programs of one rank."""
    found = [theirs(precision), channels_last(precision), ours(precision)]
    return [*found, compiled(precision)] if case.compiles else found


def bound(kind: str, precision: str, ranks: int) -> str:
    """One of `BOUNDS` on so many ranks at once."""
    return f"{kind}, {precision}, {ranks} at once"


@torch.inference_mode()
def time_decoders(rank: int, case: Case, repeats: int) -> RankTimes:
    """Times of all programs in turns, on the largest world of the case.

    Raises `RuntimeError` before timing where frames differ from diffusers' by more than `LEVELS`.
    """
    device = rank_device(case.device_type, rank)
    vae = random_vae(case.vae, device, device)
    latents = torch.randn(
        (1, case.vae.z_dim, case.latent_frames, *case.latent_size), generator=torch.Generator().manual_seed(0)
    ).to(device)
    groups = {ranks: make_group(range(ranks), device, Meter()) for ranks in (1, *case.ranks)}
    programs: dict[str, Callable[[], Any]] = {}
    traffic, levels, levels_of_fp32 = {}, {}, {}
    peer = peer_vae(vae)
    exact = None
    for name in case.precisions:
        precision = PRECISIONS[name]
        own, other = (copy.deepcopy(each).to(precision.dtype) for each in (vae, peer))
        calls: dict[str, Callable[[], Tensor | None]] = {}
        if rank == 0:
            calls[theirs(name)] = lambda other=other: decode_theirs(other, latents)
            last = to_channels_last(copy.deepcopy(other))
            calls[channels_last(name)] = lambda last=last: decode_theirs(last, latents, torch.channels_last_3d)
        for ranks, group in groups.items():
            if group is not None:
                codec = Codec(own) if ranks == 1 else SplitCodec(own, group)
                calls[ours(name, ranks)] = lambda codec=codec: codec.decode(latents, "uint8")
        if rank == 0 and case.compiles:
            codec = Codec(copy.deepcopy(own))
            compile_vae(codec.vae)
            calls[compiled(name)] = lambda codec=codec: codec.decode(latents, "uint8")
        calls = {key: _with_tf32(call, precision.tf32) for key, call in calls.items()}
        calls = {key: _with_all_cores(call) if key in names(case, name) else call for key, call in calls.items()}
        expected = None
        for key, call in calls.items():  # diffusers' own comes first
            for group in groups.values():
                if group is not None:
                    group.meter.reset()
            frames = call()
            meters = [group.meter for group in groups.values() if group is not None]
            traffic[key] = sum(meter.total_calls for meter in meters), sum(meter.total_bytes for meter in meters)
            if key == theirs(name):
                expected = _bytes(frames)
                if exact is None:
                    is_exact = name == "fp32"
                    exact = expected if is_exact else _bytes(_with_tf32(lambda: decode_theirs(peer, latents), False)())
            if frames is not None:
                levels[key], levels_of_fp32[key] = (_levels(_bytes(frames), other) for other in (expected, exact))
        bounds = {kind: make(device, precision.dtype, case.in_a_row, precision.tf32) for kind, make in BOUNDS.items()}
        for kind, ranks in itertools.product(bounds, groups):
            run = _with_all_cores(bounds[kind]) if ranks == 1 else bounds[kind]
            calls[bound(kind, name, ranks)] = run if rank < ranks else nothing
        for key in (*names(case, name), *(ours(name, ranks) for ranks in groups if ranks > 1)):
            programs[key] = calls.get(key, nothing)
        bound_names = [bound(kind, name, ranks) for kind, ranks in itertools.product(bounds, groups)]
        programs |= {key: calls[key] for key in bound_names}
    wrong = {key: value for key, value in levels.items() if value > LEVELS[key.split(", ")[1]]}
    if wrong:
        raise RuntimeError(f"frames differ from diffusers' by {wrong} levels of grey; allowed are {LEVELS}")
    if dist.is_initialized():
        dist.barrier()
    timings = interleave({name: in_step(each, device) for name, each in programs.items()}, repeats, device, WARMUP)
    return RankTimes(timings, traffic, levels, levels_of_fp32, {kind: each.flops for kind, each in bounds.items()})


def decode_theirs(vae, latents: Tensor, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
    """Frames `[B, T, C, H, W]` in [0, 1], as diffusers' pipelines decode a chunk and make pictures of it."""
    latents = denormalise(vae, latents).to(vae.dtype, memory_format=memory_format)
    video = vae.decode(latents, return_dict=False)[0]
    return VideoProcessor(vae_scale_factor=VAE_SPATIAL).postprocess_video(video, output_type="pt")


def _with_all_cores(program: Callable[[], Any]) -> Callable[[], Any]:
    """As one process runs that has the machine for itself; ranks that share it have a core each."""

    def run() -> Any:
        threads = torch.get_num_threads()
        torch.set_num_threads(os.cpu_count() or 1)
        try:
            return program()
        finally:
            torch.set_num_threads(threads)

    return run


def _with_tf32(program: Callable[[], Any], allowed: bool) -> Callable[[], Any]:
    def run() -> Any:
        with tf32(allowed), convolution_tf32(allowed):
            return program()

    return run


def _bytes(frames: Tensor) -> Tensor:
    """`[B, T, H, W, 3]` on the CPU as bytes in int16, of diffusers' frames or ours."""
    if frames.dtype != torch.uint8:
        frames = (frames.float() * 255).round().permute(0, 1, 3, 4, 2)
    return frames.cpu().to(torch.int16)


def _levels(frames: Tensor, expected: Tensor) -> int:
    return int((frames - expected).abs().max())


@dataclass(frozen=True)
class Row:
    """One program. `limit` is the FPS if its FLOPs ran as fast as the faster of `BOUNDS` on as many ranks at once."""

    name: str
    precision: str
    ranks: int
    timing: Timing
    fps: float
    limit: float
    speedup: float
    speedup_over_channels_last: float
    levels: int
    levels_of_fp32: int
    calls: int
    sent_bytes: float

    def to_json(self) -> dict[str, Any]:
        return {
            "precision": self.precision,
            "ranks": self.ranks,
            "frames_per_second": self.fps,
            "limit_frames_per_second": self.limit,
            "share_of_limit": self.fps / self.limit,
            "speedup_over_diffusers": self.speedup,
            "speedup_over_channels_last": self.speedup_over_channels_last,
            "levels_from_diffusers": self.levels,
            "levels_from_diffusers_fp32": self.levels_of_fp32,
            "collectives": self.calls,
            "sent_bytes": self.sent_bytes,
            **self.timing.to_json(),
        }


def rows(case: Case, found: Sequence[RankTimes]) -> list[Row]:
    """From what every rank of the world found; times are those of rank 0."""
    first = found[0]

    def row(name: str, precision: str, ranks: int) -> Row:
        timing = first.timings[name]
        bounds = {kind: first.timings[bound(kind, precision, ranks)].median for kind in BOUNDS}
        rate = ranks * max(first.bound_flops[kind] / seconds for kind, seconds in bounds.items())
        sent = [each.traffic[name][1] for each in found[:ranks]]
        return Row(
            name=name,
            precision=precision,
            ranks=ranks,
            timing=timing,
            fps=case.frames / timing.median,
            limit=case.frames * rate / case.flops,
            speedup=first.timings[theirs(precision)].median / timing.median,
            speedup_over_channels_last=first.timings[channels_last(precision)].median / timing.median,
            levels=first.levels[name],
            levels_of_fp32=first.levels_of_fp32[name],
            calls=first.traffic[name][0],
            sent_bytes=sum(sent) / len(sent),
        )

    return [
        row(name, precision, ranks)
        for precision in case.precisions
        for name, ranks in (
            *((name, 1) for name in names(case, precision)),
            *((ours(precision, ranks), ranks) for ranks in case.ranks),
        )
    ]
