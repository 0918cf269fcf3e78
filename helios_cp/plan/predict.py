"""How long a layout takes for a chunk on one kind of machine, and what a rank holds. All of it is modelled.

A matrix product takes as long as its FLOPs or its bytes, whichever takes longer. A rank waits for its messages, but two
kinds travel while it computes, as far as the hardware can do both: a ring's beside the attention, and gathered weights
beside the whole forward.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from helios_cp.config.execution import Execution
from helios_cp.config.layout import PLAIN, Layout
from helios_cp.plan.forward_cost import AttentionCall, ForwardCost, Product, Traffic, guidance_traffic
from helios_cp.plan.hardware import Hardware
from helios_cp.plan.memory import card_memory, sharded_bytes
from helios_cp.plan.rank_shares import shares
from helios_cp.plan.vae_cost import decode_flops_by_channels, decode_traffic
from helios_cp.plan.workload import Workload
from parallel.mesh import Degrees, axis_groups
from parallel.segments import split

EXCHANGES = ("ring", "vae")  # axes on which two ranks exchange messages; on the others a whole group does


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
    """One forward of a stage on the slowest rank, and its seconds by what takes them."""

    cost: ForwardCost
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Prediction:
    """What is modelled of one layout, all times in seconds.

    `seconds` of one chunk, by what takes them. `interval`: from one finished chunk to the next. `latency`: from the
    first step of a chunk to its last frame. `fps` counts the frames of all videos of a batch. `memory`: bytes on the
    fullest rank at its fullest moment, by what they are. `sent_bytes`: what the slowest rank sends in one chunk.
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
    """Predict a layout that the engine accepts. The execution changes the memory alone: its speed is not modelled."""
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
    for stage in workload.stages:
        costs = [
            workload.forward_cost(stage, own, degrees).of_batch(workload.batch)
            for own in dict.fromkeys(shares(workload.config, stage.lengths, degrees))
        ]
        timed = [StageCost(cost, forward_seconds(workload, cost, degrees, shard, hardware)) for cost in costs]
        found.append(max(timed, key=lambda each: sum(each.seconds.values())))
    return tuple(found)


def forward_seconds(
    workload: Workload, cost: ForwardCost, degrees: Degrees, shard: bool, hardware: Hardware
) -> dict[str, float]:
    """Seconds of one forward by what takes them. The rank waits for messages, and for nothing else of other ranks."""
    itemsize = workload.dtype.itemsize

    def seconds(part: Product | AttentionCall, rate: float) -> float:
        return max(part.flops / rate, part.moved_bytes(itemsize) / hardware.memory_bandwidth)

    products = sum(seconds(each, hardware.matmul_rate(each.rows, itemsize)) for each in cost.products)
    attention = sum(
        seconds(each, hardware.attention_rate(each.queries, each.keys, itemsize)) for each in cost.attentions
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
    """The part of a rank's messages that leaves its node, for the rank with most partners elsewhere."""
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
    """The most FPS that so many FLOPs a chunk allow, where transformer and VAE run one after the other."""
    return frames / (transformer_flops / rate + vae_flops / vae_rate)
