"""Attention: the engines of one rank, and one attention shared among ranks, each with its limit beside it.

python -m benchmarks.attention                    about a minute on two cores
python -m benchmarks.attention --device cuda      the shapes of Helios-14B; ranks where there are several cards
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys

import torch
from rich.table import Table

from benchmarks.attention import engines as attention_engines
from benchmarks.attention import ranks as attention_ranks
from benchmarks.attention.engines import EngineTimes, Shape, absent_engines, time_engines
from benchmarks.attention.ranks import Case, Row, rows, time_algorithms
from benchmarks.measuring.output import add_output, table_console, write_output
from benchmarks.ranks.groups import default_ranks
from benchmarks.ranks.pool import MAX_RANKS, RankPool, exit_code
from helios_cp.config.arguments import OneLineParser, whole_number
from helios_cp.config.errors import RequestError
from helios_cp.device.device import dtype_name, pick_device
from helios_cp.files.whole_files import check_file_target

SECONDS_OF_TURN = 60  # a rank that takes longer for all programs once hangs
NOTES = (
    "Rates count 4 · heads · head dim · tokens² FLOPs. Programs take turns; medians.",
    "Product: a large matrix product in the same dtype and turns, which is what the device reaches.",
    "Shares at once: the heads shared out among the ranks and no message sent: the limit of an algorithm here.",
    "More ranks than cores or cards share them, and so do the products and shares that they are compared with.",
    "MB = 1e6 bytes that a rank sends in one call, on average; calls: collectives that it takes part in.",
)


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="benchmarks.attention", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto (default: cpu)")
    parser.add_argument("--repeats", type=whole_number, default=7, metavar="N", help="timed turns (default: 7)")
    parser.add_argument(
        "--tokens", type=whole_number, nargs="+", metavar="N", help="lengths for the engines, with the device's heads"
    )
    parser.add_argument(
        "--ranks",
        type=whole_number,
        nargs="+",
        metavar="P",
        help=f"worlds that share an attention, 2 to {MAX_RANKS} (default: 2 4; on GPUs 2 to as many as there are)",
    )
    add_output(parser, "attention")
    return parser


def main(arguments: list[str] | None = None, pool: RankPool | None = None) -> int:
    """`pool` are ranks that run already; without it they are started, and ended."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        check_file_target("--output", options.output, ".json")
        device = pick_device(options.device)
    except RequestError as error:
        parser.error(str(error))
    check_ranges(parser, options)
    is_gpu = device.type == "cuda"
    shapes = attention_engines.ON_GPU if is_gpu else attention_engines.ON_CPU
    if options.tokens:
        shapes = tuple(Shape(tokens, shapes[0].heads) for tokens in options.tokens)
    shared = attention_ranks.ON_GPU if is_gpu else attention_ranks.ON_CPU
    ranks = tuple(sorted(set(options.ranks or default_ranks(device))))
    case = Case(shared, ranks, torch.bfloat16 if is_gpu else torch.float32, device.type)
    console = table_console()
    absent = absent_engines(device)
    load = [os.getloadavg()]
    engines = list(time_engines(shapes, device, options.repeats))
    console.print(engines_table(engines, device))
    console.print(*(f"{engine}: {why}" for engine, why in absent.items()), sep="\n", style="dim")
    found = measure_ranks(case, options.repeats, pool) if ranks else []
    load.append(os.getloadavg())
    console.print(ranks_table(case, found) if found else "One card: there are no ranks to share an attention among.")
    console.print(*NOTES, sep="\n", style="dim")
    results = {
        "device": device.type,
        "notes": NOTES,
        "load before and after": load,
        "engines": [each.to_json() for each in engines],
        "engines that cannot run": absent,
        "shared": {
            **vars(shared),
            "flops": shared.flops,
            "dtype": dtype_name(case.dtype),
            "programs": {row.name: row.to_json() for row in found},
        },
    }
    path = write_output(options.output, results)
    console.print(f"written to {path}", style="dim", soft_wrap=True)
    return 0


def check_ranges(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.repeats < 2:
        parser.error(f"--repeats {options.repeats}: must be 2 or more")
    for name, least, most in (("tokens", 1, 10**6), ("ranks", 2, MAX_RANKS)):
        for value in getattr(options, name) or ():
            if not least <= value <= most:
                parser.error(f"--{name} {value}: allowed is {least} to {most}")


def measure_ranks(case: Case, repeats: int, pool: RankPool | None) -> list[Row]:
    timeout = SECONDS_OF_TURN * (repeats + attention_ranks.WARMUP + 1)
    with contextlib.nullcontext(pool) if pool else contextlib.closing(RankPool()) as workers:
        return rows(case, workers.run(time_algorithms, case, repeats, ranks=max(case.ranks), timeout=timeout))


def engines_table(engines: list[EngineTimes], device: torch.device) -> Table:
    table = Table(title=f"Attention on one rank, {device.type}", title_justify="left")
    for heading in ("engine", "dtype"):
        table.add_column(heading, no_wrap=True)
    for heading in ("tokens", "heads", "median ms", "quartiles ms", "GFLOP/s", "of product"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in engines:
        low, high = each.timing.quartiles
        table.add_row(
            each.engine + (" with log-sum-exp" if each.gives_lse else ""),
            dtype_name(each.dtype),
            str(each.shape.tokens),
            str(each.shape.heads),
            f"{1e3 * each.timing.median:.3g}",
            f"{1e3 * low:.3g}–{1e3 * high:.3g}",
            f"{each.rate / 1e9:.4g}",
            f"{each.rate / each.product_rate:.0%}",
        )
    return table


def ranks_table(case: Case, found: list[Row]) -> Table:
    shape = case.shape
    title = f"{shape.tokens} tokens, {shape.heads} heads of {shape.head_dim}, {dtype_name(case.dtype)}, shared"
    table = Table(title=title, title_justify="left")
    table.add_column(min_width=20, no_wrap=True)
    for heading in ("median ms", "quartiles ms", "GFLOP/s", "of products", "of shares", "× 1 rank", "MB", "calls"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in found:
        low, high = row.timing.quartiles
        table.add_row(
            row.name,
            f"{1e3 * row.timing.median:.3g}",
            f"{1e3 * low:.3g}–{1e3 * high:.3g}",
            f"{row.rate / 1e9:.4g}",
            f"{row.of_product:.0%}",
            f"{row.of_shares:.0%}",
            f"{row.speedup:.2f}",
            f"{row.sent_bytes / 1e6:.1f}" if row.calls else "",
            str(row.calls) if row.calls else "",
            style="" if row.calls else "dim",
        )
    return table


if __name__ == "__main__":
    sys.exit(exit_code(main))
