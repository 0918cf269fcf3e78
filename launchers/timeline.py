"""Who worked when: the record of a pipeline's work, its figures, and its picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Event:
    """A worker had one unit of work in hand from `begin` to `end`, in seconds by its node's clock."""

    worker: str
    stage: str
    video: int
    chunk: int
    begin: float
    end: float


def union(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same time as spans that do not overlap, in order."""
    merged: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((begin, end))
    return merged


def overlap(events: Sequence[Event]) -> float | None:
    """Which part of the time of decoding and writing passed beside denoising: 1 if it cost nothing, `None` if none."""
    denoising = union((event.begin, event.end) for event in events if event.stage == "denoise")
    rest = union((event.begin, event.end) for event in events if event.stage in ("decode", "write"))
    whole = sum(end - begin for begin, end in rest)
    both = sum(max(0.0, min(end, stop) - max(begin, start)) for begin, end in rest for start, stop in denoising)
    return both / whole if whole else None


def busy(events: Sequence[Event]) -> dict[str, float]:
    """Seconds in which each worker had something in hand."""
    workers = dict.fromkeys(event.worker for event in events)
    return {
        worker: sum(end - begin for begin, end in union((e.begin, e.end) for e in events if e.worker == worker))
        for worker in workers
    }


def draw(events: Sequence[Event], path: Path, places: dict[str, str] | None = None) -> None:
    """A picture of who worked when, one row a worker, one colour a video, chunks by number.

    `places` says on which node each worker runs. Raises `ValueError` without events and `ImportError` without
    matplotlib.
    """
    from matplotlib.figure import Figure

    if not events:
        raise ValueError(f"{path}: there is nothing to draw, as no work was recorded")
    order = {"text": 0, "start": 1, "denoise": 2, "decode": 3, "write": 4}
    rows = sorted({(order[e.stage], e.worker, e.stage) for e in events})
    start = min(event.begin for event in events)
    figure = Figure(figsize=(12, 1.2 + 0.5 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for event in events:
        row = rows.index((order[event.stage], event.worker, event.stage))
        length = event.end - event.begin
        axes.barh(row, length, left=event.begin - start, color=f"C{event.video % 10}", edgecolor="white", linewidth=0.5)
        if event.stage in ("denoise", "decode"):
            middle = event.begin - start + length / 2
            axes.text(middle, row, str(event.chunk), ha="center", va="center", fontsize=7, color="white", clip_on=True)
    labels = [f"{worker}: {stage}" + (f"\n{places[worker]}" if places else "") for _, worker, stage in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("seconds; one colour a video, numbers are chunks")
    share = overlap(events)
    if share is not None:
        axes.set_title(f"{share:.0%} of decoding and writing ran beside denoising", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
