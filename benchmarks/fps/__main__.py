"""End-to-end frames per second as a user sees them, from one chunk in the MP4 to the next, and how far from the limit.

python -m benchmarks.fps --compare diffusers                               a small model, on a CPU
python -m benchmarks.fps --random-weights 14b --compare diffusers          full size on a GPU, without a download
torchrun --nproc_per_node 4 -m benchmarks.fps --random-weights 14b --ulysses 4
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.fps.cost import chunk_flops
from benchmarks.fps.measure import (
    PEER,
    SETTINGS,
    Rates,
    Subject,
    check_equal,
    describe,
    frames_for,
    setting_request,
    take_turns,
    video_path,
)
from benchmarks.fps.videos import OurVideo, PeerVideo, Video, repaired
from benchmarks.measuring.output import add_output, write_output
from benchmarks.models import full_size
from helios_cp.config.arguments import OneLineParser, add_flags, check_bounds, given, whole_number
from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.errors import CheckpointError, RequestError
from helios_cp.config.execution import Execution
from helios_cp.config.layout import AskedLayout, Layout, segment_lengths
from helios_cp.config.paths import cache_folder
from helios_cp.config.ranks import Ranks, parse_on_rank
from helios_cp.config.request import Request
from helios_cp.config.sampling_plan import SamplingPlan
from helios_cp.device.device import card_of_rank, pick_device, pick_dtype
from helios_cp.files.whole_files import check_file_target, check_folder_target
from helios_cp.pipeline.environment import prepare
from helios_cp.pipeline.parallelize import ParallelPipeline, load_parallel
from helios_cp.pipeline.start import Inputs
from helios_cp.pipeline.world import World, pick_backend
from helios_cp.plan.choose import choose_layout, planning_hardware
from helios_cp.plan.predict import Workload
from helios_cp.weights.check import check_execution, with_stored_quantization
from helios_cp.weights.load import resolve
from parallel.mesh import Mesh

OURS, EAGER = "ours", "ours, eager"
PROMPT = "a red fox running through fresh snow"
NOTES = (
    "FPS: frames of a chunk over the median time from one chunk in the MP4 to the next; text is encoded before.",
    "First chunk: cold, with allocation, compilation and, with Distilled, twice the steps.",
    "Alone: with nothing beside it; on a GPU a chunk is decoded and transferred beside the next one's denoising.",
    "The GEMM rate is that of one large product of random matrices, measured before; the limit is all FLOPs at it.",
    "Denoising is of all ranks together; TFLOP/s are each rank's.",
    "diffusers computes some of each forward again in every step, which its FLOPs include.",
    "Ours encodes a chunk beside the making of the next; those of diffusers, which cannot, in turn.",
    "What diffusers does itself with the whole video at the end is left out.",
    "Programs take turns chunk by chunk; ratios are taken turn by turn.",
)


@dataclass(frozen=True)
class Job:
    """A checked command line."""

    checkpoint: Checkpoint
    model: str
    device: torch.device
    dtype: torch.dtype
    layout: Layout
    backend: str
    execution: Execution
    requests: dict[str, Request]
    compare: tuple[str, ...]
    chunks: int
    warmup: int

    @property
    def is_random(self) -> bool:
        return self.model in full_size.NAMES


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="benchmarks.fps",
        description="End-to-end FPS, each stage of a chunk, and how far from the limit they are.",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add(
        "--random-weights",
        metavar="SIZE",
        help=f"build this model on the device, no download: {', '.join(full_size.NAMES)} (default: 14b on a GPU, small "
        "on a CPU)",
    )
    add("--model", metavar="MODEL", help="in its place: a checkpoint, as helios_cp.generate takes it")
    add(
        "--settings",
        nargs="+",
        choices=SETTINGS,
        help="steps of each stage; those of the model's variant (default: all of them)",
    )
    add(
        "--compare",
        nargs="+",
        default=[],
        choices=(PEER, "eager"),
        help="in turns in the same run: diffusers' own pipeline, or ours without the flags of speed and memory",
    )
    add("--height", type=whole_number, metavar="PIXELS", help="of the video (default: what suits the model)")
    add("--width", type=whole_number, metavar="PIXELS", help="likewise")
    add("--chunks", type=whole_number, default=5, metavar="N", help="timed, two or more (default: 5)")
    add("--warmup", type=whole_number, default=1, metavar="N", help="dropped after the first chunk (default: 1)")
    add("--dtype", default="auto", help="bfloat16, float16 or float32 (default: bfloat16 on a GPU, float32 on a CPU)")
    add("--device", default="auto", metavar="NAME", help="cpu, cuda, … (default: auto, the best present)")
    add_output(parser, "fps")
    add_flags(parser, AskedLayout)
    add_flags(parser, Execution)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0, 1 for a failure, 2 for bad input. Under torchrun every rank calls it; rank 0 speaks for all."""
    parser = build_parser()
    arguments, ranks = parse_on_rank(parser, argv, os.environ)
    try:
        world = World(ranks, asked_layout(arguments).timeout)
        job = check(arguments, ranks)
    except RequestError as error:
        parser.error(str(error))
    try:
        with world.connected(job.backend, job.device):
            results = run(job, Mesh.build(job.layout.degrees, timeout=world.timeout))
    except (CheckpointError, RequestError) as error:
        print(f"benchmarks.fps: error: {error}", file=sys.stderr)
        return 1
    if ranks.is_first:
        from benchmarks.fps.table import print_tables

        print_tables(results, NOTES)
        print(f"written to {write_output(arguments.output, results)}")
    return 0


def check(arguments: argparse.Namespace, ranks: Ranks) -> Job:
    """Raises `RequestError` before anything is loaded."""
    check_file_target("--output", arguments.output, ".json")
    for name, least in (("chunks", 2), ("warmup", 0)):
        if getattr(arguments, name) < least:
            raise RequestError(f"--{name} {getattr(arguments, name)}: must be {least} or more")
    asked, device = asked_layout(arguments), card_of_rank(pick_device(arguments.device), ranks.local_rank)
    dtype = pick_dtype(arguments.dtype, device)
    checkpoint, model = find_model(arguments, device)
    fields = {"num_frames": frames_for(arguments.chunks, arguments.warmup)}
    if model in full_size.NAMES:
        size = full_size.size_of(checkpoint)
        fields |= {"height": size.video[0], "width": size.video[1], "max_sequence_length": size.text_tokens}
    fields |= {name: getattr(arguments, name) for name in ("height", "width") if hasattr(arguments, name)}
    own = [name for name, setting in SETTINGS.items() if setting.variant == checkpoint.variant]
    requests = {
        name: setting_request(name, checkpoint, **fields) for name in getattr(arguments, "settings", None) or own
    }
    execution = Execution(**given(Execution, arguments))
    if execution.compile_cache is not None:
        check_folder_target("--compile-cache", execution.compile_cache)
    hardware = planning_hardware(asked, device.type, ranks.local_size)
    layout = choose_layout(asked, checkpoint, list(requests.values()), ranks.size, dtype, execution, hardware)
    backend = pick_backend(asked.backend, device, ranks)
    sequences = {lengths for request in requests.values() for lengths in segment_lengths(request, checkpoint)}
    execution = check_execution(checkpoint, execution, device, dtype, layout, backend=backend, sequences=sequences)
    stored = with_stored_quantization(checkpoint, Execution()).quantize
    if arguments.compare and stored is not None:
        raise RequestError(f"--compare {arguments.compare[0]}: the weights in {model} are {stored} already")
    prepare(execution, ranks.size, os.environ)
    if PEER in arguments.compare and ranks.size > 1:
        raise RequestError(
            f"--compare {PEER}: on {ranks.size} ranks there is nothing to compare with here; benchmarks.scaling runs "
            "its context parallelism"
        )
    if "eager" in arguments.compare and execution == Execution():
        raise RequestError("--compare eager: no flag of speed or memory is given, so this is what runs anyway")
    return Job(
        checkpoint,
        model,
        device,
        dtype,
        layout,
        backend,
        execution,
        requests,
        tuple(arguments.compare),
        arguments.chunks,
        arguments.warmup,
    )


def asked_layout(arguments: argparse.Namespace) -> AskedLayout:
    """Raises `RequestError` for numbers out of bounds."""
    asked = AskedLayout(**given(AskedLayout, arguments))
    check_bounds(asked)
    return asked


def find_model(arguments: argparse.Namespace, device: torch.device) -> tuple[Checkpoint, str]:
    """The checkpoint and its name. Raises `RequestError`."""
    if hasattr(arguments, "model"):
        if hasattr(arguments, "random_weights"):
            raise RequestError(f"--model {arguments.model} --random-weights {arguments.random_weights}: give one")
        return resolve(arguments.model, cache_folder(os.environ)), arguments.model
    name = getattr(arguments, "random_weights", "small" if device.type == "cpu" else "14b")
    return full_size.named_checkpoint(name), name


def run(job: Job, mesh: Mesh) -> dict[str, Any]:
    """Time every setting; every rank of the mesh calls it."""
    rates = Rates.measure(job.device, job.dtype, job.execution)
    pipelines, text_seconds = build(job, mesh)
    results = describe(job.model, job.device, job.dtype, job.layout, rates, job.is_random)
    results |= {
        "execution": dataclasses.asdict(job.execution),
        "text_seconds": text_seconds,
        "notes": NOTES,
        "settings": {},
    }
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        peer = None
        if PEER in job.compare:
            peer = full_size.build_peer(pipelines[EAGER if EAGER in pipelines else OURS])
            results["repairs of diffusers"] = stack.enter_context(repaired(peer))
        for name, request in job.requests.items():
            inputs = full_size.random_inputs(job.checkpoint, request, job.dtype)
            workload = Workload.of(job.checkpoint, request, job.dtype)
            subject = Subject(request, chunk_flops(workload, request, job.checkpoint), rates, job.layout)
            measured = take_turns(videos(job, name, request, inputs, pipelines, peer, folder), job.chunks, job.warmup)
            if peer is not None and job.dtype == torch.float32:
                check_equal(measured, exact_programs(job, pipelines))
            results["settings"][name] = subject.to_json(measured)
    return results


def build(job: Job, mesh: Mesh) -> tuple[dict[str, ParallelPipeline], float | None]:
    """Our pipelines by program, over one memory of weights where that can be, and the seconds of encoding a prompt."""
    options: dict[str, Any] = {"dtype": job.dtype, "device": job.device}
    options |= {"attention": job.layout.attention, "shard_weights": job.layout.shard_weights}
    programs = {OURS: job.execution}
    if "eager" in job.compare or (PEER in job.compare and job.execution != Execution()):
        programs = {EAGER: Execution(), OURS: job.execution}
    pipelines: dict[str, ParallelPipeline] = {}
    for name, execution in programs.items():
        if job.is_random:
            like = pipelines[EAGER].transformer if EAGER in pipelines else None
            pipelines[name] = full_size.build_random(job.checkpoint, mesh, like=like, execution=execution, **options)
        else:
            pipelines[name] = load_parallel(job.checkpoint, mesh, execution=execution, **options)
    if job.is_random:
        return pipelines, None
    start = time.perf_counter()
    request = next(iter(job.requests.values()))
    pipelines[OURS].prompt_encoder([PROMPT], request.max_sequence_length, job.dtype).cpu()
    return pipelines, time.perf_counter() - start


def videos(
    job: Job,
    setting: str,
    request: Request,
    inputs: Inputs,
    pipelines: dict[str, ParallelPipeline],
    peer: Any,
    folder: Path,
) -> dict[str, Callable[[], Video]]:
    """What starts each program's video."""
    found: dict[str, Callable[[], Video]] = {}
    if peer is not None:
        plan = SamplingPlan.of(request, job.checkpoint)
        found[PEER] = lambda: PeerVideo(peer, request, inputs, plan, video_path(folder, setting, PEER))
    for name, pipeline in pipelines.items():
        found[name] = lambda name=name, pipeline=pipeline: OurVideo(
            pipeline, request, inputs, video_path(folder, setting, name)
        )
    return found


def exact_programs(job: Job, pipelines: dict[str, ParallelPipeline]) -> list[str]:
    """Those whose latents are diffusers' to rounding: all that neither quantise nor skip nor adapt."""
    is_exact = dataclasses.replace(job.execution, quantize=None, block_cache=None, lora=()) == job.execution
    return [name for name in pipelines if name == EAGER or is_exact]


if __name__ == "__main__":
    sys.exit(main())
