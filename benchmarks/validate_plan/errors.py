"""How far the planner's seconds of a chunk are from measured ones: errors by layout and kind, and its choices."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from benchmarks.validate_plan.ranks import ChunkTimes, as_json
from helios_cp.config.layout import Layout
from helios_cp.plan.predict import Prediction


@dataclass(frozen=True)
class Comparison:
    """Of one case in one layout."""

    case: str
    layout: Layout
    modelled: Prediction
    measured: ChunkTimes

    @property
    def seconds(self) -> float:
        """Measured, a chunk."""
        return statistics.median(self.measured.seconds)

    @property
    def error(self) -> float:
        """Relative: +0.1 is a tenth too long."""
        return relative_error(self.modelled.interval, self.seconds)

    @property
    def decode(self) -> float:
        """Measured seconds of decoding, a chunk."""
        return statistics.median(stages["decode"] for stages in self.measured.stages)

    def to_json(self) -> dict[str, Any]:
        return {
            "case": self.case,
            "layout": asdict(self.layout),
            "modelled_seconds": self.modelled.interval,
            "measured_seconds": self.seconds,
            "error": self.error,
            "modelled_parts": dict(self.modelled.seconds),
            "measured_decode_seconds": self.decode,
            "measured": as_json(self.measured),
        }


def relative_error(modelled: float, measured: float) -> float:
    """Raises `ValueError` unless something was measured."""
    if not measured > 0:
        raise ValueError(f"measured {measured:g} s: more than 0 is needed to tell an error")
    return modelled / measured - 1


def median_error(comparisons: Sequence[Comparison]) -> float:
    """Median of the sizes of the errors, whichever way they go."""
    return statistics.median(abs(each.error) for each in comparisons)


def kind_of(layout: Layout) -> str:
    """What in a layout is hardest to predict."""
    degrees = layout.degrees
    kinds = {
        "sharded weights": layout.shard_weights,
        "split VAE": degrees.vae > 1,
        "ffn-tp": degrees.ffn_tp > 1,
        "ring": degrees.ring > 1,
        "ulysses": degrees.ulysses > 1,
        "cfg": degrees.cfg > 1,
    }
    return next((kind for kind, is_so in kinds.items() if is_so), "1 rank")


def by_kind(comparisons: Sequence[Comparison]) -> dict[str, list[Comparison]]:
    """In the order in which kinds first come."""
    kinds = dict.fromkeys(kind_of(each.layout) for each in comparisons)
    return {kind: [each for each in comparisons if kind_of(each.layout) == kind] for kind in kinds}


@dataclass(frozen=True)
class Choice:
    """Of one case: the layout that the planner takes for best, and the one that was. `lost` is the relative time that
    taking the first one costs."""

    case: str
    taken: Layout
    best: Layout
    lost: float

    @property
    def sentence(self) -> str:
        if self.taken == self.best:
            return f"{self.case}: {layout_name(self.best)} is taken, and was the best"
        return (
            f"{self.case}: {layout_name(self.taken)} is taken, {layout_name(self.best)} was the best; it costs "
            f"{self.lost:.1%}"
        )

    def to_json(self) -> dict[str, Any]:
        return {"case": self.case, "taken": asdict(self.taken), "best": asdict(self.best), "lost": self.lost}


def best_layouts(comparisons: Sequence[Comparison]) -> list[Choice]:
    """Whether the planner picks the best layout of each case."""
    found = []
    for case in dict.fromkeys(each.case for each in comparisons):
        own = [each for each in comparisons if each.case == case]
        taken = min(own, key=lambda each: each.modelled.interval)
        best = min(own, key=lambda each: each.seconds)
        found.append(Choice(case, taken.layout, best.layout, taken.seconds / best.seconds - 1))
    return found


def layout_name(layout: Layout) -> str:
    degrees = vars(layout.degrees)
    parts = [f"{name.replace('_', '-')} {degree}" for name, degree in degrees.items() if degree > 1]
    return ", ".join([*parts, *(["shard-weights"] if layout.shard_weights else [])]) or "1 rank"


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    table = Table(title="Seconds of a chunk", title_justify="left")
    table.add_column("model and size", no_wrap=True)
    table.add_column("layout", no_wrap=True)
    for heading in ("modelled", "measured", "error", "VAE modelled", "VAE measured"):
        table.add_column(heading, justify="right")
    before = None
    for each in comparisons:
        if before not in (None, each.case):
            table.add_section()
        table.add_row(
            each.case if each.case != before else "",
            layout_name(each.layout),
            f"{each.modelled.interval:.3f}",
            f"{each.seconds:.3f}",
            f"{each.error:+.1%}",
            f"{each.modelled.seconds['VAE']:.3f}",
            f"{each.decode:.3f}",
        )
        before = each.case
    return table


def kinds_table(comparisons: Sequence[Comparison]) -> Table:
    table = Table(title="Errors by kind of layout", title_justify="left")
    table.add_column("kind", no_wrap=True)
    for heading in ("layouts", "median of their sizes", "lowest", "highest"):
        table.add_column(heading, justify="right")
    for kind, found in by_kind(comparisons).items():
        errors = [each.error for each in found]
        table.add_row(kind, str(len(found)), f"{median_error(found):.1%}", f"{min(errors):+.1%}", f"{max(errors):+.1%}")
    return table
