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
from collections import Counter
from concurrent.futures import CancelledError
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.measuring.machine import RESULTS, write_result
from helios_cp.config.paths import user_path
from helios_cp.config.request import Request
from launchers.cluster.cluster import connected
from launchers.driver.handle import VideoHandle
from launchers.driver.pipeline import ChunkPipeline
from launchers.driver.timeline import Event, draw_runs, overlap
from launchers.schedule.terms import Limits

MODEL = "random-distilled"
CALIBRATIONS = 3
"""Trials by which the number of steps is found."""

STAGES = ("denoise", "decode", "write")

CHUNKS = 24
SAMPLE_EVERY = 5
"""Requests between two looks at the processes' memory."""

CANCELLED_OF_TEN, FAILING_OF_TEN = 9, 4
"""Which request of each ten."""

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


def hand_over_seconds(events: list[Event], stages: tuple[str, ...]) -> list[float]:
    """Of each chunk, what passed between the end of a stage and the beginning of the next, over the way to the chunk
    after: serialising, the object store, the schedule, the call."""
    spans = {(event.stage, event.chunk): event for event in events}
    chunks = sorted(chunk for stage, chunk in spans if stage == stages[0])
    found = []
    for chunk, following in pairwise(chunks):
        way = [spans[stage, chunk] for stage in stages] + [spans[stages[0], following]]
        found.append(sum(later.begin - earlier.end for earlier, later in pairwise(way)))
    return found


def quartiles(values: list[float]) -> dict[str, float]:
    lower, median, upper = statistics.quantiles(values, n=4)
    return {"median_seconds": median, "lower_quartile": lower, "upper_quartile": upper}


def measure_overlap(folder: Path, picture: Path) -> dict[str, Any]:
    """Pipelined and serial seconds a chunk in one run, and the picture of both."""
    with ChunkPipeline(MODEL, limits=Limits(undelivered=3)) as pipeline:
        pipeline.wait_until_ready()
        steps = 2
        for _ in range(CALIBRATIONS):
            trial = make_request(steps, 8)
            events = run_video(pipeline, trial, folder)
            steps = max(1, round(steps * stage_seconds(events, "decode") / stage_seconds(events, "denoise")))
        request = make_request(steps, CHUNKS)
        pipelined = run_video(pipeline, request, folder)
    with ChunkPipeline(MODEL, limits=Limits(undelivered=1)) as pipeline:
        pipeline.wait_until_ready()
        run_video(pipeline, make_request(steps, 2), folder)
        serial = run_video(pipeline, request, folder)
    draw_runs({"pipelined": pipelined, "one chunk after the other": serial}, picture)
    stages = {stage: stage_seconds(serial, stage) for stage in STAGES}
    steady = steady_seconds(pipelined)
    return {
        "steps": steps,
        "chunks": CHUNKS,
        "seconds_beside_each_other": {stage: stage_seconds(pipelined, stage) for stage in STAGES},
        "seconds_alone": stages,
        "pipelined_seconds": steady,
        "pipelined_to_slower_stage": steady / max(stages.values()),
        "overlap": overlap(pipelined),
        "serial_seconds": steady_seconds(serial),
        "serial_to_sum_of_stages": steady_seconds(serial) / sum(stages.values()),
        "serial_overlap": overlap(serial),
        "serial_three_hand_overs": quartiles(hand_over_seconds(serial, STAGES)),
    }


def measure_overhead() -> dict[str, float]:
    """What Ray adds to a chunk: between the end of its denoising and the beginning of the next one's, where the group
    has nothing else to do; in a video of latents only, for with decoding beside it the cores are not free for Ray."""
    request = Request(
        prompt=("a fox",), height=64, width=64, num_frames=33 * 200, pyramid_num_inference_steps_list=(1, 1, 1)
    )
    with ChunkPipeline(MODEL) as pipeline:
        pipeline.wait_until_ready()
        return quartiles(hand_over_seconds(run_video(pipeline, request, None), ("denoise",)))


def private_bytes(pid: int) -> int:
    """Memory that a process shares with no other."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))


def measure_memory(requests: int, folder: Path) -> dict[str, Any]:
    """Private bytes of the driver and each process of each worker over many short videos: of ten one is cancelled once
    its first chunk is there, and one fails inside a worker, as its picture is none.

    malloc returns memory in steps of some 30 MB now and then, so the level is told by medians: of the last half against
    the quarter before it. What comes before that is warming up.
    """
    request = Request(prompt=("a fox",), height=64, width=64, num_frames=33, pyramid_num_inference_steps_list=(1, 1, 1))
    long, picture = replace(request, num_frames=33 * 10), folder / "bad.png"
    picture.write_bytes(b"not a picture")
    outcomes = Counter()
    with ChunkPipeline(MODEL) as pipeline:
        pipeline.wait_until_ready()
        pids = {"driver": os.getpid()}
        for name, worker in pipeline.workers.items():
            numbered = len(worker.places) > 1
            pids |= {f"{name}.{i}" if numbered else name: place.pid for i, place in enumerate(worker.places)}
        samples: dict[str, list[int]] = {name: [] for name in pids}
        for number in range(requests + 1):
            if number % SAMPLE_EVERY == 0:
                for name, pid in pids.items():
                    samples[name].append(private_bytes(pid))
            if number % 10 == CANCELLED_OF_TEN:
                handle = pipeline.submit(long, output=[folder / "long.mp4"], stream=True)
                next(iter(handle))
                handle.cancel()
            elif number % 10 == FAILING_OF_TEN:
                handle = pipeline.submit(replace(request, image=str(picture)), output=[folder / "short.mp4"])
            else:
                handle = pipeline.submit(request, output=[folder / "short.mp4"])
            outcomes[outcome(handle)] += 1
    return {
        "requests": requests,
        "outcomes": dict(outcomes),
        "sampled_every": SAMPLE_EVERY,
        "private_bytes": samples,
        "growth": {name: growth(values) for name, values in samples.items()},
    }


def outcome(handle: VideoHandle) -> str:
    """How a video ended, once it has."""
    try:
        handle.result()
    except CancelledError:
        return "cancelled"
    except Exception:
        return "failed"
    return "finished"


def growth(values: list[int]) -> float:
    """Of the level, as a share, from the second quarter to the last half."""
    quarter = len(values) // 4
    return statistics.median(values[2 * quarter :]) / statistics.median(values[quarter : 2 * quarter]) - 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline", description=__doc__)
    parser.add_argument("--requests", type=int, default=200, help="short requests for the memory figure")
    parser.add_argument("--output", type=user_path, default=RESULTS, metavar="DIR")
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
    alone = found["seconds_alone"]
    print(
        f"alone: {', '.join(f'{stage} {seconds:.3f} s' for stage, seconds in alone.items())} a chunk\n"
        f"pipelined {found['pipelined_seconds']:.3f} s a chunk, {found['pipelined_to_slower_stage']:.2f} of the slower "
        f"stage; serial {found['serial_seconds']:.3f} s, {found['serial_to_sum_of_stages']:.2f} of the sum\n"
        f"Ray adds {1000 * results['overhead']['median_seconds']:.1f} ms a chunk\n"
        f"memory over {arguments.requests} requests, second quarter to last half: "
        + ", ".join(f"{name} {100 * grown:+.1f} %" for name, grown in results["memory"]["growth"].items())
    )
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
