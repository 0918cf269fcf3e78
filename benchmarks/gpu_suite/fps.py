"""The FPS phases of `benchmarks.gpu_suite`: diffusers and ours end to end, in turns, over one memory of weights.

What compiles longest, or may take the process with it, has a phase of its own, so that the figures before it stay.
"""

from __future__ import annotations

import contextlib
import functools
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.fps.cost import chunk_flops
from benchmarks.fps.measure import PEER, Measured, Rates, Subject, describe, frames_for, take_turns, video_path
from benchmarks.fps.videos import OurVideo, PeerVideo, Video, repaired
from benchmarks.gpu_suite.runner import Record
from benchmarks.gpu_suite.scope import Scope, one_line, prepare_compiler
from benchmarks.models import full_size
from helios_cp.config.execution import Execution
from helios_cp.config.layout import Layout
from helios_cp.config.sampling_plan import SamplingPlan
from helios_cp.pipeline.parallelize import ParallelPipeline
from helios_cp.plan.predict import Workload

EAGER = "ours, eager"
COMPILED: Mapping[str, Execution] = {"ours, compiled": Execution(compile=True)}
FP8: Mapping[str, Execution] = {
    "ours, fp8": Execution(compile=True, quantize="fp8"),
    "ours, fp8, VAE bf16": Execution(compile=True, quantize="fp8", vae_dtype="bfloat16"),
}
GRAPHS: Mapping[str, Execution] = {"ours, graphs": Execution(compile=True, cuda_graphs=True)}
COMPILING_SHARE = 0.5
"""Of a phase's time: no program is begun later, lest compiling it takes the time that is for measuring the others."""


def measure_fps_eager(scope: Scope, record: Record) -> None:
    """diffusers and ours without any option, which need no time to compile: two chunks each, so soon a figure."""
    measure_fps(replace(scope, chunks=2), record, {}, warmup=0)


def measure_fps(
    scope: Scope, record: Record, variants: Mapping[str, Execution], with_peer: bool = True, warmup: int = 1
) -> None:
    """End-to-end FPS at [1, 1, 1] and [2, 2, 2] of ours with no option, `variants` of it and, if asked, diffusers.

    All programs take turns, over one memory of weights.
    """
    prepare_compiler(scope, record)
    device, dtype = scope.torch_device, scope.torch_dtype
    rates = Rates.measure(device, dtype)
    record.update(**describe(scope.model, device, dtype, Layout(), rates, is_random=True), settings={}, errors={})
    pipelines = {EAGER: scope.build()}
    peer = full_size.build_peer(pipelines[EAGER]) if with_peer else None
    for name, execution in variants.items():
        try:
            pipelines[name] = scope.build(execution, like=pipelines[EAGER])
        except Exception as error:
            record.values["errors"][name] = one_line(error)
    record.update(executions={name: asdict(execution) for name, execution in variants.items()})
    deadline = record.latest_start(COMPILING_SHARE)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        if peer is not None:
            record.update(**{"repairs of diffusers": stack.enter_context(repaired(peer))})
        for setting in ("distilled-111", "distilled-222"):
            _measure_setting(scope, record, setting, pipelines, peer, rates, warmup, Path(folder), deadline)
            deadline = math.inf  # all is compiled


def _measure_setting(
    scope: Scope,
    record: Record,
    setting: str,
    pipelines: dict[str, ParallelPipeline],
    peer: Any,
    rates: Rates,
    warmup: int,
    folder: Path,
    deadline: float,
) -> None:
    """Programs that fail are left out of `pipelines` afterwards, and so are those whose turn comes after `deadline`."""
    request = scope.request(setting, frames_for(scope.chunks, warmup))
    checkpoint = scope.checkpoint
    inputs = full_size.random_inputs(checkpoint, request, scope.torch_dtype)
    workload = Workload.of(checkpoint, request, scope.torch_dtype)
    subject = Subject(request, chunk_flops(workload, request, checkpoint), rates, Layout())
    plan = SamplingPlan.of(request, checkpoint)

    def start(name: str) -> Video:
        if name != EAGER and time.monotonic() > deadline:
            raise TimeoutError("too little time was left to compile and run it")
        return OurVideo(pipelines[name], request, inputs, video_path(folder, setting, name))

    videos: dict[str, Callable[[], Video]] = {}
    if peer is not None:
        videos[PEER] = lambda: PeerVideo(peer, request, inputs, plan, video_path(folder, setting, PEER))
    for name in pipelines:
        videos[name] = functools.partial(start, name)

    def write(measured: dict[str, Measured]) -> None:
        record.values["settings"][setting] = subject.to_json(measured)
        record.update()

    measured = take_turns(videos, scope.chunks, warmup, write, keeps_going=True, with_alone=False)
    for name, found in measured.items():
        fps = f"{subject.fps(found.timing()):.3g} FPS" if len(found.chunks) > 1 else found.error
        print(f"  {setting} {name}: {fps}", flush=True)
        if found.error is not None:
            record.values["errors"][f"{setting} {name}"] = found.error
            pipelines.pop(name, None)
    record.update()
    print(f"  {setting} limit at the GEMM rate: {subject.limit.fps:.3g} FPS", flush=True)
