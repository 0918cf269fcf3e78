"""What the choices of speed and memory change in a video, beside how fast they are: one request with each of them.

python -m benchmarks.deviation                                         on the CPU, with a tiny model
python -m benchmarks.deviation --device cuda --random-weights 14b      at full size, without a download
python -m benchmarks.deviation --variant="--quantize fp8 --compile"    any flags of `helios_cp.generate`'s execution

Deviations are from the same request without flags, in the same dtype. Of a model with random weights they say how far
rounding spreads, not how a video looks.
"""

from __future__ import annotations

import argparse
import gc
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.full_size import NAMES, build_random, named_checkpoint, random_inputs
from benchmarks.machine import RESULTS, write_result
from helios_cp.arguments import OneLineParser, whole_number
from helios_cp.conditioning import Inputs
from helios_cp.config import DTYPES, Checkpoint, Request, RequestError
from helios_cp.device import capability, dtype_name, pick_device, pick_dtype, wait_for
from helios_cp.execution import Execution, add_execution_arguments
from helios_cp.files import check_file_target
from helios_cp.pipeline import Pipeline
from helios_cp.quantize import check_quantization, components, is_quantised
from helios_cp.weights import resolve
from parallel.mesh import Degrees, Mesh

VARIANTS = (
    "--quantize fp8",
    "--quantize int8",
    "--quantize int4",
    "--vae-dtype bfloat16",
    "--vae-dtype float16",
    "--no-tf32",
    "--block-cache 0.08",
    "--compile",
)
VARIANT_HELP = f"as in --variant='--quantize fp8', once for each (default: {', '.join(VARIANTS)})"


@dataclass(frozen=True)
class Video:
    """What a pipeline made: latents `[B, C, T, h, w]` and frames `[B, T, H, W, 3]` in [0, 1], on the CPU, in fp32."""

    latents: Tensor
    frames: Tensor
    seconds: float


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
    return Video(latents, torch.cat([chunk.frames.cpu() for chunk in chunks], 1), seconds)


def weight_bytes(pipeline: Pipeline) -> int:
    """Bytes of the transformer's weights."""
    parameters = list(pipeline.transformer.parameters())
    return sum(
        sum(part.nbytes for part in components(each).values()) if is_quantised(each) else each.nbytes
        for each in parameters
    )


def compare(
    variants: list[str], build: Callable[[Execution], Pipeline], request: Request, inputs: Inputs | None
) -> dict[str, dict[str, Any]]:
    """Results by variant, the plain one (named "") first. Why one was refused stands in place of its figures."""
    results: dict[str, dict[str, Any]] = {}
    reference: Video | None = None
    for variant in ["", *variants]:
        try:
            pipeline = build(parse_variant(variant))
        except RequestError as error:
            results[variant] = {"refused": str(error)}
            continue
        video = make(pipeline, request, inputs)
        reference = reference or video
        frames = request.num_chunks * request.frames_per_chunk
        results[variant] = {
            "seconds": video.seconds,
            "fps": frames / video.seconds,
            "transformer_bytes": weight_bytes(pipeline),
            "deviation": asdict(deviation(video, reference)),
        }
        del pipeline
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return results


def parse_variant(text: str) -> Execution:
    """From flags as they are typed. Raises `RequestError`."""
    parser = OneLineParser(prog="benchmarks.deviation --variant", argument_default=argparse.SUPPRESS, add_help=False)
    add_execution_arguments(parser)
    return Execution.of(parser.parse_args(shlex.split(text)))


def checked(
    execution: Execution, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, options: argparse.Namespace
) -> Pipeline:
    """A pipeline for an execution that goes with it. Raises `RequestError` for one that does not."""
    execution.check(device=device.type, capability=capability(device), is_distilled=checkpoint.is_distilled)
    check_quantization(execution.quantize, checkpoint.transformer, dtype=dtype, device=device)
    if options.random_weights is None:
        return Pipeline.from_pretrained(checkpoint, dtype=dtype, device=device, execution=execution)
    mesh = Mesh.build(Degrees())
    return build_random(checkpoint, mesh, dtype=dtype, device=device, execution=execution)


def table_of(results: dict[str, dict[str, Any]], title: str) -> Table:
    table = Table("flags", "FPS", "against none", "weights GB", "latents", "frames", "grey levels", title=title)
    plain = results[""]["fps"]
    for variant, found in results.items():
        name = variant or "none"
        if "refused" in found:
            table.add_row(name, found["refused"])
            continue
        away = found["deviation"]
        table.add_row(
            name,
            f"{found['fps']:.2f}",
            f"{found['fps'] / plain:.2f}×",
            f"{found['transformer_bytes'] / 1e9:.3g}",
            f"{away['latents']:.2e}",
            f"{away['frames']:.2e}",
            f"{away['mean_grey_levels']:.2f}",
        )
    return table


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="benchmarks.deviation",
        description="How far each choice of speed or memory takes a video from the plain one, and how fast it is.",
    )
    parser.add_argument("--model", default="tiny-distilled", help="as for helios_cp.generate (default: tiny-distilled)")
    parser.add_argument("--random-weights", choices=sorted(NAMES), help="in place of --model, built on the device")
    parser.add_argument("--variant", action="append", metavar="FLAGS", help=VARIANT_HELP)
    parser.add_argument("--device", default="cpu", metavar="NAME", help="default: cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    parser.add_argument("--height", type=whole_number, metavar="PIXELS", help="default: 384, or 64 on a CPU")
    parser.add_argument("--width", type=whole_number, metavar="PIXELS", help="default: 640, or 64 on a CPU")
    parser.add_argument("--num-frames", type=whole_number, default=66, metavar="N", help="default: 66, two chunks")
    parser.add_argument("--pyramid-steps", type=whole_number, nargs="+", metavar="N", help="default: the checkpoint's")
    parser.add_argument(
        "--output",
        type=Path,
        default=RESULTS / "deviation.json",
        metavar="FILE",
        help="JSON to write (default: benchmarks/results/deviation.json)",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(arguments)
    variants = options.variant or list(VARIANTS)
    try:
        check_file_target("--output", options.output, ".json")
        for variant in variants:
            parse_variant(variant)
        device = pick_device(options.device)
        dtype = pick_dtype(options.dtype, device)
        named = options.random_weights
        checkpoint = named_checkpoint(named) if named else resolve(options.model)
        request = Request(
            prompt=("a red fox runs through fresh snow",),
            height=options.height or (64 if device.type == "cpu" else 384),
            width=options.width or (64 if device.type == "cpu" else 640),
            num_frames=options.num_frames,
            pyramid_num_inference_steps_list=tuple(options.pyramid_steps) if options.pyramid_steps else None,
        ).resolve(checkpoint)
    except RequestError as error:
        parser.error(str(error))
    inputs = random_inputs(checkpoint, request, dtype) if named else None
    results = compare(
        variants, lambda execution: checked(execution, checkpoint, dtype, device, options), request, inputs
    )
    about = {
        "model": named or options.model,
        "random_weights": checkpoint.random_weights,
        "device": str(device),
        "dtype": dtype_name(dtype),
        "size": [request.height, request.width],
        "chunks": request.num_chunks,
    }
    title = f"{about['model']}, {request.height} × {request.width}, {about['dtype']} on {device}"
    console = Console()
    console.print(table_of(results, title))
    path = write_result(options.output.stem, {**about, "variants": results}, options.output.parent)
    console.print(f"written to {path}", style="dim", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
