"""The live server on this machine: from prompt to picture, what it adds to a chunk, and how many may watch.

python -m benchmarks.live [--changes 30] [--viewers 1 10 50 100 200] [--queued 20]

The server is a process of its own; clients, and a player that plays in real time, are in this one. What the server adds
is measured twice: as the seconds from a chunk's being handed to the server until its last byte is with the client, and
as the difference of the seconds a chunk, of the server and of the pipeline alone, which take turns: both stand ready
all the time, and the one whose turn it is not has nothing to do.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
from typing import Any

from benchmarks.live import measures
from benchmarks.live.running import RunningServer
from benchmarks.measuring.machine import RESULTS, write_result
from helios_cp.config.paths import user_path
from helios_cp.config.request import Request
from launchers.cluster.cluster import connected
from launchers.driver.pipeline import ChunkPipeline

MODEL = "random-distilled"
STEPS = (1, 1, 1)
FLAGS = ["--model", MODEL, "--device", "cpu"]


def measure_added(server: RunningServer, session: dict[str, Any], chunks: int, turns: int) -> dict[str, Any]:
    """What the server and the network add to a chunk."""
    request = Request(**{**session, "prompt": (session["prompt"],)}, num_frames=33 * chunks)
    served, alone, late = [], [], []
    with connected("local", cpus=3), ChunkPipeline(MODEL) as pipeline:
        pipeline.wait_until_ready()
        for _ in range(turns):
            arrivals = asyncio.run(measures.served_chunks(server, session, chunks))
            served.append(measures.seconds_a_chunk([each.at for each in arrivals]))
            late += [each.seconds_after_ready for each in arrivals[measures.WARM_UP :]]
            alone.append(measures.alone(pipeline, request))
    return {
        "chunks": chunks,
        "served_seconds": served,
        "alone_seconds": alone,
        "difference": statistics.median(served) - statistics.median(alone),
        "from_ready_to_received": measures.percentiles(late),
    }


async def measure_live(
    server: RunningServer, session: dict[str, Any], changes: int, counts: list[int], queued: int, chunks: int
) -> dict[str, Any]:
    return {
        "prompt_to_picture": await measures.prompt_to_picture(server, session, changes),
        "viewers": await measures.viewers(server, session, counts),
        "load": await measures.load(server, session, max(counts), queued, chunks),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.live", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--changes", type=int, default=30, help="changes of prompt")
    parser.add_argument("--chunks", type=int, default=40, help="of a session that nobody paces; and under load")
    parser.add_argument("--turns", type=int, default=3, help="of the server and the pipeline alone")
    parser.add_argument("--viewers", type=int, nargs="+", default=[1, 10, 50, 100, 200], metavar="N")
    parser.add_argument("--queued", type=int, default=20, help="sessions that wait beside the most viewers")
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--output", type=user_path, default=RESULTS, metavar="DIR")
    arguments = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"
    arguments.output.mkdir(parents=True, exist_ok=True)
    session: dict[str, Any] = {"prompt": "a fox", "height": arguments.height, "width": arguments.width}
    session |= {"pyramid_num_inference_steps_list": STEPS, "fps": 24}
    results: dict[str, Any] = {"model": MODEL, "session": session, "load_before": os.getloadavg()[0]}
    with RunningServer(FLAGS) as server:
        counts, queued, chunks = arguments.viewers, arguments.queued, arguments.chunks
        results |= asyncio.run(measure_live(server, session, arguments.changes, counts, queued, chunks))
        results["added"] = measure_added(server, session, chunks, arguments.turns)
    results["load_after"] = os.getloadavg()[0]
    path = write_result("live", results, arguments.output)
    _tell(results)
    print(path)
    return 0


def _tell(results: dict[str, Any]) -> None:
    shown, added = results["prompt_to_picture"], results["added"]
    making = shown["chunk_seconds_of_making"]["p50"]
    print(f"a chunk: {shown['chunk_seconds_of_media']:.2f} s of media, made in {making:.2f} s")
    for name, what in (
        ("to_receipt", "the receipt"),
        ("to_bytes", "the first chunk that shows it"),
        ("to_frame", "its first frame, decoded"),
        ("to_screen", "the screen"),
    ):
        print(f"from a prompt to {what}: p50 {shown[name]['p50']:.2f} s, p95 {shown[name]['p95']:.2f} s")
    ready = added["from_ready_to_received"]
    print(
        f"server and network: {1000 * ready['p50']:.1f} ms a chunk (p95 {1000 * ready['p95']:.1f}); seconds a chunk "
        f"{1000 * added['difference']:+.1f} ms beside the pipeline alone"
    )
    for row in results["viewers"]:
        print(
            f"{row['viewers']} viewers: a chunk comes after {1000 * row['late']['p50']:.0f} ms (p95 "
            f"{1000 * row['late']['p95']:.0f}), {row['memory_a_viewer'] / 1000:.0f} kB each"
        )
    load = results["load"]
    print(
        f"{load['viewers']} viewers and {load['queued']} waiting sessions: at most {load['most_behind']} chunk(s) "
        f"behind; {load['memory_begin'] / 1e6:.1f} MB of the server, {load['memory_end'] / 1e6:.1f} MB after "
        f"{load['chunks']} chunks"
    )


if __name__ == "__main__":
    sys.exit(main())
