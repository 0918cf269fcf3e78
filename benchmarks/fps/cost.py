"""FLOPs of a chunk, by the formulas of the planner, and the FPS that no program can exceed at a given rate."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.request import Request
from helios_cp.config.sampling_plan import SamplingPlan
from helios_cp.plan.forward_cost import forward_cost, repeated_flops
from helios_cp.plan.predict import Workload, limit_fps
from helios_cp.plan.rank_shares import whole
from parallel.mesh import Degrees


@dataclass(frozen=True)
class StageFlops:
    """Of one pyramid stage, both branches of guidance together: forwards of a steady chunk, and FLOPs of each."""

    tokens: int
    forwards: int
    flops: int
    peer_forwards: int
    peer_flops: int


@dataclass(frozen=True)
class ChunkFlops:
    """FLOPs of a steady chunk of one video; a multiply-add is two.

    Ours leaves out what diffusers computes again in each step, and the steps that CFG-Zero* zeroes. The embedding of
    the history, once a chunk, is left out (0.002 % at full size).
    """

    stages: tuple[StageFlops, ...]
    decode: int

    @property
    def denoise(self) -> int:
        return sum(stage.forwards * stage.flops for stage in self.stages)

    @property
    def peer_denoise(self) -> int:
        """Of diffusers."""
        return sum(stage.peer_forwards * stage.peer_flops for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        totals = {"denoise": self.denoise, "diffusers denoise": self.peer_denoise, "decode": self.decode}
        return {**totals, "stages": [asdict(stage) for stage in self.stages]}


def chunk_flops(workload: Workload, request: Request, checkpoint: Checkpoint) -> ChunkFlops:
    """Of a resolved request."""
    steps = SamplingPlan.of(request, checkpoint).steps
    stages = []
    for stage, count in zip(workload.stages, steps, strict=True):
        alone = whole(workload.config, stage.lengths)
        cost = forward_cost(workload.config, alone, Degrees(), workload.text_tokens, workload.dtype.itemsize)
        peer = repeated_flops(workload.config, stage.lengths, workload.text_tokens)
        branches = workload.branches
        stages.append(StageFlops(alone.tokens, stage.forwards * branches, cost.flops, count * branches, peer))
    return ChunkFlops(tuple(stages), workload.decode_flops)


@dataclass(frozen=True)
class Limit:
    """The least seconds of a chunk at the rates of matrix products measured here, transformer and VAE in series."""

    denoise: float
    decode: float
    fps: float

    @classmethod
    def of(cls, flops: ChunkFlops, frames: int, rate: float, vae_rate: float, degrees: Degrees) -> Limit:
        """`rate` and `vae_rate` are FLOP/s of one rank in the dtypes of the transformer and the VAE."""
        rate, vae_rate = rate * degrees.world, vae_rate * degrees.vae
        fps = limit_fps(frames, flops.denoise, flops.decode, rate, vae_rate)
        return cls(flops.denoise / rate, flops.decode / vae_rate, fps)

    def to_json(self) -> dict[str, float]:
        return asdict(self)
