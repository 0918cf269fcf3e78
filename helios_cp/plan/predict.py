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

from helios_cp.config.execution import Execution
from helios_cp.config.layout import PLAIN, Layout
from helios_cp.plan.forward_cost import ForwardCost, Traffic, forward_cost, guidance_traffic
from helios_cp.plan.hardware import Hardware
from helios_cp.plan.memory import card_memory, sharded_bytes
from helios_cp.plan.rank_shares import shares
from helios_cp.plan.vae_cost import decode_flops_by_channels, decode_traffic
from helios_cp.plan.workload import Workload
from parallel.mesh import Degrees, axis_groups
from parallel.segments import split

EXCHANGES = ("ring", "vae")
"""Axes on which ranks exchange messages two by two."""


@dataclass(frozen=True)
class Candidate:
    """A layout of the ranks that denoise, and how many ranks beside them only decode (0: rank 0 and its VAE group)."""

    layout: Layout
    decoders: int = 0

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

    `fps` counts the frames of all videos of a batch. `memory` is bytes on the rank that holds most when it holds most,
    by what they are; `sent_bytes` leave the rank that waits longest, in one chunk.
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


def predict(workload: Workload, candidate: Candidate, hardware: Hardware, execution: Execution = PLAIN) -> Prediction:
    """One layout, which must be one that the engine accepts. Of the execution, only the memory is modelled."""
    degrees, shard = candidate.layout.degrees, candidate.layout.shard_weights
    stages = _stage_costs(workload, replace(degrees, vae=1), shard, hardware)  # the VAE changes no forward
    own_branches = max(1, workload.branches // degrees.cfg)  # a request without guidance leaves a half idle
    seconds: Counter[str] = Counter()
    sent = 0.0
    for stage, each in zip(workload.stages, stages, strict=True):
        for name, time in each.seconds.items():
            seconds[name] += stage.forwards * own_branches * time
        sent += stage.forwards * own_branches * each.cost.total_traffic.sent_bytes
        if degrees.cfg > 1:
            exchanged = guidance_traffic(workload.config, stage.noisy, workload.dtype.itemsize) * workload.batch
            seconds["messages"] += stage.forwards * message_seconds(exchanged, degrees, "cfg", hardware)
            sent += stage.forwards * exchanged.sent_bytes
    if shard:
        gathered = sharded_bytes(workload.config, workload.dtype, degrees.world).received
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
        workload.batch * workload.frames / interval,
        card_memory(workload, execution, candidate.layout, has_decoders=candidate.decoders > 0).parts,
        sent,
        stages,
    )


@functools.lru_cache(maxsize=4096)
def _stage_costs(workload: Workload, degrees: Degrees, shard: bool, hardware: Hardware) -> tuple[StageCost, ...]:
    found = []
    itemsize = workload.dtype.itemsize
    for stage in workload.stages:
        costs = [
            forward_cost(workload.config, own, degrees, workload.text_tokens, itemsize).of_batch(workload.batch)
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
        received = sharded_bytes(workload.config, workload.dtype, degrees.world).received
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
    within = (hardware.node_exchange_latency if axis in EXCHANGES else None) or hardware.node_latency
    latency = hardware.network_latency if away else within
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
    """Seconds of decoding a chunk and bytes that a rank sends for it. Ranks that share a VAE have some rows each."""
    rows, columns = workload.latent_size
    own = max(split(rows, degrees.vae))
    flops = decode_flops_by_channels(workload.vae, workload.latent_frames, rows, columns)
    whole = workload.batch * sum(each / hardware.vae_rate(channels) for channels, each in flops.items())
    if degrees.vae == 1:
        return whole, 0.0
    traffic = Traffic(*decode_traffic(workload.vae, workload.latent_frames, own, columns, degrees.vae))
    traffic *= workload.batch
    return whole * own / rows + message_seconds(traffic, degrees, "vae", hardware), traffic.sent_bytes


def limit_fps(frames: int, transformer_flops: float, vae_flops: float, rate: float, vae_rate: float) -> float:
    """FPS that no program exceeds that computes so many FLOPs a chunk, transformer and VAE in series."""
    return frames / (transformer_flops / rate + vae_flops / vae_rate)
