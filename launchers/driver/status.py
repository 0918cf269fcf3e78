"""What `launchers.status` shows of a pipeline."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from launchers.cluster.worker import Worker
from launchers.driver.timeline import Event, overlap
from launchers.driver.video import Video
from launchers.schedule.schedule import Schedule

RATE_SECONDS = 30.0
"""Over which chunks a second are counted."""

RECENT = 500
"""Events that the overlap is of."""


def picture(
    model: str,
    workers: Iterable[Worker],
    lacks: Mapping[str, str],
    schedule: Schedule,
    videos: Mapping[int, Video],
    events: Sequence[Event],
    delivered: Iterable[float],
) -> dict[str, Any]:
    """Workers and where they are, the queue, the videos, chunks a second, overlap.

    `lacks`: what a worker waits for, by name. `delivered`: when a chunk was delivered, by `time.monotonic`.
    """
    in_hand: dict[str, list[str]] = {}
    for task in schedule.tasks():
        in_hand.setdefault(task.worker, []).append(f"{task.stage.value} of video {task.video}, chunk {task.chunk}")
    now = time.monotonic()
    return {
        "model": model,
        "workers": [
            {
                "name": worker.name,
                "state": lacks.get(worker.name, worker.standing.value),
                "places": [f"{place.host}:{place.pid} on node {place.node[:8]}" for place in worker.places],
                "in hand": in_hand.get(worker.name, []),
            }
            for worker in workers
        ],
        "queue": schedule.queue(),
        "videos": {
            key: f"{video.ready} of {video.course.chunks} chunks, {schedule.status(key).value}"
            for key, video in videos.items()
        },
        "chunks per second": sum(now - then < RATE_SECONDS for then in delivered) / RATE_SECONDS,
        "overlap": overlap(list(events)[-RECENT:]),
        "time": time.time(),
    }
