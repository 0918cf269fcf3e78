"""What one world of ranks measured: each program's time, efficiency, bytes and memory, and the comparisons."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from benchmarks.measuring.timing import Ratio, Timing, ratio
from benchmarks.scaling.ranks import Times, layouts

# Of the default model on a CPU; a smaller one has more bytes to send for its FLOPs.
GOALS = {"ours, Ulysses 2 over 1 rank": 1.9, "ours over diffusers, 1 rank": 1.0, "ours over diffusers, Ulysses 2": 1.15}


@dataclass(frozen=True)
class Speedup:
    """How many times faster one program is than another, and the least that it should be."""

    what: str
    ratio: Ratio
    goal: float | None = None

    def to_json(self) -> dict[str, Any]:
        met = None if self.goal is None else self.ratio.median >= self.goal
        return {**dataclasses.asdict(self.ratio), "goal": self.goal, "met": met}


@dataclass(frozen=True)
class WorldTimes:
    """One world, as plain JSON values. By program, `times` as `Timing.to_json` and `efficiency` over one rank's."""

    ranks: int
    one_core_a_rank: bool
    load_before_and_after: list[float]
    times: dict[str, dict[str, Any]]
    cpu_seconds: dict[str, float]
    differences: dict[str, float]
    collectives: dict[str, int]
    sent_bytes: dict[str, float]
    peak_bytes: dict[str, int]
    efficiency: dict[str, float]
    of_limit: dict[str, float]
    speedups: dict[str, dict[str, Any]]

    @classmethod
    def of(
        cls,
        ranks: int,
        times: Times,
        traffic: Sequence[dict[str, tuple[int, int]]],
        peak_bytes: dict[str, int],
        load: list[float],
        goals: Mapping[str, float],
    ) -> WorldTimes:
        """From what rank 0 measured and the `traffic` of every rank."""
        timings = times.timings
        ours = ratio(timings["ours, 1 rank"], timings[at_once(ranks)]).median  # of one rank's rate, that each keeps
        efficiency = {
            name: ratio(timings[f"{name.split(',')[0]}, 1 rank"], timings[name]).median / ranks
            for name in split_programs(ranks)
        }
        return cls(
            ranks=ranks,
            one_core_a_rank=times.is_pinned,
            load_before_and_after=load,
            times={name: timing.to_json() for name, timing in timings.items()},
            cpu_seconds=times.cpu_seconds,
            differences=times.differences,
            collectives={name: times.traffic[name][0] for name in times.traffic},
            sent_bytes={name: sum(each[name][1] for each in traffic) / ranks for name in times.traffic},
            peak_bytes=peak_bytes,
            efficiency=efficiency,
            of_limit={name: value / ours for name, value in efficiency.items() if name.startswith("ours")},
            speedups={each.what: each.to_json() for each in compare(timings, ranks, goals)},
        )

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def at_once(ranks: int) -> str:
    return f"ours, {ranks} at once"


def split_programs(ranks: int) -> list[str]:
    return [f"diffusers, Ulysses {ranks}", *(f"ours, {name}" for name in layouts(ranks))]


def compare(timings: dict[str, Timing], ranks: int, goals: Mapping[str, float]) -> list[Speedup]:
    def faster(slow: str, fast: str, times: float = 1.0) -> Ratio:
        found = ratio(timings[slow], timings[fast])
        return Ratio(times * found.median, tuple(times * each for each in found.quartiles))

    ours, theirs = "ours, 1 rank", "diffusers, 1 rank"
    ours_split, theirs_split = f"ours, Ulysses {ranks}", f"diffusers, Ulysses {ranks}"
    found = {f"ours, {name} over 1 rank": faster(ours, f"ours, {name}") for name in layouts(ranks)}
    found |= {
        f"limit of this machine, {ranks} at once": faster(ours, at_once(ranks), ranks),
        f"ours, Ulysses {ranks}, of that limit": faster(at_once(ranks), ours_split, 1 / ranks),
        f"{theirs_split} over 1 rank": faster(theirs, theirs_split),
        "ours over diffusers, 1 rank": faster(theirs, ours),
        f"ours over diffusers, Ulysses {ranks}": faster(theirs_split, ours_split),
    }
    return [Speedup(what, value, goals.get(what)) for what, value in found.items()]


def world_table(world: WorldTimes) -> Table:
    cores = "one core each" if world.one_core_a_rank else "more than there are cores, or not pinned"
    table = Table("", title=f"{world.ranks} ranks, {cores}", title_justify="left")
    for heading in ("median s", "quartiles s", "CPU s", "efficiency", "of limit", "MB sent", "calls", "peak MiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, timing in world.times.items():
        low, high = timing["quartiles"]
        shares = (world.efficiency.get(name), world.of_limit.get(name))
        peak, calls = world.peak_bytes.get(name), world.collectives[name]
        table.add_row(
            name,
            f"{timing['median']:.3f}",
            f"{low:.3f}–{high:.3f}",
            f"{world.cpu_seconds[name]:.3f}",
            *("" if share is None else f"{share:.0%}" for share in shares),
            f"{world.sent_bytes[name] / 1e6:.1f}" if calls else "",
            str(calls) if calls else "",
            "" if peak is None else f"{peak / 2**20:.1f}",
        )
    return table


def speedups_table(world: WorldTimes) -> Table:
    table = Table("", title=f"Times faster, {world.ranks} ranks", title_justify="left")
    for heading in ("median", "quartiles", "goal"):
        table.add_column(heading, justify="right", no_wrap=True)
    for what, speedup in world.speedups.items():
        low, high = speedup["quartiles"]
        goal = "" if speedup["goal"] is None else f"{speedup['goal']:g} {'met' if speedup['met'] else 'MISSED'}"
        table.add_row(what, f"{speedup['median']:.2f}", f"{low:.2f}–{high:.2f}", goal)
    return table
