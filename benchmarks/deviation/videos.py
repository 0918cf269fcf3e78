"""How far a video made with a flag of speed or memory is from the plain one, for `benchmarks.deviation`."""

from __future__ import annotations

import gc
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.models.full_size import build_random, random_inputs
from helios_cp.config.arguments import OneLineParser, add_flags, given
from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.errors import RequestError
from helios_cp.config.execution import Execution
from helios_cp.config.request import Request
from helios_cp.config.sampling_plan import SamplingPlan
from helios_cp.device.device import dtype_name, has_tf32
from helios_cp.device.streams import wait_for
from helios_cp.pipeline.pipeline import Pipeline
from helios_cp.pipeline.start import Inputs
from helios_cp.weights.check import check_execution
from helios_cp.weights.quantize import components, is_quantised
from parallel.mesh import Degrees, Mesh

VARIANTS = (
    "--quantize fp8",
    "--quantize int8",
    "--quantize int4",
    "--vae-dtype bfloat16",
    "--vae-dtype float16",
    "--no-tf32",
    "--block-cache 0.08",
    "--block-cache 0.5",
    "--compile",
    "--cuda-graphs",
)

OnResult = Callable[[str, dict[str, Any]], None]
"""Is told the figures of each variant as soon as they are there."""


def nothing(variant: str, values: dict[str, Any]) -> None:
    """For who wants them all at once."""


@dataclass(frozen=True)
class Video:
    """What a pipeline made: latents `[B, C, T, h, w]` and frames `[B, T, H, W, 3]` in [0, 1], on the CPU, in fp32.

    `skipped` steps left blocks out.
    """

    latents: Tensor
    frames: Tensor
    seconds: float
    skipped: int = 0


@dataclass(frozen=True)
class Deviation:
    """Of a video from another: norms of the differences over the other's norm, and frames in grey levels of 255."""

    latents: float
    frames: float
    mean_grey_levels: float


def deviation(found: Video, reference: Video) -> Deviation:
    """Computed in fp64."""

    def relative(values: Tensor, others: Tensor) -> float:
        return ((values.double() - others).norm() / others.double().norm()).item()

    levels = 255 * (found.frames - reference.frames).abs().double().mean().item()
    latents, frames = relative(found.latents, reference.latents), relative(found.frames, reference.frames)
    return Deviation(latents, frames, levels)


def make(pipeline: Pipeline, request: Request, inputs: Inputs | None) -> Video:
    """The request twice; the first time, in which code may be compiled, does not count."""
    for _ in range(2):
        wait_for(pipeline.device)
        start = time.perf_counter()
        chunks = list(pipeline.stream(request, inputs, output_type="float"))
        wait_for(pipeline.device)
        seconds = time.perf_counter() - start
    latents = torch.cat([chunk.latents.cpu() for chunk in chunks], 2)
    frames = torch.cat([chunk.frames.cpu() for chunk in chunks], 1)
    return Video(latents, frames, seconds, sum(len(chunk.skipped) for chunk in chunks))


def weight_bytes(pipeline: Pipeline) -> int:
    """Bytes of the transformer's weights."""
    parameters = list(pipeline.transformer.parameters())
    return sum(
        sum(part.nbytes for part in components(each).values()) if is_quantised(each) else each.nbytes
        for each in parameters
    )


def default_variants(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> list[str]:
    """Those of `VARIANTS` that go with a checkpoint and change something on a device."""
    found = []
    for variant in VARIANTS:
        execution = parse_variant(variant)
        try:
            check_execution(checkpoint, execution, device, dtype)
        except RequestError:
            continue
        if execution.tf32 or has_tf32(device):
            found.append(variant)
    return found


def compare(
    variants: Sequence[str],
    build: Callable[[Execution], Pipeline],
    request: Request,
    inputs: Inputs | None = None,
    on_result: OnResult = nothing,
) -> dict[str, dict[str, Any]]:
    """Results by variant, the plain one (named "") first, each told by `on_result` as soon as it is there.

    `request` is resolved. Where a variant was refused, by a `RequestError` of `build`, or failed, its figures are
    replaced by why; a failure of the plain one is raised.
    """
    results: dict[str, dict[str, Any]] = {}
    reference: Video | None = None
    for variant in ["", *variants]:
        try:
            pipeline = build(parse_variant(variant))
            video = make(pipeline, request, inputs)
            reference = reference or video
            results[variant] = _figures(pipeline, request, video, reference)
        except RequestError as error:
            results[variant] = {"refused": str(error)}
        except Exception as error:
            if reference is None:
                raise
            results[variant] = {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        pipeline = None
        on_result(variant, results[variant])
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return results


def _figures(pipeline: Pipeline, request: Request, video: Video, reference: Video) -> dict[str, Any]:
    plan = SamplingPlan.of(request, pipeline.checkpoint)
    return {
        "seconds": video.seconds,
        "fps": request.num_chunks * request.frames_per_chunk / video.seconds,
        "transformer_bytes": weight_bytes(pipeline),
        "deviation": asdict(deviation(video, reference)),
        "steps": sum(plan.total_steps(chunk) for chunk in range(request.num_chunks)),
        "skipped_steps": None if pipeline.block_cache is None else video.skipped,
    }


def parse_variant(text: str) -> Execution:
    """From flags as they are typed. Raises `RequestError`."""
    parser = OneLineParser(prog="benchmarks.deviation --variant", add_help=False)
    add_flags(parser, Execution)
    return Execution(**given(Execution, parser.parse_args(shlex.split(text))))


@dataclass(frozen=True)
class Case:
    """A model on a device, a resolved request for it, and the flags to compare.

    `is_built`: made of random weights on the device, by `benchmarks.models.full_size`.
    """

    checkpoint: Checkpoint
    name: str
    is_built: bool
    request: Request
    dtype: torch.dtype
    device: torch.device
    variants: tuple[str, ...]

    def build(self, execution: Execution) -> Pipeline:
        """A pipeline for an execution that goes with it. Raises `RequestError` for one that does not."""
        checkpoint, dtype, device = self.checkpoint, self.dtype, self.device
        execution = check_execution(checkpoint, execution, device, dtype)
        if not self.is_built:
            return Pipeline.from_pretrained(checkpoint, dtype=dtype, device=device, execution=execution)
        return build_random(checkpoint, Mesh.build(Degrees()), dtype=dtype, device=device, execution=execution)

    def run(self, on_result: OnResult = nothing) -> dict[str, Any]:
        """One of the `runs` of a result, as `benchmarks.report.deviation_section` reads it."""
        inputs = random_inputs(self.checkpoint, self.request, self.dtype) if self.is_built else None
        return self.about() | {"variants": compare(self.variants, self.build, self.request, inputs, on_result)}

    def about(self) -> dict[str, Any]:
        """What the run is of."""
        return {
            "model": self.name,
            "random_weights": self.checkpoint.random_weights,
            "device": str(self.device),
            "dtype": dtype_name(self.dtype),
            "size": [self.request.height, self.request.width],
            "chunks": self.request.num_chunks,
            "steps": SamplingPlan.of(self.request, self.checkpoint).steps,
        }
