"""How a forward scales over ranks of one thread each: time on 1 and 2 ranks, memory on 1, 2 and 4, and diffusers'.

python -m benchmarks.scaling        some minutes on two cores

The model has a fifth of the width of Helios-14B, and of its tokens at stage 3 of 384 × 640 (noisy, history and text)
about a quarter. Bytes per FLOP grow as the model shrinks, so that scaling is harder here than at full size.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.diffusers_parallel import REPAIRS
from benchmarks.machine import RESULTS, write_result
from benchmarks.scaling_ranks import Case, Times, count_flops, peak_bytes, peak_bytes_of_diffusers, time_ranks
from benchmarks.timing import Ratio, Timing, ratio
from helios_cp.arguments import OneLineParser, whole_number
from helios_cp.config import RequestError, TransformerConfig
from helios_cp.files import check_file_target
from parallel.mesh import Degrees
from tests.ranks import RankPool

CASE = Case(
    TransformerConfig(num_attention_heads=8, ffn_dim=2768, text_dim=820, num_layers=3), size=(256, 256), text_tokens=136
)
RANKS = 2
MEMORY_RANKS = (1, 2, 4)
WARMUP = 2
SECONDS_OF_TURN = 300  # a rank that takes longer for all programs once hangs
NOTES = (
    "Seconds of one forward, one thread a rank. Ours encodes text once per prompt and history once per chunk,",
    "outside of it (`python -m benchmarks.forward` times those). Programs take turns; ratios are taken turn by turn.",
    "At once: the one-rank forward on each core at the same time, without communication: the limit of this machine.",
    "CPU: seconds that rank 0 computed for, waiting aside; a busy machine disturbs them less.",
    "FLOPs: ours leaves out text, history and the last block's history rows, which weigh more in fewer blocks.",
    "Memory: peak bytes of the tensors that a forward makes on rank 0, counted.",
)


@dataclass(frozen=True)
class Speedup:
    """How many times faster one program is than another, and the least that it should be."""

    what: str
    ratio: Ratio
    goal: float | None = None

    def to_json(self) -> dict[str, Any]:
        met = None if self.goal is None else self.ratio.median >= self.goal
        return {**dataclasses.asdict(self.ratio), "goal": self.goal, "met": met}


Memory = dict[str, dict[int, int]]
"""Peak bytes by program and number of ranks."""


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="benchmarks.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=whole_number, default=11, metavar="N", help="timed turns (default: 11)")
    parser.add_argument("--layers", type=whole_number, default=3, metavar="N", help="of the model (default: 3)")
    parser.add_argument(
        "--output",
        type=Path,
        default=RESULTS / "scaling.json",
        metavar="FILE",
        help="JSON to write (default: benchmarks/results/scaling.json)",
    )
    return parser


def main(arguments: list[str] | None = None, pool: RankPool | None = None) -> int:
    """`pool` are ranks that run already; without it they are started, and ended."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        check_file_target("--output", options.output, ".json")
    except RequestError as error:
        parser.error(str(error))
    for name, least in (("repeats", 2), ("layers", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} {getattr(options, name)}: must be {least} or more")
    case = dataclasses.replace(CASE, config=dataclasses.replace(CASE.config, num_layers=options.layers))
    flops = count_flops(case)
    console = Console()
    with contextlib.nullcontext(pool) if pool else contextlib.closing(RankPool()) as ranks:
        memory = measure_memory(ranks, case)
        console.print(memory_table(memory))
        load = [os.getloadavg()]
        times = measure_times(ranks, case, options.repeats)
        load.append(os.getloadavg())
    speedups = compare(times.timings)
    console.print(times_table(case, times), speedups_table(speedups))
    console.print(*NOTES, sep="\n", style="dim")
    console.print("GFLOP of a forward: " + ", ".join(f"{name} {value / 1e9:.1f}" for name, value in flops.items()))
    console.print(f"load before and after: {load[0][0]:.1f}, {load[1][0]:.1f}; one core a rank: {times.is_pinned}")
    results = {
        "case": dataclasses.asdict(case),
        "dtype": "float32",
        "threads a rank": 1,
        "one core a rank": times.is_pinned,
        "load before and after": load,
        "notes": NOTES,
        "repairs of diffusers": REPAIRS,
        "times": {name: timing.to_json() for name, timing in times.timings.items()},
        "CPU seconds": times.cpu_seconds,
        "FLOPs": flops,
        "differences": times.differences,
        "speedups": {speedup.what.strip(): speedup.to_json() for speedup in speedups},
        "memory": memory,
    }
    path = write_result(options.output.stem, results, options.output.parent)
    console.print(f"written to {path}", style="dim", soft_wrap=True)
    return 0


def measure_times(pool: RankPool, case: Case, repeats: int) -> Times:
    """As rank 0 sees them; every program ends when all ranks have ended it."""
    timeout = SECONDS_OF_TURN * (repeats + WARMUP + 2)
    return pool.run(time_ranks, case, RANKS, repeats, WARMUP, ranks=RANKS, timeout=timeout)[0]


def measure_memory(pool: RankPool, case: Case) -> Memory:
    memory: Memory = {"diffusers": {}, "ours, Ulysses": {}, "ours, ring": {}}
    for ranks in MEMORY_RANKS:
        options = {"ranks": ranks, "timeout": SECONDS_OF_TURN}
        memory["diffusers"][ranks] = pool.run(peak_bytes_of_diffusers, case, ranks, **options)[0]
        memory["ours, Ulysses"][ranks] = pool.run(peak_bytes, case, Degrees(ulysses=ranks), **options)[0]
        memory["ours, ring"][ranks] = pool.run(peak_bytes, case, Degrees(ring=ranks), **options)[0]
    return memory


def compare(timings: dict[str, Timing]) -> list[Speedup]:
    def faster(slow: str, fast: str) -> Ratio:
        return ratio(timings[slow], timings[fast])

    def times(factor: float, of: Ratio) -> Ratio:
        low, high = of.quartiles
        return Ratio(factor * of.median, (factor * low, factor * high))

    ours, theirs = "ours, 1 rank", "diffusers, 1 rank"
    ours_split, theirs_split = f"ours, Ulysses {RANKS}", f"diffusers, Ulysses {RANKS}"
    at_once = f"ours, {RANKS} at once"
    return [
        Speedup(f"ours, Ulysses {RANKS} over 1 rank", faster(ours, ours_split), goal=1.9),
        Speedup(f"ours, ring {RANKS} over 1 rank", faster(ours, f"ours, ring {RANKS}")),
        Speedup(f"  limit of this machine, {RANKS} at once", times(RANKS, faster(ours, at_once))),
        Speedup(f"  ours, Ulysses {RANKS}, of that limit", times(1 / RANKS, faster(at_once, ours_split))),
        Speedup(f"diffusers, Ulysses {RANKS} over 1 rank", faster(theirs, theirs_split)),
        Speedup("ours over diffusers, 1 rank", faster(theirs, ours), goal=1.0),
        Speedup(f"ours over diffusers, Ulysses {RANKS}", faster(theirs_split, ours_split), goal=1.15),
    ]


def times_table(case: Case, times: Times) -> Table:
    config = case.config
    title = (
        f"{config.num_layers} blocks × {config.num_attention_heads} heads × {config.attention_head_dim}, "
        f"{case.size[0]} × {case.size[1]}, float32, timed"
    )
    table = Table(title=title, title_justify="left")
    for heading in ("", "median s", "quartiles s", "fastest s", "CPU s"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, timing in times.timings.items():
        low, high = timing.quartiles
        seconds = (f"{timing.median:.3f}", f"{low:.3f}–{high:.3f}", f"{min(timing.seconds):.3f}")
        table.add_row(name, *seconds, f"{times.cpu_seconds[name]:.3f}")
    return table


def speedups_table(speedups: list[Speedup]) -> Table:
    table = Table("", title="Times faster", title_justify="left")
    for heading in ("median", "quartiles", "goal"):
        table.add_column(heading, justify="right", no_wrap=True)
    for speedup in speedups:
        (low, high), goal = speedup.ratio.quartiles, speedup.goal
        met = "" if goal is None else f"{goal:g} {'met' if speedup.ratio.median >= goal else 'MISSED'}"
        table.add_row(speedup.what, f"{speedup.ratio.median:.2f}", f"{low:.2f}–{high:.2f}", met)
    return table


def memory_table(memory: Memory) -> Table:
    table = Table("", title="Peak MiB that a forward makes on a rank (of one rank)", title_justify="left")
    for ranks in MEMORY_RANKS:
        table.add_column(f"{ranks} rank{'s' * (ranks > 1)}", justify="right", no_wrap=True)
    for name, peaks in memory.items():
        table.add_row(name, *(f"{peak / 2**20:.1f} ({peak / peaks[1]:.2f})" for peak in peaks.values()))
    return table


if __name__ == "__main__":
    sys.exit(main())
