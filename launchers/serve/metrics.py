"""Figures for Prometheus: what is counted as it happens, and what is looked at when somebody asks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120)
"""Upper edges of buckets. A chunk lasts 1.4 s."""

MOST_WAITING = 10_000
"""Changes of prompt that no chunk has shown yet; older ones are not measured."""

CONTENT_TYPE = CONTENT_TYPE_LATEST


@dataclass(frozen=True)
class Now:
    """What a server looks like at the moment.

    Sessions and videos by state; connections; seconds of media that are made and not yet played by the controller, the
    most of any session; chunks that a viewer is behind, the most of any; how often each worker was replaced.
    """

    sessions: Mapping[str, int] = field(default_factory=dict)
    videos: Mapping[str, int] = field(default_factory=dict)
    viewers: int = 0
    queue: int = 0
    lead_seconds: float = 0.0
    lag_chunks: int = 0
    restarts: Mapping[str, int] = field(default_factory=dict)
    is_ready: bool = False


class Metrics(Collector):
    """One server's, in a registry of its own. `look` says what the server looks like."""

    def __init__(self, look: Callable[[], Now] = Now) -> None:
        self._look = look
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self._stages = Histogram(
            "helios_chunk_seconds", "Seconds of a stage for a chunk", ["stage"], buckets=SECONDS, registry=self.registry
        )
        self._fps = Gauge(
            "helios_generation_fps", "Frames a second of making, of the newest live chunk", registry=self.registry
        )
        self._shown = Histogram(
            "helios_prompt_to_picture_seconds",
            "From a change of prompt to the first chunk that shows it, ready to be sent",
            buckets=SECONDS,
            registry=self.registry,
        )
        self._waiting: OrderedDict[tuple[str, str], float] = OrderedDict()

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def made(self, stages: Mapping[str, float], fps: float | None = None) -> None:
        """A chunk is ready: seconds by stage, and frames a second of making."""
        for stage, seconds in stages.items():
            self._stages.labels(stage).observe(seconds)
        if fps is not None:
            self._fps.set(fps)

    def received(self, session: str, event: str, now: float) -> None:
        """A change of prompt was received, at a time of a monotonic clock."""
        self._waiting[session, event] = now
        if len(self._waiting) > MOST_WAITING:
            self._waiting.popitem(last=False)

    def shown(self, session: str, events: Iterable[str], now: float) -> None:
        """A chunk that shows these changes is ready."""
        for event in events:
            begin = self._waiting.pop((session, event), None)
            if begin is not None:
                self._shown.observe(now - begin)

    def describe(self) -> Iterable[Metric]:
        """Nothing is looked at before somebody asks."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Gauges of `Now`."""
        now = self._look()
        yield _by_label(GaugeMetricFamily("helios_sessions", "Sessions by state", labels=["state"]), now.sessions)
        videos = GaugeMetricFamily("helios_videos", "Videos of the Videos API by status", labels=["status"])
        yield _by_label(videos, now.videos)
        restarts = CounterMetricFamily("helios_worker_restarts", "How often a worker was replaced", labels=["worker"])
        yield _by_label(restarts, now.restarts)
        for name, about, value in (
            ("helios_viewers", "Connections to sessions", now.viewers),
            ("helios_queue_length", "Sessions that wait", now.queue),
            (
                "helios_lead_seconds",
                "Media made ahead of the controller's player, the most of any session",
                now.lead_seconds,
            ),
            ("helios_lag_chunks", "Chunks that a viewer is behind, the most of any", now.lag_chunks),
            ("helios_ready", "Whether the server takes sessions", float(now.is_ready)),
        ):
            yield GaugeMetricFamily(name, about, value)


def _by_label(family: Metric, values: Mapping[str, float]) -> Metric:
    for key, value in values.items():
        family.add_metric([key], value)
    return family
