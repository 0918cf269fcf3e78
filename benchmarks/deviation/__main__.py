"""What the choices of speed and memory change in a video, beside how fast they are: one request with each of them.

python -m benchmarks.deviation                                         on the CPU, with tiny models
python -m benchmarks.deviation --device cuda --random-weights 14b      at full size, without a download
python -m benchmarks.deviation --variant="--quantize fp8 --compile"    any flags of `helios_cp.generate`'s execution

Deviations are from the same request without flags, in the same dtype. Of a model with random weights they say how far
rounding spreads, not how a video looks.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from rich.table import Table

from benchmarks.deviation.videos import VARIANTS, Case, default_variants, parse_variant
from benchmarks.measuring.output import add_output, table_console, write_output
from benchmarks.models.full_size import NAMES, named_checkpoint
from helios_cp.config.arguments import OneLineParser, whole_number
from helios_cp.config.checkpoint import DTYPES
from helios_cp.config.errors import RequestError
from helios_cp.config.request import Request
from helios_cp.device.device import pick_device, pick_dtype
from helios_cp.files.whole_files import check_file_target
from helios_cp.weights.load import resolve

MODELS = ("random-distilled", "random-mid")
VARIANT_HELP = (
    f"as in --variant='--quantize fp8', once for each (default: those of {', '.join(VARIANTS)} that go with the "
    "checkpoint and the device)"
)


def table_of(results: dict[str, dict[str, Any]], title: str) -> Table:
    table = Table("flags", "FPS", "against none", "weights GB", "latents", "frames", "grey levels", title=title)
    plain = results[""]["fps"]
    for variant, found in results.items():
        name = variant or "none"
        if "fps" not in found:
            table.add_row(name, *(f"{how}: {why}" for how, why in found.items()))
            continue
        away = found["deviation"]
        table.add_row(
            name,
            f"{found['fps']:.2f}",
            f"{found['fps'] / plain:.2f}×",
            f"{found['transformer_bytes'] / 1e9:.3g}",
            f"{away['latents']:.2e}",
            f"{away['frames']:.2e}",
            f"{away['mean_grey_levels']:.2f}",
        )
    return table


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="benchmarks.deviation",
        description="How far each choice of speed or memory takes a video from the plain one, and how fast it is.",
    )
    parser.add_argument(
        "--model", nargs="+", default=MODELS, help=f"as for helios_cp.generate (default: {' '.join(MODELS)})"
    )
    parser.add_argument(
        "--random-weights", nargs="+", choices=sorted(NAMES), help="in place of --model, built on the device"
    )
    parser.add_argument("--variant", action="append", metavar="FLAGS", help=VARIANT_HELP)
    parser.add_argument(
        "--quick", action="store_true", help="one chunk, and by default without --compile, which takes a minute more"
    )
    parser.add_argument("--device", default="cpu", metavar="NAME", help="default: cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    parser.add_argument("--height", type=whole_number, metavar="PIXELS", help="default: 384, or 64 on a CPU")
    parser.add_argument("--width", type=whole_number, metavar="PIXELS", help="default: 640, or 64 on a CPU")
    parser.add_argument("--num-frames", type=whole_number, metavar="N", help="default: 66, two chunks")
    parser.add_argument(
        "--pyramid-steps", type=whole_number, nargs="+", metavar="N", help="of each stage (default: the checkpoint's)"
    )
    add_output(parser, "deviation")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 where a variant failed; the result says how."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        check_file_target("--output", options.output, ".json")
        cases = read_cases(options)
    except RequestError as error:
        parser.error(str(error))
    console, runs = table_console(), []
    for case in cases:
        runs.append(case.run())
        title = f"{case.name}, {case.request.height} × {case.request.width}, {runs[-1]['dtype']} on {case.device}"
        console.print(table_of(runs[-1]["variants"], title))
        path = write_output(options.output, {"runs": runs})
    console.print(f"written to {path}", style="dim", soft_wrap=True)
    return int(any("failed" in found for run in runs for found in run["variants"].values()))


def read_cases(options: argparse.Namespace) -> list[Case]:
    """One for each model. Raises `RequestError`."""
    for variant in options.variant or ():
        parse_variant(variant)
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    pixels = (64, 64) if device.type == "cpu" else (384, 640)
    cases = []
    for name in options.random_weights or options.model:
        checkpoint = named_checkpoint(name) if options.random_weights else resolve(name)
        request = Request(
            prompt=("a red fox runs through fresh snow",),
            height=options.height or pixels[0],
            width=options.width or pixels[1],
            num_frames=options.num_frames or (33 if options.quick else 66),
            pyramid_num_inference_steps_list=tuple(options.pyramid_steps) if options.pyramid_steps else None,
        ).resolve(checkpoint)
        variants = options.variant or default_variants(checkpoint, device, dtype)
        if options.quick and not options.variant:
            variants = [variant for variant in variants if variant != "--compile"]
        cases.append(Case(checkpoint, name, bool(options.random_weights), request, dtype, device, tuple(variants)))
    return cases


if __name__ == "__main__":
    sys.exit(main())
