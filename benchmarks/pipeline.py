"""The chunk pipeline on Ray: overlap of denoising and decoding, Ray's own cost a chunk, memory over many requests.

python -m benchmarks.pipeline [--requests 200]

Steps are chosen so that denoising a chunk takes about as long as decoding and encoding it. The serial figure is of the
same pipeline with one undelivered chunk a video, so that no chunk is begun before the last is written.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.machine import RESULTS, write_result
from helios_cp.config import Request
from launchers.cluster import connected
from launchers.pipeline import ChunkPipeline
from launchers.schedule import Limits
from launchers.timeline import Event, draw, overlap

MODEL = "tiny-distilled"
CALIBRATIONS = 3
"""Trials by which the number of steps is found."""

CHUNKS = 24
WARM_UP = 4
"""Chunks at either end that are left out of the steady state."""


def stage_seconds(events: list[Event], stage: str) -> float:
    return statistics.median(event.end - event.begin for event in events if event.stage == stage)


def steady_seconds(events: list[Event]) -> float:
    """Seconds a chunk between the ends of writing, without the warm-up at either end."""
    ends = sorted(event.end for event in events if event.stage == "write")[WARM_UP:-WARM_UP]
    return statistics.median(later - earlier for earlier, later in pairwise(ends))


def run_video(pipeline: ChunkPipeline, request: Request, folder: Path | None) -> list[Event]:
    """The events of one video; without a folder latents only."""
    before = len(pipeline.events)
    output = [folder / "video.mp4"] if folder else []
    pipeline.submit(request, output=output, decode=folder is not None).result()
    return list(pipeline.events)[before:]


def make_request(steps: int, chunks: int) -> Request:
    return Request(
        prompt=("a fox",),
        height=128,
        width=192,
        num_frames=33 * chunks,
        pyramid_num_inference_steps_list=(steps,) * 3,
        is_amplify_first_chunk=False,
    )


def measure_overlap(folder: Path, picture: Path) -> dict[str, Any]:
    """Pipelined and serial seconds a chunk in one run, and the picture of the pipelined one."""
    with ChunkPipeline(MODEL, limits=Limits(undelivered=3)) as pipeline:
        pipeline.wait_until_ready()
        steps = 2
        for _ in range(CALIBRATIONS):
            trial = make_request(steps, 8)
            events = run_video(pipeline, trial, folder)
            steps = max(1, round(steps * stage_seconds(events, "decode") / stage_seconds(events, "denoise")))
        request = make_request(steps, CHUNKS)
        pipelined = run_video(pipeline, request, folder)
        draw(pipelined, picture)
    with ChunkPipeline(MODEL, limits=Limits(undelivered=1)) as pipeline:
        pipeline.wait_until_ready()
        run_video(pipeline, trial, folder)
        serial = run_video(pipeline, request, folder)
    denoise, decode = stage_seconds(pipelined, "denoise"), stage_seconds(pipelined, "decode")
    steady = steady_seconds(pipelined)
    return {
        "steps": steps,
        "denoise_seconds": denoise,
        "decode_seconds": decode,
        "pipelined_seconds": steady,
        "pipelined_to_slower_stage": steady / max(denoise, decode),
        "overlap": overlap(pipelined),
        "serial_seconds": steady_seconds(serial),
        "serial_denoise_seconds": stage_seconds(serial, "denoise"),
        "serial_decode_seconds": stage_seconds(serial, "decode"),
    }


def measure_overhead() -> dict[str, float]:
    """Time between the end of one chunk's denoising and the beginning of the next, in one video of latents only."""
    request = Request(
        prompt=("a fox",), height=64, width=64, num_frames=33 * 200, pyramid_num_inference_steps_list=(1, 1, 1)
    )
    with ChunkPipeline(MODEL) as pipeline:
        pipeline.wait_until_ready()
        events = [event for event in run_video(pipeline, request, None) if event.stage == "denoise"]
    gaps = [later.begin - earlier.end for earlier, later in pairwise(events)]
    quartiles = statistics.quantiles(gaps, n=4)
    return {"median_seconds": quartiles[1], "lower_quartile": quartiles[0], "upper_quartile": quartiles[2]}


def private_bytes(pid: int) -> int:
    """Memory that a process shares with no other."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))


def measure_memory(requests: int, folder: Path) -> dict[str, Any]:
    """Private bytes of the driver and each worker, at the quarters of many short videos, a tenth of them cancelled."""
    request = Request(prompt=("a fox",), height=64, width=64, num_frames=33, pyramid_num_inference_steps_list=(1, 1, 1))
    with ChunkPipeline(MODEL) as pipeline:
        pipeline.wait_until_ready()
        pids = {"driver": os.getpid()} | {name: worker.places[0].pid for name, worker in pipeline.workers.items()}
        samples = []
        for number in range(requests + 1):
            if number % (requests // 4) == 0:
                samples.append({name: private_bytes(pid) for name, pid in pids.items()})
            handle = pipeline.submit(request, output=[folder / "short.mp4"])
            if number % 10 == 9:
                handle.cancel()
                continue
            handle.result()
    growth = {name: samples[-1][name] / samples[1][name] - 1 for name in pids}
    return {"requests": requests, "private_bytes_at_quarters": samples, "growth_after_first_quarter": growth}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline", description=__doc__)
    parser.add_argument("--requests", type=int, default=200, help="short requests for the memory figure")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR")
    arguments = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"
    with TemporaryDirectory() as temporary, connected("local", cpus=3):
        arguments.output.mkdir(parents=True, exist_ok=True)
        results: dict[str, Any] = {"load_before": os.getloadavg()[0]}
        results["overlap"] = measure_overlap(Path(temporary), arguments.output / "pipeline.png")
        results["overhead"] = measure_overhead()
        results["memory"] = measure_memory(arguments.requests, Path(temporary))
        results["load_after"] = os.getloadavg()[0]
    path = write_result("pipeline", results, arguments.output)
    found = results["overlap"]
    print(
        f"denoise {found['denoise_seconds']:.3f} s, decode {found['decode_seconds']:.3f} s; pipelined "
        f"{found['pipelined_seconds']:.3f} s a chunk, {found['pipelined_to_slower_stage']:.2f} of the slower stage; "
        f"serial {found['serial_seconds']:.3f} s\n"
        f"Ray adds {1000 * results['overhead']['median_seconds']:.1f} ms a chunk\n"
        f"memory after {arguments.requests} requests against after {arguments.requests // 4}: "
        + ", ".join(f"{name} {100 * g:+.1f} %" for name, g in results["memory"]["growth_after_first_quarter"].items())
    )
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
