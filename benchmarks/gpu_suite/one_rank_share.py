"""One rank's part of the work on P ranks, run alone: its tokens, heads and rows, with messages that arrive at once.

What it would receive is random numbers in its place, packed and unpacked as real messages are.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks.measuring.device_rates import seconds_of
from benchmarks.models import full_size
from benchmarks.models.models import STAGES, Inputs, encode_history, run_ours
from benchmarks.ranks.silent import silent_mesh
from helios_cp.config.checkpoint import VAE_SPATIAL
from helios_cp.config.layout import segment_lengths
from helios_cp.config.request import Request
from helios_cp.pipeline.parallelize import ParallelPipeline
from helios_cp.plan.forward_cost import forward_cost
from helios_cp.plan.rank_shares import shares
from helios_cp.plan.workload import BuiltInCheckpoint
from parallel.collectives import Group
from parallel.degrees import Degrees, default_degrees
from parallel.mesh import Mesh

RANKS = (1, 2, 4, 8)


def measure_shares(
    checkpoint: BuiltInCheckpoint,
    base: ParallelPipeline,
    dtype: torch.dtype,
    repeats: int,
    write: Callable[[int, dict[str, Any]], None],
) -> None:
    """Seconds of rank 0's part of a forward at each stage and of a decode, for each P, with the weights of `base`."""
    size = full_size.size_of(checkpoint)
    request = Request(prompt=("any",), height=size.video[0], width=size.video[1]).resolve(checkpoint)
    lengths = [tuple(each) for each in segment_lengths(request, checkpoint)]
    heads, rows = checkpoint.transformer.num_attention_heads, request.latent_size[0]
    for ranks in RANKS:
        degrees = default_degrees(ranks, False, heads, min(each[-1] for each in lengths), rows)
        with lone_rank(degrees) as mesh, torch.inference_mode():
            pipeline = full_size.build_random(checkpoint, mesh, dtype=dtype, device=base.device, like=base.transformer)
            write(ranks, _time(pipeline, degrees, size, lengths, dtype, repeats))


def _time(
    pipeline: ParallelPipeline,
    degrees: Degrees,
    size: full_size.Size,
    lengths: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    repeats: int,
) -> dict[str, Any]:
    model, device, config = pipeline.transformer, pipeline.device, size.transformer
    stages = []
    for stage, segments in zip(STAGES, lengths, strict=True):
        inputs = Inputs.random(config, size.video, stage, device, dtype)
        text = model.encode_text(inputs.text[:, : size.text_tokens])
        history = encode_history(model, inputs)
        seconds = seconds_of(functools.partial(run_ours, model, inputs, text, history), device, repeats, warmup=1)
        own = shares(config, segments, degrees)[0]
        flops = forward_cost(config, own, degrees, size.text_tokens, dtype.itemsize).flops
        stages.append({"tokens": own.tokens, "seconds": seconds, "flops": flops, "flops_per_second": flops / seconds})
    latents = torch.randn(1, config.in_channels, 9, *(pixels // VAE_SPATIAL for pixels in size.video), device=device)
    decode = seconds_of(lambda: pipeline.codec.decode(latents, "uint8"), device, repeats, warmup=1)
    denoise = sum(each["seconds"] for each in stages)
    return {
        "degrees": asdict(degrees),
        "stages": stages,
        "decode_seconds": decode,
        "fps_without_messages": {"[1, 1, 1]": 33 / (denoise + decode), "[2, 2, 2]": 33 / (2 * denoise + decode)},
    }


@contextlib.contextmanager
def lone_rank(degrees: Degrees) -> Iterator[Mesh]:
    """The mesh of rank 0, whose messages cost nothing and bring random numbers, the same each time."""
    received: dict[tuple[Any, ...], torch.Tensor] = {}

    def buffer(group: Group, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        key = (tuple(shape), like.dtype, like.device)
        if key not in received:
            received[key] = torch.randn(key[0], device=like.device).to(like.dtype)
        return received[key]

    with (
        silent_mesh(degrees, 0) as (mesh, _),
        mock.patch.object(Group, "_buffer", buffer),
        mock.patch.object(dist, "get_backend", lambda *_: "nccl"),
    ):
        yield mesh
