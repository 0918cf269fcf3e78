"""What the engine does at full size, as exact counts that no machine's speed changes: `benchmarks.guard` keeps them.

All of it is run on meta tensors. Ranks of a layout run one at a time, the others being imagined: their messages are
metered and not sent.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measuring.counting import Counts, count
from benchmarks.models.forward_counts import SIZE, count_forward
from benchmarks.models.models import Inputs, encode_history, run_ours
from benchmarks.ranks.silent import silent_mesh
from helios_cp.config.checkpoint import VAE_SPATIAL, TransformerConfig
from helios_cp.model.codec import Codec
from helios_cp.model.transformer import HeliosTransformer
from helios_cp.model.vae.autoencoder import Autoencoder
from helios_cp.model.vae.config import VaeConfig
from helios_cp.pipeline.parallelize import ShardedSequence, SplitBranches, SplitCodec
from helios_cp.weights.placement import narrow_feed_forward
from parallel.collectives import Meter
from parallel.mesh import Degrees

META = torch.device("meta")
DTYPE = torch.bfloat16
STAGE = 3  # the last and longest
LAYOUTS = (
    Degrees(ulysses=2),
    Degrees(ulysses=3),  # neither heads nor tokens divide
    Degrees(ulysses=8),
    Degrees(ring=2),
    Degrees(ring=2, ulysses=4),
    Degrees(ulysses=8, ffn_tp=8),
    Degrees(cfg=2, ulysses=2),
)
DECODERS = (1, 2, 8)
LATENT_FRAMES = 9

CountTree = dict[str, Any]
"""Whole numbers by name, in nested dictionaries."""


def count_all() -> CountTree:
    """Every count that is kept: about 15 seconds on one core."""
    config = TransformerConfig()
    return {
        "forward": count_forward(config).ours_to_json(),
        f"forward at stage {STAGE}": {str(degrees): count_layout(config, degrees) for degrees in LAYOUTS},
        "decoding of a chunk": {f"vae {ranks}": count_decode(ranks) for ranks in DECODERS},
    }


def count_layout(
    config: TransformerConfig, degrees: Degrees, size: tuple[int, int] = SIZE, stage: int = STAGE
) -> CountTree:
    """One forward on the first and last rank of a layout, with the exchange of guidance where that is split.

    All blocks but the last are alike, so models of two and of three blocks tell the counts of any deeper one.
    """
    two, three = (dataclasses.replace(config, num_layers=layers) for layers in (2, 3))
    found = {}
    for rank in sorted({0, degrees.world - 1}):
        counts = (count_rank(each, degrees, rank, size, stage) for each in (two, three))
        found[f"rank {rank}"] = _deeper(*counts, config.num_layers)
    return found


@torch.inference_mode()
def count_rank(config: TransformerConfig, degrees: Degrees, rank: int, size: tuple[int, int], stage: int) -> CountTree:
    """One forward on one rank, by running all blocks."""
    inputs = Inputs.random(config, size, stage, META, DTYPE)
    with META:
        model = HeliosTransformer(config).eval()
    with silent_mesh(degrees, rank) as (mesh, meters):
        if mesh.ffn_tp.size > 1:
            narrow_feed_forward(model, mesh.ffn_tp)
        model.cast(DTYPE).sequence = ShardedSequence(mesh)
        text, history = model.encode_text(inputs.text), encode_history(model, inputs)

        def step() -> None:
            velocity = run_ours(model, inputs, text, history)
            if mesh.cfg.size > 1:
                SplitBranches(mesh.cfg).exchange([velocity])

        step()  # makes tables that later steps find ready
        return _count(step, meters)


@torch.inference_mode()
def count_decode(ranks: int, size: tuple[int, int] = SIZE) -> CountTree:
    """From the latents of one chunk to its frames as bytes, in fp32, on each kind of rank that shares the decoding."""
    with META:
        vae = Autoencoder(VaeConfig()).eval()
    latents = torch.empty(1, vae.config.z_dim, LATENT_FRAMES, *(pixels // VAE_SPATIAL for pixels in size), device=META)
    if ranks == 1:
        codec = Codec(vae)
        codec.group = LATENT_FRAMES
        return {"rank 0": _count(lambda: codec.decode(latents, "uint8"), {})}
    found = {}
    for rank in sorted({0, 1, ranks - 1}):  # those at an edge of the picture have one neighbour
        with silent_mesh(Degrees(ulysses=ranks, vae=ranks), rank) as (mesh, meters):
            codec = SplitCodec(vae, mesh.vae)
            codec.group = LATENT_FRAMES
            found[f"rank {rank}"] = _count(functools.partial(codec.decode, latents, "uint8"), {"vae": meters["vae"]})
    return found


def _count(run: Callable[[], Any], meters: dict[str, Meter]) -> CountTree:
    """Kernels, bytes and FLOPs of a program, and its collectives by the axis of the mesh that they cross."""
    for meter in meters.values():
        meter.reset()
    counts: Counts = count(run)
    used = {axis: meter for axis, meter in meters.items() if meter.total_calls}
    sent = {axis: {"collectives": meter.total_calls, "sent_bytes": meter.total_bytes} for axis, meter in used.items()}
    return {**dataclasses.asdict(counts), **sent}


def _deeper(two: CountTree, three: CountTree, layers: int) -> CountTree:
    """The counts of a model of `layers` blocks."""
    return {
        name: _deeper(two[name], value, layers)
        if isinstance(value, dict)
        else value + (layers - 3) * (value - two[name])
        for name, value in three.items()
    }
