"""How long a chunk takes and what a rank holds in one layout on one kind of machine. All of it is modelled.

Each matrix product takes as long as its FLOPs or its bytes, whichever is more; passes over memory, their bytes. A rank
waits for messages, but as far as the hardware can do both at once a ring's travel beside the attention, and sharded
weights beside all of a forward.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from helios_cp import vae_cost, weight_cost
from helios_cp.config import Checkpoint, Request, TransformerConfig
from helios_cp.cost import ForwardCost, Traffic, forward_cost, guidance_traffic, shares
from helios_cp.hardware import Hardware
from helios_cp.layout import Layout, segment_lengths
from helios_cp.sampling import SamplingPlan
from helios_cp.vae_cost import VaeConfig
from helios_cp.weight_cost import TextEncoderConfig
from parallel.mesh import Degrees, axis_groups
from parallel.segments import split

RESERVED = 1.5e9  # bytes of a CUDA context, communicators and what the allocator cannot use


@dataclass(frozen=True)
class Stage:
    """Tokens of a pyramid stage (long · mid · short · noisy), and its forwards in a chunk, those of one branch."""

    lengths: tuple[int, ...]
    forwards: int

    @property
    def noisy(self) -> int:
        return self.lengths[-1]


@dataclass(frozen=True)
class Workload:
    """What a steady chunk of one video asks for, whatever it runs on."""

    config: TransformerConfig
    vae: VaeConfig
    text_encoder: TextEncoderConfig
    stages: tuple[Stage, ...]
    is_guided: bool
    dtype: torch.dtype
    text_tokens: int
    latent_frames: int
    latent_size: tuple[int, int]
    frames: int

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        request: Request,
        dtype: torch.dtype,
        vae: VaeConfig | None = None,
        text_encoder: TextEncoderConfig | None = None,
    ) -> Workload:
        """Of a resolved request; steps that CFG-Zero* zeroes need no forward."""
        plan = SamplingPlan.of(request, checkpoint)
        lengths = segment_lengths(request, checkpoint)
        forwards = [
            sum(not plan.is_zeroed(stage, step) for step in range(steps)) for stage, steps in enumerate(plan.steps)
        ]
        return cls(
            config=checkpoint.transformer,
            vae=vae or VaeConfig(),
            text_encoder=text_encoder or TextEncoderConfig(),
            stages=tuple(Stage(tuple(each), count) for each, count in zip(lengths, forwards, strict=True)),
            is_guided=plan.is_guided,
            dtype=dtype,
            text_tokens=request.max_sequence_length,
            latent_frames=request.num_latent_frames_per_chunk,
            latent_size=request.latent_size,
            frames=request.frames_per_chunk,
        )

    @property
    def branches(self) -> int:
        return 2 if self.is_guided else 1

    @property
    def decode_flops(self) -> int:
        return vae_cost.decode_flops(self.vae, self.latent_frames, *self.latent_size)


@dataclass(frozen=True)
class Candidate:
    """A layout of the ranks that denoise, and how many ranks beside them only decode (0: rank 0 and its VAE group)."""

    layout: Layout
    decoders: int = 0

    @property
    def ranks(self) -> int:
        return self.layout.degrees.world + self.decoders

    @property
    def vae(self) -> str:
        if self.decoders:
            return f"{self.decoders} decoder{'s' if self.decoders > 1 else ''}"
        degree = self.layout.degrees.vae
        return "serial" if degree == 1 else f"spatial {degree}"


@dataclass(frozen=True)
class StageCost:
    """One forward of a stage on the rank for which it takes longest, and its seconds by what they go to."""

    cost: ForwardCost
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Prediction:
    """Seconds are modelled. `seconds` are of one chunk, by what they go to; `interval` lies between two chunks.

    `memory` is bytes on the rank that holds most, by what they are; `sent_bytes` leave the rank that waits longest, in
    one chunk.
    """

    candidate: Candidate
    seconds: Mapping[str, float]
    decode: float
    interval: float
    latency: float
    fps: float
    memory: Mapping[str, float]
    sent_bytes: float
    stages: tuple[StageCost, ...]

    @property
    def memory_bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def dominant(self) -> str:
        return max(self.seconds, key=lambda name: self.seconds[name])


def predict(workload: Workload, candidate: Candidate, hardware: Hardware) -> Prediction:
    """One layout, which must be one that the engine accepts."""
    degrees, shard = candidate.layout.degrees, candidate.layout.shard_weights
    stages = _stage_costs(workload, replace(degrees, vae=1), shard, hardware)  # the VAE changes no forward
    own_branches = workload.branches // degrees.cfg
    seconds: Counter[str] = Counter()
    sent = 0.0
    for stage, each in zip(workload.stages, stages, strict=True):
        for name, time in each.seconds.items():
            seconds[name] += stage.forwards * own_branches * time
        sent += stage.forwards * own_branches * each.cost.total_traffic.sent_bytes
        if degrees.cfg > 1:
            exchanged = guidance_traffic(workload.config, stage.noisy, workload.dtype.itemsize)
            seconds["messages"] += stage.forwards * message_seconds(exchanged, degrees, "cfg", hardware)
            sent += stage.forwards * exchanged.sent_bytes
    if shard:
        gathered = weight_cost.sharded_bytes(workload.config, workload.dtype, degrees.world).received
        sent += sum(stage.forwards for stage in workload.stages) * own_branches * gathered
    denoise = sum(seconds.values())
    decode, decode_sent = _decode(workload, degrees, hardware)
    if candidate.decoders:
        seconds["VAE"] = max(0.0, decode / candidate.decoders - denoise)  # what denoising has to wait for
        interval = max(denoise, decode / candidate.decoders)
    else:
        seconds["VAE"], interval = decode, denoise + decode
        sent += decode_sent
    return Prediction(
        candidate,
        dict(seconds),
        decode,
        interval,
        denoise + decode,
        workload.frames / interval,
        memory(workload, candidate),
        sent,
        stages,
    )


@functools.lru_cache(maxsize=4096)
def _stage_costs(workload: Workload, degrees: Degrees, shard: bool, hardware: Hardware) -> tuple[StageCost, ...]:
    found = []
    itemsize = workload.dtype.itemsize
    for stage in workload.stages:
        costs = [
            forward_cost(workload.config, own, degrees, workload.text_tokens, itemsize)
            for own in dict.fromkeys(shares(workload.config, stage.lengths, degrees))
        ]
        timed = [StageCost(cost, forward_seconds(workload, cost, degrees, shard, hardware)) for cost in costs]
        found.append(max(timed, key=lambda each: sum(each.seconds.values())))
    return tuple(found)


def forward_seconds(
    workload: Workload, cost: ForwardCost, degrees: Degrees, shard: bool, hardware: Hardware
) -> dict[str, float]:
    """Seconds of one forward by what they go to; with no wait for other ranks but for messages."""
    itemsize = workload.dtype.itemsize
    bandwidth = hardware.memory_bandwidth
    products = sum(
        max(each.flops / hardware.matmul_rate(each.rows, itemsize), each.moved_bytes(itemsize) / bandwidth)
        for each in cost.products
    )
    attention = sum(
        max(
            each.flops / hardware.attention_rate(each.queries, each.keys, itemsize),
            each.moved_bytes(itemsize) / bandwidth,
        )
        for each in cost.attentions
    )
    passes = sum(moved / hardware.pass_bandwidth(kind) for kind, moved in cost.passes.items())
    computing = products + attention + passes
    launches = cost.kernels * hardware.kernel_seconds
    waits = sum(
        message_seconds(traffic, degrees, axis, hardware) for axis, traffic in cost.traffic.items() if axis != "ring"
    )
    if degrees.ring > 1:
        steps = message_seconds(cost.traffic["ring"], degrees, "ring", hardware)
        waits += steps - min(hardware.overlap * steps, attention * (degrees.ring - 1) / degrees.ring)
    if shard and degrees.world > 1:
        received = weight_cost.sharded_bytes(workload.config, workload.dtype, degrees.world).received
        gathers = Traffic(workload.config.num_layers, received)
        arriving = message_seconds(gathers, degrees, "world", hardware)
        waits += arriving - min(hardware.overlap * arriving, computing)
    return {
        "products": products,
        "attention": attention,
        "memory passes": passes,
        "launches": max(0.0, launches - computing) if hardware.launches_overlap else launches,
        "messages": waits,
    }


def message_seconds(traffic: Traffic, degrees: Degrees, axis: str, hardware: Hardware) -> float:
    """Seconds of a rank's messages on an axis, for the rank with most partners on other nodes."""
    away = _share_on_other_nodes(degrees, axis, hardware.gpus_per_node)
    latency = hardware.network_latency if away else hardware.node_latency
    outside = traffic.sent_bytes * away / hardware.network_bandwidth
    return traffic.calls * latency + max(outside, traffic.sent_bytes * (1 - away) / hardware.node_bandwidth)


@functools.lru_cache(maxsize=4096)
def _share_on_other_nodes(degrees: Degrees, axis: str, ranks_per_node: int) -> float:
    """Of what the worst placed rank of an axis sends, the part that leaves its node."""
    worst = 0.0
    for group in axis_groups(degrees, axis):
        nodes = [rank // ranks_per_node for rank in group]
        if axis == "ring":  # each rank has one partner, and all wait for the slowest
            worst = max(worst, float(len(set(nodes)) > 1))
        elif len(set(nodes)) > 1:
            worst = max(worst, 1 - (min(Counter(nodes).values()) - 1) / (len(group) - 1))
    return worst


def _decode(workload: Workload, degrees: Degrees, hardware: Hardware) -> tuple[float, float]:
    """Seconds of decoding a chunk and bytes that a rank sends for it."""
    rows, columns = workload.latent_size
    own = max(split(rows, degrees.vae))
    flops = vae_cost.decode_flops_by_channels(workload.vae, workload.latent_frames, rows, columns)
    seconds = sum(each / hardware.vae_rate(channels) for channels, each in flops.items()) * own / rows
    if degrees.vae == 1:
        return seconds, 0.0
    traffic = Traffic(*vae_cost.decode_traffic(workload.vae, workload.latent_frames, own, columns, degrees.vae))
    return seconds + message_seconds(traffic, degrees, "vae", hardware), traffic.sent_bytes


def memory(workload: Workload, candidate: Candidate) -> dict[str, float]:
    """Bytes by what they are, on the rank that holds most: rank 0, or a decoder, which has the text encoder beside it.

    With sharded weights text is encoded on the CPU. The text encoder is never released.
    """
    degrees, shard = candidate.layout.degrees, candidate.layout.shard_weights
    weights = weight_cost.transformer_bytes(workload.config, workload.dtype, degrees.world, degrees.ffn_tp, shard)
    prompts = workload.branches if shard or degrees.cfg == 1 else 1
    core = replace(degrees, vae=1)
    working = max(
        weight_cost.activation_bytes(workload.config, own, core, workload.dtype)
        for stage in workload.stages
        for own in dict.fromkeys(shares(workload.config, stage.lengths, core))
    )
    rows, columns = workload.latent_size
    decoding = vae_cost.decode_bytes(workload.vae, workload.latent_frames, max(split(rows, degrees.vae)), columns)
    vae = vae_cost.FP32 * vae_cost.parameters(workload.vae)
    text = workload.text_encoder.parameters * workload.dtype.itemsize
    denoiser = {
        "transformer": weights.resident + weights.gathered,
        "text keys and values": prompts * weight_cost.text_bytes(workload.config, workload.dtype, workload.text_tokens),
        "working": working,
        "reserved": RESERVED,
    }
    if candidate.decoders:
        decoder = {"text encoder": text, "VAE": vae, "working": decoding, "reserved": RESERVED}
        return max(denoiser, decoder, key=lambda parts: sum(parts.values()))
    return {
        **denoiser,
        "text encoder": 0 if shard and degrees.world > 1 else text,
        "VAE": vae,
        "working": max(working, decoding),
    }


def limit_fps(frames: int, transformer_flops: float, vae_flops: float, rate: float, vae_rate: float) -> float:
    """FPS that no program exceeds that computes so many FLOPs a chunk, transformer and VAE in series."""
    return frames / (transformer_flops / rate + vae_flops / vae_rate)
