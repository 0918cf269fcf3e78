"""What the ranks of a forward send each other, counted in gloo runs.

Counts are of a narrow and shallow model on the token counts of the full one. Two things carry them to the full size,
both exact, since bytes depend on shapes alone:

- Blocks but the last are alike, so that models of two and of three blocks tell those of any deeper one.
- What blocks exchange is proportional to the width of the model. The velocity, which leaves it, is as wide in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.models.communication_formulas import AXES, DTYPE, ByAxis, Tokens, Traffic, predict_ours, predict_theirs
from benchmarks.models.diffusers_parallel import FunctionalCollectives, enable_parallelism
from benchmarks.models.models import Inputs, build_pair, encode_history
from benchmarks.models.models import run_ours as forward_ours
from benchmarks.models.models import run_theirs as forward_theirs
from benchmarks.ranks.pool import RankPool
from helios_cp.config.checkpoint import TransformerConfig
from helios_cp.model.transformer import HeliosTransformer
from helios_cp.pipeline.parallelize import ShardedSequence, SplitBranches
from helios_cp.weights.placement import feed_forward_parts, narrow_feed_forward
from parallel.collectives import Meter
from parallel.mesh import Degrees, Mesh

# 8 heads divide over 2, 4 and 8 ranks as 40 do; 5120 is a multiple of the width.
NARROW = TransformerConfig(
    num_attention_heads=8, attention_head_dim=8, rope_dim=(4, 2, 2), ffn_dim=64, text_dim=64, num_layers=3
)
# Where 3 ranks share the heads unevenly, there must be as many of them as in the full model.
WITH_ALL_HEADS = replace(NARROW, num_attention_heads=40)
GROWS_WITH_WIDTH = ("ulysses", "ring", "ffn_tp", "context")
TIMEOUT = 600.0  # seconds for the counts of one layout


def count_ours(
    rank: int, configs: Sequence[TransformerConfig], size: tuple[int, int], stages: Sequence[int], degrees: Degrees
) -> dict[tuple[int, TransformerConfig], ByAxis]:
    """What this rank of a running gloo world sends in one step, for each stage and config."""
    return {(stage, config): _count_ours(config, size, stage, degrees) for stage in stages for config in configs}


@torch.inference_mode()
def _count_ours(config: TransformerConfig, size: tuple[int, int], stage: int, degrees: Degrees) -> ByAxis:
    torch.manual_seed(0)
    mesh, meters = _metered(Mesh.build(degrees))
    model = _sharded_model(config, mesh)
    inputs = Inputs.random(config, size, stage, torch.device("cpu"), DTYPE)
    velocity = forward_ours(model, inputs, model.encode_text(inputs.text), encode_history(model, inputs))
    if mesh.cfg.size > 1:
        SplitBranches(mesh.cfg).exchange([velocity])
    return {axis: Traffic(meter.total_calls, meter.total_bytes) for axis, meter in meters.items()}


def _metered(mesh: Mesh) -> tuple[Mesh, dict[str, Meter]]:
    """The mesh with a meter on each of its axes."""
    meters = {axis: Meter() for axis in AXES}
    return replace(mesh, **{axis: replace(getattr(mesh, axis), meter=meters[axis]) for axis in AXES}), meters


def _sharded_model(config: TransformerConfig, mesh: Mesh) -> HeliosTransformer:
    model = HeliosTransformer(config).eval().cast(DTYPE)
    if mesh.ffn_tp.size > 1:
        weights = model.state_dict()
        narrow_feed_forward(model, mesh.ffn_tp)
        for name, part in feed_forward_parts(model, mesh.ffn_tp).items():
            weights[name] = weights[name][part]
        model.load_state_dict(weights, assign=True)
    model.sequence = ShardedSequence(mesh)
    return model


def count_theirs(
    rank: int,
    configs: Sequence[TransformerConfig],
    size: tuple[int, int],
    stages: Sequence[int],
    ranks: int,
    peer: str = "ulysses",
) -> dict[tuple[int, TransformerConfig], ByAxis | str]:
    """As `count_ours` for diffusers over the `ranks` of the world, by one of `PEERS`, or why it cannot run."""
    return {(stage, config): _count_theirs(config, size, stage, ranks, peer) for stage in stages for config in configs}


@torch.inference_mode()
def _count_theirs(config: TransformerConfig, size: tuple[int, int], stage: int, ranks: int, peer: str) -> ByAxis | str:
    if peer == "ulysses" and config.num_attention_heads % ranks:
        return f"{config.num_attention_heads} heads do not divide by {ranks}, which plain Ulysses needs"
    torch.manual_seed(0)
    model, _ = build_pair(config, torch.device("cpu"), DTYPE)
    inputs = Inputs.random(config, size, stage, torch.device("cpu"), DTYPE)
    enable_parallelism(model, ranks, peer)
    meter = Meter()
    try:
        with FunctionalCollectives(meter):
            forward_theirs(model, inputs)
    except (AssertionError, ValueError) as error:  # tokens that do not divide, or no attention for a ring on a CPU
        return str(error)
    sizes = Traffic(meter.calls.get("sizes", 0), meter.sent_bytes.get("sizes", 0))
    return {
        "context": Traffic(meter.total_calls - sizes.calls, meter.total_bytes - sizes.sent_bytes),
        "sizes": sizes,
    }


def at_full_size(two: ByAxis, three: ByAxis, narrow: TransformerConfig, full: TransformerConfig) -> ByAxis:
    """The traffic of `full`, from that of `narrow` with two and with three blocks. Raises `ValueError` if inexact."""
    found = {}
    for axis, traffic in three.items():
        calls = traffic.calls + (full.num_layers - 3) * (traffic.calls - two[axis].calls)
        sent = traffic.sent_bytes + (full.num_layers - 3) * (traffic.sent_bytes - two[axis].sent_bytes)
        if axis in GROWS_WITH_WIDTH:
            sent, rest = divmod(sent * full.dim, narrow.dim)
            if rest:
                raise ValueError(f"width {narrow.dim}: the bytes on axis {axis} do not scale to {full.dim} exactly")
        found[axis] = Traffic(calls, sent)
    return found


@dataclass(frozen=True)
class Count:
    """One layout at one stage at full size: counted on each rank, and the calls and sum of bytes that are predicted.

    An axis without a prediction is not checked.
    """

    ranks: tuple[ByAxis, ...]
    predicted: ByAxis

    @property
    def calls(self) -> int:
        """Of any rank: all make the same."""
        return _total(self.ranks[0]).calls

    @property
    def mean_bytes(self) -> float:
        return sum(_total(rank).sent_bytes for rank in self.ranks) / len(self.ranks)

    @property
    def max_bytes(self) -> int:
        return max(_total(rank).sent_bytes for rank in self.ranks)

    @property
    def is_as_predicted(self) -> bool:
        """To the byte, on every axis."""
        return all(
            all(rank[axis].calls == predicted.calls for rank in self.ranks)
            and sum(rank[axis].sent_bytes for rank in self.ranks) == predicted.sent_bytes
            for axis, predicted in self.predicted.items()
        )

    def to_json(self) -> dict[str, Any]:
        axes = {
            axis: {"calls": self.ranks[0][axis].calls, "bytes_of_ranks": [rank[axis].sent_bytes for rank in self.ranks]}
            for axis, traffic in self.ranks[0].items()
            if traffic.calls
        }
        totals = {"calls": self.calls, "mean_bytes": self.mean_bytes, "max_bytes": self.max_bytes}
        return {**totals, "is_as_predicted": self.is_as_predicted, "axes": axes}


def _total(traffic: ByAxis) -> Traffic:
    return sum(traffic.values(), Traffic())


def counts_of_ours(
    pool: RankPool, degrees: Degrees, full: TransformerConfig, size: tuple[int, int], stages: Sequence[int]
) -> dict[int, Count]:
    """One layout of `full` by stage, counted on the narrow model."""
    configs = two, three = _two_depths(degrees.ulysses)
    ranks = pool.run(count_ours, configs, size, stages, degrees, ranks=degrees.world, timeout=TIMEOUT)
    is_even = full.num_attention_heads % degrees.ulysses == 0
    return {
        stage: Count(
            tuple(at_full_size(rank[stage, two], rank[stage, three], three, full) for rank in ranks),
            predict_ours(full, Tokens.of(size, stage), degrees) if is_even else {},
        )
        for stage in stages
    }


def counts_of_theirs(
    pool: RankPool,
    ranks: int,
    full: TransformerConfig,
    size: tuple[int, int],
    stages: Sequence[int],
    peer: str = "ulysses",
) -> dict[int, Count | str]:
    """diffusers' way of one of `PEERS` by stage, or why it cannot run."""
    configs = two, three = _two_depths(ranks)
    found = pool.run(count_theirs, configs, size, stages, ranks, peer, ranks=ranks, timeout=TIMEOUT)
    counts: dict[int, Count | str] = {}
    for stage in stages:
        if isinstance(found[0][stage, three], str):
            counts[stage] = found[0][stage, three]
            continue
        each = tuple(at_full_size(rank[stage, two], rank[stage, three], three, full) for rank in found)
        counts[stage] = Count(each, predict_theirs(full, Tokens.of(size, stage), ranks) if peer == "ulysses" else {})
    return counts


def _two_depths(ranks: int) -> tuple[TransformerConfig, TransformerConfig]:
    """Two models that differ by a block, whose heads `ranks` share as they would share those of the full model."""
    config = NARROW if NARROW.num_attention_heads % ranks == 0 else WITH_ALL_HEADS
    two, three = (replace(config, num_layers=layers) for layers in (2, 3))
    return two, three
