"""The phases of `benchmarks.gpu_suite`, the most valuable first."""

from __future__ import annotations

import functools
import gc
import math
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from benchmarks.fps.videos import OurVideo
from benchmarks.gpu_suite.fps import COMPILED, FP8, GRAPHS, measure_fps, measure_fps_eager
from benchmarks.gpu_suite.one_rank_share import measure_shares
from benchmarks.gpu_suite.profile import Share, fit_profile, measure_profile
from benchmarks.gpu_suite.runner import Phase, Record
from benchmarks.gpu_suite.scope import Scope, one_line, prepare_compiler
from benchmarks.measuring import device_rates as fps_rates
from benchmarks.measuring.machine import CHECKOUT
from benchmarks.measuring.timing import interleave
from benchmarks.models import full_size
from helios_cp.config.checkpoint import VAE_SPATIAL
from helios_cp.config.execution import Execution
from helios_cp.config.layout import segment_lengths
from helios_cp.device.memory import allocated_memory, peak_memory, reset_peak_memory
from helios_cp.model.codec import Codec
from helios_cp.plan.vae_cost import decode_flops
from parallel.mesh import Degrees

VAES: Mapping[str, Execution] = {
    "float32": Execution(tf32=False),
    "TF32": Execution(tf32=True),
    "bfloat16": Execution(vae_dtype="bfloat16"),
}
COMPILED_VAES: Mapping[str, Execution] = {
    "TF32, compiled": Execution(compile=True),
    "bfloat16, compiled": Execution(compile=True, vae_dtype="bfloat16"),
}
OFFLOADS: Mapping[str, Execution] = {
    "resident": Execution(),
    "offload group": Execution(offload="group"),
    "offload model": Execution(offload="model"),
}
SECONDS_TO_END = 5.0
"""That pytest gets to write its report before the phase is cut."""
PYTEST = """
import signal, sys, pytest
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background without it
sys.exit(pytest.main(sys.argv[1:]))
"""


def measure_rates(scope: Scope, record: Record) -> None:
    """Floors to compare with: products, attention, copies; and the planner's profile of this card."""
    device, dtype = scope.torch_device, scope.torch_dtype
    config = scope.checkpoint.transformer
    tokens = stage_tokens(scope)
    with fps_rates.tf32(False):
        record.update(matmul_flops_per_second={scope.dtype: fps_rates.matmul_rate(device, dtype)})
        record.values["matmul_flops_per_second"]["float32"] = fps_rates.matmul_rate(device, torch.float32)
    with fps_rates.tf32(True):
        record.values["matmul_flops_per_second"]["TF32"] = fps_rates.matmul_rate(device, torch.float32)
    record.update()
    heads, head_dim = config.num_attention_heads, config.attention_head_dim
    rates = {str(each): fps_rates.attention_rate(device, dtype, each, heads, head_dim) for each in tokens}
    record.update(attention_flops_per_second_by_tokens=rates)
    record.update(copy_bytes_per_second=fps_rates.copy_bandwidth(device))
    record.update(to_host_bytes_per_second=fps_rates.host_bandwidth(device))
    try:
        record.values["matmul_flops_per_second"]["float8"] = fps_rates.fp8_matmul_rate(device)
    except (RuntimeError, NotImplementedError) as error:
        record.values["float8_error"] = str(error).splitlines()[0][:300]
    record.update()
    for name, rate in record.values["matmul_flops_per_second"].items():
        print(f"  {name} product: {rate / 1e12:.3g} TFLOP/s")
    print(f"  copy: {record.values['copy_bytes_per_second'] / 1e12:.3g} TB/s", flush=True)
    measure_profile(scope, record)


def stage_tokens(scope: Scope) -> list[int]:
    """Tokens of each pyramid stage."""
    return [sum(lengths) for lengths in segment_lengths(scope.request("distilled-111"), scope.checkpoint)]


def measure_vae(scope: Scope, record: Record) -> None:
    """Decoding of a chunk in each dtype, and how far its frames are from those of float32.

    Those that need no time to compile take turns first, then the others.
    """
    prepare_compiler(scope, record)
    device, size = scope.torch_device, full_size.size_of(scope.checkpoint)
    rows, columns = (pixels // VAE_SPATIAL for pixels in size.video)
    latents = torch.randn(1, size.vae.z_dim, 9, rows, columns, device=device)
    flops = decode_flops(size.vae, latents.shape[2], rows, columns)
    record.update(flops=flops, size=size.video, decodes={}, errors={})
    reference: torch.Tensor | None = None
    for executions in (VAES, COMPILED_VAES):
        programs = {}
        for name, execution in executions.items():
            try:
                # Beside a small transformer, which is not run.
                codec = scope.build(execution, transformer=full_size.SIZES["tiny"].transformer).codec
                programs[name] = functools.partial(_decode, codec, latents)
                values, frames = _first_decodes(programs[name], device)
            except Exception as error:
                programs.pop(name, None)
                record.values["errors"][name] = one_line(error)
                record.update()
                continue
            reference = frames if reference is None else reference
            off = (frames.int() - reference.int()).abs().float()
            values["grey_levels_from_float32"] = {"mean": off.mean().item(), "most": off.max().item()}
            record.values["decodes"][name] = values
            record.update()
        for name, timing in interleave(programs, repeats=scope.chunks, device=device, warmup=1).items():
            record.values["decodes"][name] |= {**timing.to_json(), "flops_per_second": flops / timing.median}
            print(f"  {name}: {timing.median:.3f} s, {flops / timing.median / 1e12:.3g} TFLOP/s", flush=True)
        record.update()


def _first_decodes(program: Callable[[], torch.Tensor], device: torch.device) -> tuple[dict[str, Any], torch.Tensor]:
    """Seconds of the first, with compiling; the peak of memory of the second, and its frames on the host."""
    start = time.perf_counter()
    program().cpu()
    seconds = time.perf_counter() - start
    reset_peak_memory(device)
    before = allocated_memory(device)
    frames = program().cpu()
    return {"first_seconds": seconds, "peak_bytes": peak_memory(device) - before}, frames


@torch.no_grad()
def _decode(codec: Codec, latents: torch.Tensor) -> torch.Tensor:
    return codec.decode(latents, "uint8")


def measure_share(scope: Scope, record: Record) -> None:
    """One rank's part of P = 1, 2, 4, 8 without communication, and how near the planner comes to it."""
    record.update(shares={})
    base = scope.build()
    measured: dict[Degrees, Share] = {}

    def write(ranks: int, values: dict[str, Any]) -> None:
        record.values["shares"][str(ranks)] = values
        record.update()
        forwards = tuple(each["seconds"] for each in values["stages"])
        measured[Degrees(**values["degrees"])] = Share(forwards, values["decode_seconds"])
        seconds = ", ".join(f"{each['seconds']:.3f}" for each in values["stages"])
        print(f"  P = {ranks}: forwards {seconds} s, decode {values['decode_seconds']:.3f} s", flush=True)

    measure_shares(scope.checkpoint, base, scope.torch_dtype, scope.chunks, write)
    fit_profile(scope, record, measured)


def measure_memory(scope: Scope, record: Record) -> None:
    """Peak memory of a steady chunk, as the allocator and as the driver counts it, resident and with offload."""
    device = scope.torch_device
    record.update(peaks={}, errors={})
    for name, execution in OFFLOADS.items():
        try:
            record.values["peaks"][name] = _chunk_memory(scope, execution)
            peak = record.values["peaks"][name]
            print(f"  {name}: {peak['driver_bytes'] / 1e9:.2f} GB, {peak['chunk_seconds']:.2f} s a chunk", flush=True)
        except Exception as error:
            record.values["errors"][name] = one_line(error)
            print(f"  {name}: {record.values['errors'][name]}", flush=True)
        record.update()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _chunk_memory(scope: Scope, execution: Execution) -> dict[str, float]:
    """Of the second chunk at [2, 2, 2]. The driver also counts the CUDA context and what the allocator keeps."""
    device = scope.torch_device
    pipeline = scope.build(execution)
    request = scope.request("distilled-222", 33 * 3)
    inputs = full_size.random_inputs(scope.checkpoint, request, scope.torch_dtype)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    reset_peak_memory(device)
    before = allocated_memory(device)
    with tempfile.TemporaryDirectory() as folder:
        video = OurVideo(pipeline, request, inputs, Path(folder) / "video.mp4")
        video.chunk()
        times, _ = video.chunk()
        video.close()
    values = {"at_rest_bytes": before, "peak_bytes": peak_memory(device), "chunk_seconds": times.total}
    values["driver_bytes"] = values["peak_bytes"]
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        others = total - free - torch.cuda.memory_reserved(device)
        values["driver_bytes"] = others + torch.cuda.max_memory_reserved(device)
    return values


def run_tests(scope: Scope, record: Record) -> None:
    """`pytest -m gpu` in the time that is left; its output goes to a file beside the results.

    Raises `RuntimeError` where a test fails, a file cannot be imported, or no test has been run on a card.
    """
    log = record.path.with_suffix(".log")
    with tempfile.TemporaryDirectory() as folder, log.open("w") as output:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-c", PYTEST, "-m", "gpu", "-rfEs", "--continue-on-collection-errors"]
        command += ["--junitxml", str(report), *scope.tests]
        record.update(command=command, log=log.name)
        process = subprocess.Popen(command, cwd=CHECKOUT, stdout=output, stderr=subprocess.STDOUT)
        stop = record.deadline - time.monotonic() - SECONDS_TO_END
        try:
            code = process.wait(None if stop == math.inf else max(stop, 0.0))
        except subprocess.TimeoutExpired:
            code = end_pytest(process)
        counts = {name: 0 for name in ("tests", "failures", "errors", "skipped")}
        for suite in _suites(report):
            counts |= {name: counts[name] + int(suite.get(name, 0)) for name in counts}
    record.update(exit_code=code, **counts, tail=log.read_text()[-3000:])
    print(f"  {counts}")
    if code != 0:
        raise RuntimeError(f"pytest ended with exit code {code}, see {log.name}")
    if scope.device != "cpu" and counts["tests"] == counts["skipped"]:
        raise RuntimeError(f"no test was run: {counts['skipped']} were skipped, see {log.name}")


def _suites(report: Path) -> list[ElementTree.Element]:
    """None where pytest was made to end before its report was whole."""
    try:
        return list(ElementTree.parse(report).getroot().iter("testsuite"))
    except (FileNotFoundError, ElementTree.ParseError):
        return []


def end_pytest(process: subprocess.Popen) -> int:
    """The exit code of `PYTEST`. Asked to end it still writes what it has found; if it does not end, it is made to."""
    process.send_signal(signal.SIGINT)
    try:
        return process.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def gpu_test_files() -> tuple[str, ...]:
    """Files with a test that needs a GPU."""
    files = sorted((CHECKOUT / "tests").rglob("test_*.py"))
    return tuple(str(path.relative_to(CHECKOUT)) for path in files if "mark.gpu" in path.read_text(encoding="utf-8"))


PHASES = (
    Phase("gpu_rates", 40, measure_rates),
    Phase("gpu_fps_eager", 55, measure_fps_eager),
    Phase("gpu_fps", 160, functools.partial(measure_fps, variants=COMPILED)),
    Phase("gpu_fps_fp8", 60, functools.partial(measure_fps, variants=FP8, with_peer=False), needs=("torchao",)),
    Phase("gpu_vae", 45, measure_vae),
    Phase("gpu_memory", 55, measure_memory),
    Phase("gpu_share", 35, measure_share),
    Phase("gpu_fps_graphs", 30, functools.partial(measure_fps, variants=GRAPHS, with_peer=False)),
    Phase("gpu_tests", 30, run_tests),
)
