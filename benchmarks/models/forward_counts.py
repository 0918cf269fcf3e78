"""What a forward at full size costs in FLOPs, bytes and kernels: diffusers' and ours, counted on meta tensors.

The counts depend on no machine, so they are also a test: `benchmarks.guard` keeps ours.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from benchmarks.measuring.counting import Counts, count
from benchmarks.models.models import STAGES, Inputs, build_pair, encode_history, run_ours, run_theirs
from helios_cp.config.checkpoint import TransformerConfig

SIZE = (384, 640)


@dataclass(frozen=True)
class CostModel:
    """What the forward of a stage at 384 × 640 must come to, worked out apart from this code."""

    teraflops: float  # diffusers
    eager_gigabytes: float  # elementwise, diffusers
    fused_gigabytes: float  # elementwise, when nothing is written that a product does not read


COST_MODEL = {1: CostModel(69.7, 213, 17), 2: CostModel(119.1, 339, 29), 3: CostModel(359.6, 843, 77)}


@dataclass(frozen=True)
class ForwardCounts:
    """`theirs` and `ours` by stage: one forward each. The rest is what ours does outside of its forward.

    `first_use` is what ours computes when a video of that size is made for the first time: the rotary tables of all
    stages and the modulation of t = 0.
    """

    theirs: dict[int, Counts]
    ours: dict[int, Counts]
    per_prompt: Counts
    per_chunk: Counts
    first_use: Counts

    def ours_to_json(self) -> dict[str, dict[str, int]]:
        named = {f"stage {stage}": counts for stage, counts in self.ours.items()}
        named |= {"per prompt": self.per_prompt, "per chunk": self.per_chunk, "first use": self.first_use}
        return {name: dataclasses.asdict(counts) for name, counts in named.items()}

    def to_json(self) -> dict[str, dict[str, dict[str, int]]]:
        theirs = {f"stage {stage}": dataclasses.asdict(counts) for stage, counts in self.theirs.items()}
        return {"diffusers": theirs, "ours": self.ours_to_json()}


def count_forward(
    config: TransformerConfig, size: tuple[int, int] = SIZE, stages: tuple[int, ...] = STAGES
) -> ForwardCounts:
    """Counts in bfloat16, with the parameters in fp32 that both keep so.

    All blocks but the last are alike, so models of two and of three blocks tell the counts of any deeper one, exactly.
    """
    if config.num_layers <= 3:
        return count_every_layer(config, size, stages)
    two, three = (count_every_layer(dataclasses.replace(config, num_layers=n), size, stages) for n in (2, 3))

    def deeper(two: Counts, three: Counts) -> Counts:
        return three + (three - two) * (config.num_layers - 3)

    return ForwardCounts(
        theirs={stage: deeper(two.theirs[stage], three.theirs[stage]) for stage in stages},
        ours={stage: deeper(two.ours[stage], three.ours[stage]) for stage in stages},
        per_prompt=deeper(two.per_prompt, three.per_prompt),
        per_chunk=deeper(two.per_chunk, three.per_chunk),
        first_use=deeper(two.first_use, three.first_use),
    )


def count_every_layer(config: TransformerConfig, size: tuple[int, int], stages: tuple[int, ...]) -> ForwardCounts:
    """What `count_forward` tells, by running all layers: about a second a forward of 40."""
    meta, dtype = torch.device("meta"), torch.bfloat16
    theirs, ours = build_pair(config, meta, dtype)
    inputs = {stage: Inputs.random(config, size, stage, meta, dtype) for stage in stages}
    any_inputs = inputs[stages[0]]  # text and history are the same at all stages

    first_history = count(encode_history, ours, any_inputs)
    with torch.inference_mode():
        text, history = ours.encode_text(any_inputs.text), encode_history(ours, any_inputs)
    first = {stage: count(run_ours, ours, inputs[stage], text, history) for stage in stages}
    steady = {stage: count(run_ours, ours, inputs[stage], text, history) for stage in stages}
    per_chunk = count(encode_history, ours, any_inputs)
    return ForwardCounts(
        theirs={stage: count(run_theirs, theirs, inputs[stage]) for stage in stages},
        ours=steady,
        per_prompt=count(ours.encode_text, any_inputs.text),
        per_chunk=per_chunk,
        first_use=sum((first[stage] - steady[stage] for stage in stages), first_history - per_chunk),
    )
