"""Bytes and collectives of a forward of Helios-14B over 2, 3, 4 and 8 ranks: ours, and diffusers' context parallelism.

python -m benchmarks.communication       a few minutes on two cores

Every figure is counted in a run of that many gloo ranks, on the real token counts and a narrow model.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.communication.counts import NARROW, Count, counts_of_ours, counts_of_theirs
from benchmarks.measuring.output import add_output, write_output
from benchmarks.models.communication_formulas import DTYPE, Tokens
from benchmarks.models.diffusers_parallel import PEERS, REPAIRS
from benchmarks.models.forward_counts import SIZE
from benchmarks.models.models import STAGES
from benchmarks.ranks.pool import RankPool, exit_code
from helios_cp.config.arguments import OneLineParser
from helios_cp.config.checkpoint import TransformerConfig
from helios_cp.config.errors import RequestError
from helios_cp.device.device import dtype_name
from helios_cp.files.whole_files import check_file_target
from parallel.mesh import Degrees

FULL = TransformerConfig()
LAYOUTS = {
    2: (Degrees(ulysses=2), Degrees(ring=2), Degrees(ulysses=2, ffn_tp=2), Degrees(cfg=2)),
    3: (Degrees(ulysses=3), Degrees(ring=3)),
    4: (
        Degrees(ulysses=4),
        Degrees(ring=2, ulysses=2),
        Degrees(ring=4),
        Degrees(ulysses=4, ffn_tp=4),
        Degrees(cfg=2, ulysses=2),
    ),
    8: (
        Degrees(ulysses=8),
        Degrees(ring=2, ulysses=4),
        Degrees(ring=8),
        Degrees(ulysses=8, ffn_tp=8),
        Degrees(cfg=2, ulysses=4),
    ),
}
STAGE_OF_GOALS = 3
LESS_THAN_DIFFUSERS = {4: 3.7, 8: 6.5}  # goals: how many times fewer bytes Ulysses sends
ULYSSES_CALLS = 81  # goal: packed, over 40 blocks
NOTES = (
    "MB = 1e6 bytes that a rank sends to others, mean over ranks; calls: collectives that it takes part in.",
    "S tokens, N of them noisy, width D, P = U·R ranks a sequence, f = (P − 1)/P. Elements a rank and block:",
    "  diffusers 4SD/P · f + (2S + N)D · f",
    "  Ulysses 4SD/P · (U − 1)/U, ring 2SD/P · (R − 1), FFN tensor parallel over all ranks 2SD · f;",
    "  in the last block, where history asks nothing, 2S + 2N for Ulysses' 4S and N for the FFN's S.",
    "Ours gathers its output at the end, 64·N/P · (P − 1), and the two branches of CFG exchange theirs.",
    "CFG layouts do both branches of a step at once, the others one.",
    f"Counted on the real tokens with 2 and 3 blocks of width {NARROW.dim}; more blocks and width scale them, exactly.",
)

Counts = dict[int, dict[str, dict[int, Count | str]]]
"""By ranks, name of the layout and stage; in place of a count, why it cannot run."""


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="benchmarks.communication", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--ranks", type=int, nargs="+", choices=sorted(LAYOUTS), metavar="P", help="only these worlds (default: 2 4 8)"
    )
    add_output(parser, "communication")
    return parser


def main(arguments: list[str] | None = None, pool: RankPool | None = None) -> int:
    """Exit code 1 where a count is not what the formulas say, or a goal is missed.

    `pool` are ranks that run already; without it they are started, and ended.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        check_file_target("--output", options.output, ".json")
    except RequestError as error:
        parser.error(str(error))
    console = Console()
    with contextlib.nullcontext(pool) if pool else contextlib.closing(RankPool()) as ranks:
        counts = count_layouts(ranks, options.ranks or list(LAYOUTS), console)
    console.print(counts_table(counts))
    console.print(*NOTES, sep="\n", style="dim")
    unlike = unlike_predicted(counts)
    console.print("Not as predicted: " + "; ".join(unlike) if unlike else "All counts are as predicted, to the byte.")
    goals = check_goals(counts)
    for goal in goals:
        met = "met" if goal["met"] else "MISSED"
        console.print(f"{goal['what']}: {goal['found']:.4g} (goal: {goal['goal']:g}, {met})")
    path = write_output(options.output, to_json(counts, goals))
    console.print(f"written to {path}", style="dim", soft_wrap=True)
    return int(bool(unlike) or not all(goal["met"] for goal in goals))


def count_layouts(pool: RankPool, worlds: list[int], console: Console) -> Counts:
    counts: Counts = {}
    work = [(ranks, each) for ranks in sorted(set(worlds)) for each in (*PEERS, *LAYOUTS[ranks])]
    for ranks, each in track(work, "counting", console=console, transient=True):
        of_ranks = counts.setdefault(ranks, {})
        if isinstance(each, Degrees):
            of_ranks[name_of(each)] = counts_of_ours(pool, each, FULL, SIZE, STAGES)
        else:
            of_ranks[peer_name(each)] = counts_of_theirs(pool, ranks, FULL, SIZE, STAGES, each)
    return counts


def peer_name(peer: str) -> str:
    return "diffusers" if peer == PEERS[0] else f"diffusers, {peer}"


def name_of(degrees: Degrees) -> str:
    names = {"cfg": "CFG", "ulysses": "Ulysses", "ring": "ring", "ffn_tp": "FFN"}
    return " × ".join(f"{name} {getattr(degrees, key)}" for key, name in names.items() if getattr(degrees, key) > 1)


def counts_table(counts: Counts) -> Table:
    title = f"One forward of Helios-14B at {SIZE[0]} × {SIZE[1]}, {dtype_name(DTYPE)}: MB that a rank sends, counted"
    table = Table(title=title, title_justify="left")
    table.add_column("ranks: layout", no_wrap=True)
    for heading in (*(f"stage {stage}" for stage in STAGES), "of diffusers", "calls"):
        table.add_column(heading, justify="right", no_wrap=True)
    for ranks, plans in counts.items():
        theirs = next(plans[peer_name(peer)][STAGE_OF_GOALS] for peer in PEERS if runs(plans[peer_name(peer)]))
        for name, stages in plans.items():
            last = stages[STAGE_OF_GOALS]
            is_compared = runs(stages) and "CFG" not in name and not name.startswith("diffusers")
            table.add_row(
                f"{ranks}: {name}",
                *("fails" if isinstance(count, str) else _megabytes(count) for count in stages.values()),
                f"1/{theirs.mean_bytes / last.mean_bytes:.2f}" if is_compared else "",
                str(last.calls) if runs(stages) else "",
                style="dim" if name.startswith("diffusers") else "",
            )
        table.add_section()
    return table


def runs(stages: dict[int, Count | str]) -> bool:
    return isinstance(stages[STAGE_OF_GOALS], Count)


def _megabytes(count: Count) -> str:
    megabytes = count.mean_bytes / 1e6
    return f"{megabytes:.1f}" if megabytes < 10 else f"{megabytes:.0f}"


def unlike_predicted(counts: Counts) -> list[str]:
    """Names of the counts that are not what the formulas say."""
    return [
        f"{ranks} ranks, {name}, stage {stage}"
        for ranks, plans in counts.items()
        for name, stages in plans.items()
        for stage, count in stages.items()
        if isinstance(count, Count) and not count.is_as_predicted
    ]


def check_goals(counts: Counts) -> list[dict[str, Any]]:
    goals = []
    for ranks in sorted(LESS_THAN_DIFFUSERS.keys() & counts.keys()):
        goal = LESS_THAN_DIFFUSERS[ranks]
        ours, theirs = (counts[ranks][name][STAGE_OF_GOALS] for name in (f"Ulysses {ranks}", "diffusers"))
        found = theirs.mean_bytes / ours.mean_bytes
        what = f"stage {STAGE_OF_GOALS}, {ranks} ranks: times fewer bytes than diffusers"
        goals.append({"what": what, "found": found, "goal": goal, "met": found >= goal})
    for ranks in counts:
        calls = counts[ranks][f"Ulysses {ranks}"][STAGE_OF_GOALS].calls
        what = f"Ulysses over {ranks} ranks: collectives per forward"
        goals.append({"what": what, "found": calls, "goal": ULYSSES_CALLS, "met": calls <= ULYSSES_CALLS})
    return goals


def to_json(counts: Counts, goals: list[dict[str, Any]]) -> dict[str, Any]:
    tokens = {f"stage {stage}": vars(Tokens.of(SIZE, stage)) for stage in STAGES}
    by_ranks = {
        f"{ranks} ranks": {
            name: {
                f"stage {stage}": {"fails": count} if isinstance(count, str) else count.to_json()
                for stage, count in stages.items()
            }
            for name, stages in plans.items()
        }
        for ranks, plans in counts.items()
    }
    return {
        "size": SIZE,
        "dtype": dtype_name(DTYPE),
        "tokens": tokens,
        "notes": NOTES,
        "repairs of diffusers": REPAIRS,
        "goals": goals,
        "counts": by_ranks,
    }


if __name__ == "__main__":
    sys.exit(exit_code(main))
