"""One forward of the transformer, diffusers' and ours: what it costs at full size, and how long a smaller one takes.

python -m benchmarks.forward                    counts, and times on the CPU
python -m benchmarks.forward --device cuda      counts, and times at full size on a GPU
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.forward.times import Case, StageTimes, describe_case, pick_case, time_forward
from benchmarks.measuring.counting import Counts
from benchmarks.measuring.output import add_output, write_output
from benchmarks.measuring.timing import Timing
from benchmarks.models.forward_counts import COST_MODEL, SIZE, ForwardCounts, count_forward
from helios_cp.config.arguments import OneLineParser
from helios_cp.config.checkpoint import TransformerConfig
from helios_cp.config.errors import RequestError
from helios_cp.device.device import dtype_name, pick_device, pick_dtype
from helios_cp.files.whole_files import check_file_target

NOTES = (
    "Bytes: what each operation reads and writes, once; elementwise means all but products, convolutions, attention.",
    "Kernels: as eager PyTorch launches them on a GPU; attention and RMSNorm are one each.",
    "Cost model: figures worked out apart from this code. Fused limit: elementwise bytes that no fusion can save.",
)


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="benchmarks.forward",
        description="One forward of the Helios transformer, diffusers' and ours: counted at full size, and timed here.",
    )
    parser.add_argument("--device", default="cpu", help="where to time: cpu, cuda or auto (default: cpu)")
    parser.add_argument("--repeats", type=_at_least(2), default=9, metavar="N", help="timed calls of each (default: 9)")
    parser.add_argument("--layers", type=_at_least(1), metavar="N", help="of the timed model (default: 4; on a GPU 40)")
    parser.add_argument("--heads", type=_at_least(1), metavar="N", help="of the timed model (default: 8; on a GPU 40)")
    parser.add_argument("--counts-only", action="store_true", help="time nothing")
    add_output(parser, "forward")
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        check_file_target("--output", options.output, ".json")
        device = pick_device(options.device)
    except RequestError as error:
        parser.error(str(error))

    console = Console()
    counts = count_forward(TransformerConfig())
    console.print(counts_table(counts))
    console.print(*NOTES, sep="\n", style="dim")
    results = {"counts": {"size": SIZE, "dtype": dtype_name(torch.bfloat16), "notes": NOTES, **counts.to_json()}}
    if not options.counts_only:
        dtype, case = pick_dtype("auto", device), pick_case(device, options.layers, options.heads)
        times = time_forward(case, device, dtype, options.repeats)
        console.print(times_table(times, case, device, dtype))
        stages = {f"stage {stage}": result.to_json() for stage, result in times.items()}
        results["times"] = {**describe_case(case, device, dtype), **stages}
    path = write_output(options.output, results)
    console.print(f"written to {path}", style="dim", soft_wrap=True)
    return 0


def counts_table(counts: ForwardCounts) -> Table:
    table = Table(title="One forward of Helios-14B at {} × {}, bfloat16, counted".format(*SIZE), title_justify="left")
    for heading in ("", "TFLOP", "elementwise GB", "matrix GB", "kernels"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for stage, ours in counts.ours.items():
        theirs, model = counts.theirs[stage], COST_MODEL[stage]
        table.add_row(f"stage {stage}: diffusers", *_figures(theirs))
        table.add_row("  cost model", f"{model.teraflops:.1f}", f"{model.eager_gigabytes:.0f}", style="dim")
        table.add_row(f"stage {stage}: ours", *_figures(ours), style="bold")
        table.add_row("  of diffusers", *_ratios(ours, theirs))
        table.add_row("  fused limit", "", f"{model.fused_gigabytes:.0f}", style="dim", end_section=True)
    table.add_row("ours, per prompt", *_figures(counts.per_prompt))
    table.add_row("ours, per chunk", *_figures(counts.per_chunk))
    table.add_row("ours, first use of a size", *_figures(counts.first_use))
    return table


def times_table(times: dict[int, StageTimes], case: Case, device: torch.device, dtype: torch.dtype) -> Table:
    config = case.config
    title = (
        f"{config.num_layers} layers × {config.num_attention_heads} heads × {config.attention_head_dim}, "
        f"{case.size[0]} × {case.size[1]}, {dtype_name(dtype)} on {device.type}, timed"
    )
    table = Table(title=title, title_justify="left")
    for heading in ("", "median ms", "quartiles ms", "TFLOP/s", "speedup"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for stage, result in times.items():
        speedup = result.speedup
        theirs_rate, ours_rate = _rate(result.theirs_flops, result.theirs), _rate(result.ours_flops, result.ours)
        table.add_row(f"stage {stage}: diffusers", *_milliseconds(result.theirs), theirs_rate)
        table.add_row(
            f"stage {stage}: ours",
            *_milliseconds(result.ours),
            ours_rate,
            f"{speedup.median:.2f} ({speedup.quartiles[0]:.2f}–{speedup.quartiles[1]:.2f})",
            style="bold",
        )
        table.add_row("  per prompt", *_milliseconds(result.per_prompt))
        table.add_row("  per chunk", *_milliseconds(result.per_chunk))
        table.add_row("  difference", f"{result.difference:.1e}", "of the range", style="dim", end_section=True)
    return table


def _milliseconds(timing: Timing) -> tuple[str, str]:
    low, high = timing.quartiles
    return f"{1e3 * timing.median:.1f}", f"{1e3 * low:.1f}–{1e3 * high:.1f}"


def _rate(flops: int, timing: Timing) -> str:
    return f"{flops / timing.median / 1e12:.3g}"


def _figures(counts: Counts) -> tuple[str, ...]:
    return (
        f"{counts.flops / 1e12:.2f}",
        f"{counts.elementwise_bytes / 1e9:.1f}",
        f"{counts.matrix_bytes / 1e9:.1f}",
        str(counts.kernels),
    )


def _ratios(part: Counts, whole: Counts) -> tuple[str, ...]:
    pairs = (
        (part.flops, whole.flops),
        (part.elementwise_bytes, whole.elementwise_bytes),
        (part.matrix_bytes, whole.matrix_bytes),
        (part.kernels, whole.kernels),
    )
    return tuple(f"{100 * some / all_:.1f} %" for some, all_ in pairs)


def _at_least(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text}: must be a whole number, {minimum} or more")
        return int(text)

    return parse


if __name__ == "__main__":
    sys.exit(main())
