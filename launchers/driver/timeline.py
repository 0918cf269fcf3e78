"""Who worked when: the record of a pipeline's work, its figures, and its picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
    """The spans in order, with those that overlap joined."""
    merged: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((begin, end))
    return merged


def overlap(events: Sequence[Event]) -> float | None:
    """The share of decoding and writing that ran beside denoising: 1 if all of it did. `None` before any of it ran."""
    denoising = union((event.begin, event.end) for event in events if event.stage == "denoise")
    rest = union((event.begin, event.end) for event in events if event.stage in ("decode", "write"))
    whole = sum(end - begin for begin, end in rest)
    both = sum(max(0.0, min(end, stop) - max(begin, start)) for begin, end in rest for start, stop in denoising)
    return both / whole if whole else None


def draw(events: Sequence[Event], path: Path, places: dict[str, str] | None = None) -> None:
    """A picture of who worked when, one row a worker, one colour a video, chunks by number.

    Each bar lies where the clock of its worker's node puts it: rows of different nodes agree as well as their clocks
    do. `places` says on which node each worker runs. Raises `ValueError` without events and `ImportError` without
    matplotlib.
    """
    draw_runs({"": events}, path, places)


def draw_runs(runs: Mapping[str, Sequence[Event]], path: Path, places: dict[str, str] | None = None) -> None:
    """As `draw`, for several runs by name: one below the other on one scale of time."""
    from matplotlib.figure import Figure

    if not all(runs.values()):
        raise ValueError(f"{path}: there is nothing to draw, as no work was recorded")
    heights = [0.9 + 0.5 * len(_rows(events)) for events in runs.values()]
    figure = Figure(figsize=(12, 0.4 + sum(heights)), layout="constrained")
    panels = figure.subplots(len(runs), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (name, events) in zip(panels, runs.items(), strict=True):
        _fill(axes, events, places)
        share = overlap(events)
        parts = [name] if name else []
        if share is not None:
            parts.append(f"{share:.0%} of decoding and writing ran beside denoising")
        axes.set_title("; ".join(parts), fontsize=10)
    panels[-1].set_xlabel("seconds; one colour a video, numbers are chunks")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _rows(events: Sequence[Event]) -> list[tuple[str, str]]:
    """A row for each stage of each worker, in the order of a chunk's way."""
    order = ("text", "start", "denoise", "decode", "write")
    return sorted({(e.stage, e.worker) for e in events}, key=lambda row: (order.index(row[0]), row[1]))


def _fill(axes: Any, events: Sequence[Event], places: dict[str, str] | None) -> None:
    rows = _rows(events)
    start = min(event.begin for event in events)
    whole = max(event.end for event in events) - start
    for event in events:
        row = rows.index((event.stage, event.worker))
        length, colour = event.end - event.begin, f"C{event.video % 10}"
        edge = "white" if length > whole / 200 else colour  # a white edge would hide the shortest bars
        axes.barh(row, length, left=event.begin - start, color=colour, edgecolor=edge, linewidth=0.5)
        if event.stage in ("denoise", "decode"):
            middle = event.begin - start + length / 2
            axes.text(middle, row, str(event.chunk), ha="center", va="center", fontsize=7, color="white", clip_on=True)
    labels = [worker if worker == stage else f"{worker}: {stage}" for stage, worker in rows]
    if places:
        labels = [f"{label}\n{places[worker]}" for label, (_, worker) in zip(labels, rows, strict=True)]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
