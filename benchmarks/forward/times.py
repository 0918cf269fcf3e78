"""How long a forward takes on this machine: diffusers' and ours in one run, on the same weights and inputs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring.counting import count
from benchmarks.measuring.timing import Ratio, Timing, interleave, ratio
from benchmarks.models.models import Inputs, build_pair, encode_history, run_ours, run_theirs
from helios_cp.config.checkpoint import TransformerConfig
from helios_cp.device.device import dtype_name


@dataclass(frozen=True)
class Case:
    """A model, a video size (height, width) in pixels and the pyramid stages to time."""

    config: TransformerConfig
    size: tuple[int, int]
    stages: tuple[int, ...]


# Small enough for two cores, and in proportion: the FFN 4 × as wide as the model, all three kinds of history.
ON_CPU = Case(
    TransformerConfig(num_attention_heads=8, attention_head_dim=64, rope_dim=(24, 20, 20), ffn_dim=2048, num_layers=4),
    size=(128, 192),
    stages=(3,),
)
ON_GPU = Case(TransformerConfig(), size=(384, 640), stages=(1, 2, 3))


def pick_case(device: torch.device, layers: int | None = None, heads: int | None = None) -> Case:
    """The case for a device, with another depth or width if asked for; the FFN grows with the width."""
    case = ON_CPU if device.type == "cpu" else ON_GPU
    config = case.config
    heads = heads or config.num_attention_heads
    config = dataclasses.replace(
        config,
        num_layers=layers or config.num_layers,
        num_attention_heads=heads,
        ffn_dim=config.ffn_dim * heads // config.num_attention_heads,
    )
    return dataclasses.replace(case, config=config)


@dataclass(frozen=True)
class StageTimes:
    """Times of one forward. `difference` is the largest between the two outputs, in units of the output's range.

    The FLOPs are those counted for each, so that FLOPs / median is the rate achieved.
    """

    theirs: Timing
    ours: Timing
    per_prompt: Timing
    per_chunk: Timing
    theirs_flops: int
    ours_flops: int
    difference: float

    @property
    def speedup(self) -> Ratio:
        return ratio(self.theirs, self.ours)

    def to_json(self) -> dict[str, Any]:
        timings = {"diffusers": self.theirs, "ours": self.ours}
        once = {"ours per prompt": self.per_prompt, "ours per chunk": self.per_chunk}
        return {
            **{name: timing.to_json() for name, timing in (timings | once).items()},
            "speedup": dataclasses.asdict(self.speedup),
            "flops": {"diffusers": self.theirs_flops, "ours": self.ours_flops},
            "difference": self.difference,
        }


def time_forward(case: Case, device: torch.device, dtype: torch.dtype, repeats: int) -> dict[int, StageTimes]:
    """Times by stage. Random weights and inputs, the same in both models and from run to run."""
    torch.manual_seed(0)
    theirs, ours = build_pair(case.config, device, dtype)
    times = {}
    for stage in case.stages:
        inputs = Inputs.random(case.config, case.size, stage, device, dtype)
        times[stage] = _time_stage(theirs, ours, inputs, repeats)
    return times


@torch.inference_mode()
def _time_stage(theirs, ours, inputs: Inputs, repeats: int) -> StageTimes:
    text, history = ours.encode_text(inputs.text), encode_history(ours, inputs)
    programs = {
        "theirs": lambda: run_theirs(theirs, inputs),
        "ours": lambda: run_ours(ours, inputs, text, history),
        "per_prompt": lambda: ours.encode_text(inputs.text),
        "per_chunk": lambda: encode_history(ours, inputs),
    }
    difference = _difference(programs["ours"](), programs["theirs"]())
    return StageTimes(
        **interleave(programs, repeats, inputs.latents.device),
        theirs_flops=count(programs["theirs"]).flops,
        ours_flops=count(programs["ours"]).flops,
        difference=difference,
    )


def _difference(result: Tensor, reference: Tensor) -> float:
    result, reference = result.float(), reference.float()
    return ((result - reference).abs().max() / (reference.max() - reference.min())).item()


def describe_case(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    return {**dataclasses.asdict(case), "device": device.type, "dtype": dtype_name(dtype)}
