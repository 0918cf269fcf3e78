"""What `launchers.status` shows of a pipeline, and the board where it finds that."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from launchers.driver.timeline import overlap
from launchers.schedule.terms import Stage

if TYPE_CHECKING:
    from launchers.driver.crew import Crew
    from launchers.driver.video import Video

NAMESPACE = "helios_cp"

RATE_SECONDS = 30.0
"""Over which chunks a second are counted."""

RECENT = 500
"""Events that the overlap is of."""


class StatusBoard:
    """Holds what the driver last said of its pipeline, for `launchers.status`."""

    def __init__(self) -> None:
        self._shown: dict[str, Any] = {}

    def show(self, values: dict[str, Any]) -> None:
        self._shown = values

    def read(self) -> dict[str, Any]:
        return self._shown


def put_up(name: str, node: str) -> Any:
    """A board on the driver's node, because no other node lives as long; a killed one comes back empty."""
    where = NodeAffinitySchedulingStrategy(node, soft=False)
    options = {"name": name, "namespace": NAMESPACE, "num_cpus": 0, "max_restarts": -1, "scheduling_strategy": where}
    return ray.remote(StatusBoard).options(**options).remote()


def picture(model: str, crew: Crew, videos: Mapping[int, Video], delivered: Iterable[float]) -> dict[str, Any]:
    """Workers and where they are, the queue, the videos, chunks a second, overlap.

    `delivered`: when a chunk was delivered, by `time.monotonic`.
    """
    in_hand: dict[str, list[str]] = {}
    for name, unit in crew.in_hand.values():
        in_hand.setdefault(name, []).append(f"{unit.stage.value} of video {unit.video}, chunk {unit.chunk}")
    waiting = sum(not video.admitted.is_set() for video in videos.values())
    now = time.monotonic()
    return {
        "model": model,
        "workers": [
            {
                "name": worker.name,
                "state": crew.lacks.get(worker.name, worker.standing.value),
                "places": [f"{place.host}:{place.pid} on node {place.node[:8]}" for place in worker.places],
                "in hand": in_hand.get(worker.name, []),
            }
            for worker in crew.workers.values()
        ],
        "queue": {
            "videos waiting": waiting,
            "in hand": len(crew.in_hand),
            **{stage.value: crew.pool.waiting(stage) for stage in Stage},
        },
        "videos": {
            key: f"{video.ready} of {video.chunks} chunks, {'running' if video.admitted.is_set() else 'waiting'}"
            for key, video in videos.items()
        },
        "chunks per second": sum(now - then < RATE_SECONDS for then in delivered) / RATE_SECONDS,
        "overlap": overlap(list(crew.events)[-RECENT:]),
        "time": time.time(),
    }
