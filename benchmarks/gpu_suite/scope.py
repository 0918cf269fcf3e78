"""What all phases of `benchmarks.gpu_suite` measure, and small things that several of them need."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.fps.measure import setting_request
from benchmarks.gpu_suite.runner import Record
from benchmarks.models import full_size
from helios_cp.config.execution import Execution
from helios_cp.config.request import Request
from helios_cp.pipeline.parallelize import ParallelPipeline
from helios_cp.plan.workload import BuiltInCheckpoint
from parallel.mesh import Degrees, Mesh


@dataclass(frozen=True)
class Scope:
    """What all phases measure: a model of `benchmarks.models.full_size`, on a device, in a dtype of torch by name.

    `chunks` are timed, of each setting. Without `compiles` torch.compile does nothing, as a CPU takes minutes for it.
    `tests` are the files whose GPU tests are run.
    """

    model: str
    device: str
    dtype: str
    chunks: int
    compiles: bool
    tests: tuple[str, ...]

    @property
    def checkpoint(self) -> BuiltInCheckpoint:
        return full_size.named_checkpoint(self.model)

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def request(self, setting: str, frames: int = 33) -> Request:
        """The resolved request of a setting, in the size that suits the model."""
        size = full_size.size_of(self.checkpoint)
        height, width = size.video
        fields = {"height": height, "width": width, "max_sequence_length": size.text_tokens}
        return setting_request(setting, self.checkpoint, num_frames=frames, **fields)

    def build(
        self, execution: Execution | None = None, like: ParallelPipeline | None = None, **changes: Any
    ) -> ParallelPipeline:
        """Our pipeline; with `like` over the same memory of weights. `changes` are of the checkpoint."""
        return full_size.build_random(
            replace(self.checkpoint, **changes),
            Mesh.build(Degrees()),
            dtype=self.torch_dtype,
            device=self.torch_device,
            like=None if like is None else like.transformer,
            execution=execution or Execution(),
        )


def one_line(error: BaseException) -> str:
    """For a result file."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def prepare_compiler(scope: Scope, record: Record) -> None:
    """For this process."""
    if not scope.compiles:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    record.update(compiles=scope.compiles)
