"""Decoding a chunk: diffusers' VAE, as it comes and channels last, and ours, on one rank and split over several.

python -m benchmarks.decode                    five minutes on two cores: the VAE of Helios at 128 × 128
python -m benchmarks.decode --device cuda      at 384 × 640 in fp32, TF32 and bf16, eager and compiled

Counts of FLOPs, bytes and memory are of a chunk at 384 × 640, whatever the device: they are not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from typing import Any

import torch
from rich.table import Table

from benchmarks.decode.counts import count_decodes
from benchmarks.decode.ranks import ON_CPU, ON_GPU, PRECISIONS, WARMUP, Case, Row, rows, time_decoders
from benchmarks.measuring.output import add_output, table_console, write_output
from benchmarks.ranks.groups import default_ranks
from benchmarks.ranks.pool import MAX_RANKS, RankPool, exit_code
from helios_cp.config.arguments import OneLineParser, whole_number
from helios_cp.config.errors import RequestError
from helios_cp.device.device import pick_device
from helios_cp.files.whole_files import check_file_target

SECONDS_OF_TURN = 120  # a rank that takes longer for all programs once hangs
NOTES = (
    "From latents to frames on the device: bytes of ours, fp32 in [0, 1] of diffusers. Programs take turns; medians.",
    "One rank has all cores of a CPU, several have one each.",
    "Limit: the frames/s if every FLOP ran as fast as those of large convolutions or products, whichever are faster.",
    "Levels: the largest difference of a pixel from diffusers' in the same precision and in fp32, of 255.",
    "MB = 1e6 bytes that a rank sends for a chunk, on average; calls: messages that it takes part in.",
)


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="benchmarks.decode", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto (default: cpu)")
    parser.add_argument("--repeats", type=whole_number, default=3, metavar="N", help="timed turns (default: 3)")
    parser.add_argument("--height", type=whole_number, metavar="PIXELS", help="of the video, a multiple of 8")
    parser.add_argument(
        "--width", type=whole_number, metavar="PIXELS", help="likewise (default: 128 by 128, on a GPU 384 by 640)"
    )
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, help="default: fp32; on a GPU all; tf32: GPU only"
    )
    parser.add_argument(
        "--ranks",
        type=whole_number,
        nargs="+",
        metavar="P",
        help=f"split over so many, 2 to {MAX_RANKS} (default: 2; on GPUs 2 to as many as there are)",
    )
    add_output(parser, "decode")
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
    case = read_case(parser, options, device)
    load = [os.getloadavg()]
    found = measure(case, options.repeats, pool)
    load.append(os.getloadavg())
    console = table_console()
    console.print(rows_table(case, found))
    counts = count_decodes()
    console.print(counts_table(counts))
    console.print(*NOTES, sep="\n", style="dim")
    results = {
        "case": dataclasses.asdict(case),
        "frames": case.frames,
        "flops": case.flops,
        "notes": NOTES,
        "load before and after": load,
        "programs": {row.name: row.to_json() for row in found},
        "counts at 384 x 640": counts,
    }
    path = write_output(options.output, results)
    console.print(f"written to {path}", style="dim", soft_wrap=True)
    return 0


def read_case(parser: argparse.ArgumentParser, options: argparse.Namespace, device: torch.device) -> Case:
    """What the flags ask for; ends the program where that is out of range."""
    if options.repeats < 2:
        parser.error(f"--repeats {options.repeats}: must be 2 or more")
    case = ON_GPU if device.type == "cuda" else ON_CPU
    size = options.height or case.size[0], options.width or case.size[1]
    for name, pixels in zip(("height", "width"), size, strict=True):
        if pixels < 8 or pixels % 8:
            parser.error(f"--{name} {pixels}: allowed are multiples of 8, from 8")
    rows_of_latents = size[0] // 8
    ranks = options.ranks or ([2] if device.type != "cuda" else default_ranks(device))
    for value in ranks:
        if not 2 <= value <= min(MAX_RANKS, rows_of_latents):
            parser.error(
                f"--ranks {value}: allowed is 2 to {min(MAX_RANKS, rows_of_latents)}, as the latents have "
                f"{rows_of_latents} rows"
            )
    precisions = tuple(dict.fromkeys(options.precisions or case.precisions))
    if device.type != "cuda" and "tf32" in precisions:
        parser.error(f"--precisions tf32: runs on CUDA only, not on {device.type}; use fp32 or bf16")
    return dataclasses.replace(
        case, size=size, ranks=tuple(sorted(set(ranks))), precisions=precisions, device_type=device.type
    )


def measure(case: Case, repeats: int, pool: RankPool | None) -> list[Row]:
    timeout = SECONDS_OF_TURN * (repeats + WARMUP + 1)
    with contextlib.nullcontext(pool) if pool else contextlib.closing(RankPool()) as workers:
        return rows(case, workers.run(time_decoders, case, repeats, ranks=max((1, *case.ranks)), timeout=timeout))


def rows_table(case: Case, found: list[Row]) -> Table:
    title = (
        f"One chunk of {case.frames} frames of {case.size[0]} × {case.size[1]}, VAE of width {case.vae.base_dim}, "
        f"{case.flops / 1e12:.3g} TFLOP, {case.device_type}"
    )
    table = Table(title=title, title_justify="left")
    table.add_column(min_width=20, no_wrap=True)
    times = ("median s", "quartiles s", "frames/s", "limit", "of it", "× diffusers", "× ch. last")
    for heading in (*times, "levels", "MB", "calls"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in found:
        low, high = row.timing.quartiles
        table.add_row(
            row.name,
            f"{row.timing.median:.3g}",
            f"{low:.3g}–{high:.3g}",
            f"{row.fps:.3g}",
            f"{row.limit:.3g}",
            f"{row.fps / row.limit:.0%}",
            f"{row.speedup:.2f}",
            f"{row.speedup_over_channels_last:.2f}",
            f"{row.levels}, {row.levels_of_fp32}",
            f"{row.sent_bytes / 1e6:.1f}" if row.calls else "",
            str(row.calls) if row.calls else "",
            style="dim" if row.name.startswith("diffusers") else "",
        )
    return table


def counts_table(counts: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="Counted for a chunk of 33 frames of 384 × 640 in fp32", title_justify="left")
    table.add_column(min_width=20, no_wrap=True)
    for heading in ("TFLOP", "elementwise GB", "of diffusers'", "memory GB", "one latent frame at a time"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, each in counts.items():
        _, device = name.split(", ")
        share = each["elementwise_bytes"] / counts[f"diffusers, {device}"]["elementwise_bytes"]
        sizes = (f"{each[kind] / 1e9:.2f}" for kind in ("memory", "least_memory"))
        table.add_row(
            name, f"{each['flops'] / 1e12:.2f}", f"{each['elementwise_bytes'] / 1e9:.1f}", f"{share:.1%}", *sizes
        )
    return table


if __name__ == "__main__":
    sys.exit(exit_code(main))
