"""The measurements: prompt to picture, what the server adds to a chunk, viewers, load."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from benchmarks.live.clients import Arrival, Controller, controlling, seconds_to_decode, watchers
from benchmarks.live.running import RunningServer
from helios_cp.config.request import Request
from helios_cp.generate.run_folder import Run, RunFolder
from launchers.driver.pipeline import ChunkPipeline

WARM_UP = 3
"""Chunks that are left out."""

VIEWED_CHUNKS = 6
"""That each number of viewers is watched for."""


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Seconds: the median, and what 19 of 20 do not exceed."""
    ordered = sorted(values)
    return {
        "p50": statistics.median(ordered),
        "p95": ordered[min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))],
        "most": ordered[-1],
        "count": len(ordered),
    }


async def prompt_to_picture(server: RunningServer, session: dict[str, Any], changes: int) -> dict[str, Any]:
    """Changes of prompt at random moments, one at a time, of a session that a player watches in real time.

    `to_bytes`: from the sending of a change to the last byte of the first chunk that shows it; `to_frame`: until its
    first frame is decoded; `to_screen`: until the player, which has a chunk to play first, comes to it.
    """
    drawn = random.Random(0)
    bytes_, frames, screens, receipts = [], [], [], []
    async with controlling(server.url, **session) as controller:
        await controller.until(lambda: len(controller.arrivals) > WARM_UP)
        chunk = controller.arrivals[0].metadata["duration"]
        for number in range(changes):
            await asyncio.sleep(drawn.uniform(0, chunk))
            event, sent = f"change-{number}", time.time()
            change = {"event_id": event, "event": {"prompt": f"a fox, take {number}"}, "transition_chunks": 1}
            await controller.say("session.interaction", interaction=change)
            await controller.until(lambda event=event: event in controller.shown)
            arrival = controller.shown[event]
            wait = max(0.0, arrival.metadata["media_time"] - controller.position())
            receipts.append(controller.receipts[event]["at"] - sent)
            bytes_.append(arrival.at - sent)
            frames.append(bytes_[-1] + seconds_to_decode(controller.init, arrival.media))
            screens.append(bytes_[-1] + wait)
        made = [sum(each.metadata["seconds"].values()) for each in controller.arrivals[WARM_UP:]]
    return {
        "chunk_seconds_of_media": chunk,
        "chunk_seconds_of_making": percentiles(made),
        "to_receipt": percentiles(receipts),
        "to_bytes": percentiles(bytes_),
        "to_frame": percentiles(frames),
        "to_screen": percentiles(screens),
    }


async def served_chunks(server: RunningServer, session: dict[str, Any], chunks: int) -> list[Arrival]:
    """All chunks of a session whose player never makes the server wait."""
    frames = 33 * chunks
    async with controlling(server.url, hurries=True, **session, num_frames=frames, lead=16) as controller:
        await controller.until(lambda: controller.is_done)
        return controller.arrivals


def seconds_a_chunk(ends: Sequence[float]) -> float:
    """In the steady state."""
    steady = ends[WARM_UP:]
    return (steady[-1] - steady[0]) / (len(steady) - 1)


def alone(pipeline: ChunkPipeline, request: Request) -> float:
    """Seconds a chunk of the pipeline, which saves its chunks as a session's are saved."""
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "video.mp4"
        resolved = request.resolve(pipeline.checkpoint)
        run = RunFolder.create(
            Path(folder) / "run", Run(resolved, pipeline.checkpoint.source, "float32", (str(output),))
        )
        pipeline.submit(resolved, folder=run, output=[output], on_chunk=lambda _: ends.append(time.time())).result()
    return seconds_a_chunk(ends)


async def viewers(server: RunningServer, session: dict[str, Any], counts: Sequence[int]) -> list[dict[str, Any]]:
    """For each number of viewers: how late chunks come to them, and the memory that they take of the server."""
    found = []
    async with AsyncExitStack() as stack:
        controller = await stack.enter_async_context(controlling(server.url, **session))
        await controller.until(lambda: len(controller.arrivals) > WARM_UP)
        before = private_bytes(server.process.pid)
        watching: list[list[Arrival]] = []
        for count in counts:
            more = count - len(watching)
            watching += await stack.enter_async_context(watchers(server.url, controller.start, more))
            await _next_chunks(controller, 2)
            for arrivals in watching:
                arrivals.clear()
            await _next_chunks(controller, VIEWED_CHUNKS)
            late = [each.seconds_after_ready for arrivals in watching for each in arrivals]
            missing = sum(max(0, VIEWED_CHUNKS - 1 - len(arrivals)) for arrivals in watching)
            found.append(
                {
                    "viewers": count,
                    "late": percentiles(late),
                    "chunks_missing": missing,
                    "memory_a_viewer": max(0, private_bytes(server.process.pid) - before) / count,
                }
            )
    return found


async def load(server: RunningServer, session: dict[str, Any], count: int, queued: int, chunks: int) -> dict[str, Any]:
    """`count` viewers of a session, and `queued` sessions that wait for its place, for so many chunks.

    `most_behind`: chunks by which a viewer was behind the controller when a chunk came to that. `memory_begin` and
    `memory_end` are bytes of the server, once all are there and after the last chunk.
    """
    async with AsyncExitStack() as stack:
        controller = await stack.enter_async_context(controlling(server.url, **session))
        await controller.until(lambda: controller.arrivals)
        for _ in range(queued):
            await stack.enter_async_context(controlling(server.url, **session))
        watching = await stack.enter_async_context(watchers(server.url, controller.start, count))
        await controller.until(lambda: all(watching))
        await _next_chunks(controller, WARM_UP)
        begin, behind = private_bytes(server.process.pid), 0
        for _ in range(chunks):
            await _next_chunks(controller, 1)
            newest = controller.arrivals[-1].metadata["chunk"]
            behind = max(behind, *(newest - arrivals[-1].metadata["chunk"] for arrivals in watching))
        with urllib.request.urlopen(f"{server.url}/v1/sessions") as answer:
            states = [each["state"] for each in json.load(answer)["data"]]
        return {
            "viewers": count,
            "queued": states.count("queued"),
            "chunks": chunks,
            "most_behind": behind,
            "memory_begin": begin,
            "memory_end": private_bytes(server.process.pid),
        }


async def _next_chunks(controller: Controller, count: int) -> None:
    goal = len(controller.arrivals) + count
    await controller.until(lambda: len(controller.arrivals) >= goal)


def private_bytes(pid: int) -> int:
    """Memory that a process shares with no other."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))
