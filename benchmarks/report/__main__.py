"""One page and three pictures from whatever results there are; what is measured and what is modelled is said of each.

python -m benchmarks.report                      benchmarks/results/*.json to REPORT.md and PNGs beside them
python -m benchmarks.report --results DIR        of another folder
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.measuring.machine import RESULTS
from benchmarks.report.data import Chunk, Result, read_chunks, read_projected, read_results
from benchmarks.report.modelled import Line, calibrated_lines, predict_lines
from benchmarks.report.plots import draw_bytes, draw_fps, draw_stages
from benchmarks.report.sections import SECTIONS, any_section, chunks_section, fps_section, table
from helios_cp.config.arguments import OneLineParser
from helios_cp.config.errors import RequestError
from helios_cp.config.paths import user_path
from helios_cp.files.whole_files import check_folder_target, write_bytes

PAGE = "REPORT.md"
COMMANDS = {
    **{name: f"python -m benchmarks.{name}" for name in ("fps", *SECTIONS)},
    "calibration": "python -m benchmarks.calibrate --output benchmarks/results/calibration.json",
    "gpu": "python -m benchmarks.gpu_suite --output benchmarks/results",
}
INTRODUCTION = """# Measured and modelled

Made by `python -m benchmarks.report` from the JSON files in this folder; do not edit it. *Measured* is what a clock
told on the machine that is named, *counted* is exact and the same on any machine, *modelled* is what
`python -m helios_cp.plan` predicts: no run stands behind it."""


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--results", type=user_path, default=RESULTS, metavar="DIR", help="where the JSON is, and the report goes"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 where a file could not be read as what its name says; the report tells which."""
    parser = build_parser()
    folder = parser.parse_args(arguments).results
    try:
        if not folder.is_dir():
            raise RequestError(f"--results {folder}: there is no such folder; give one with results of benchmarks")
        check_folder_target("--results", folder)
    except RequestError as error:
        parser.error(str(error))
    results, problems = read_results(folder)
    chunks, lines = read_chunks(results), predict_lines()
    try:
        lines = [*lines, *calibrated_lines(folder)]
    except RequestError as error:
        problems.append(str(error))
    draw_fps(lines, chunks, folder / "fps.png", read_projected(results))
    draw_stages(lines, chunks, folder / "stages.png")
    draw_bytes(results.get("communication"), folder / "bytes.png")
    page, failed = make_page(results, chunks, lines, problems, pictures={path.name for path in folder.glob("*.png")})
    write_bytes(folder / PAGE, page.encode())
    for problem in (*problems, *failed):
        print(f"benchmarks.report: {problem}", file=sys.stderr)
    print(f"written to {folder / PAGE}")
    return int(bool(problems or failed))


def make_page(
    results: dict[str, Result],
    chunks: Sequence[Chunk],
    lines: Sequence[Line],
    problems: Sequence[str],
    pictures: set[str],
) -> tuple[str, list[str]]:
    """The page, and a line for each result that is not of the shape that its name promises."""
    gpu = any(chunk.is_full_size_on_gpus for chunk in chunks)
    parts = [
        INTRODUCTION,
        "## FPS against GPUs",
        "![FPS against the number of GPUs](fps.png)",
        "" if gpu else "No FPS of a GPU has been measured yet: every FPS of Helios-14B here is modelled or published.",
        fps_section(lines, chunks, read_projected(results)),
        "## Where the time of a chunk goes",
        "![Time of a chunk by stage](stages.png)",
    ]
    if chunks:
        parts.append("Measured; the limit is all FLOPs at the rate of matrix products in the same run.")
        parts.append(chunks_section(chunks))
    parts += ["## Bytes against ranks", "![Bytes that a rank sends against the number of ranks](bytes.png)"]
    failed = []
    in_chunks = {chunk.result.name for chunk in chunks}
    for name in [*(each for each in SECTIONS if each in results), *(each for each in results if each not in SECTIONS)]:
        if name in in_chunks and name not in SECTIONS:
            continue
        title, make = SECTIONS.get(name, (name.replace("_", " ").capitalize(), any_section))
        try:
            text = make(results[name])
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            failed.append(f"{name}.json is of another shape ({type(error).__name__}: {error}); write it anew")
            continue
        parts += [f"## {title}", text]
        if f"{name}.png" in pictures - {"fps.png", "stages.png", "bytes.png"}:
            parts.append(f"![{title}]({name}.png)")
    parts += ["## Where it comes from", sources(results)]
    absent = {name: command for name, command in COMMANDS.items() if not any(each.startswith(name) for each in results)}
    if absent:
        parts.append("Not made yet: " + "; ".join(f"{name} (`{command}`)" for name, command in absent.items()) + ".")
    if problems or failed:
        parts.append("Not read: " + "; ".join((*problems, *failed)) + ".")
    return "\n\n".join(part for part in parts if part) + "\n", failed


def sources(results: dict[str, Result]) -> str:
    rows = [
        [
            f"{result.name}.json",
            result.where,
            f"Python {result.versions['python']}, torch {result.versions['torch']}, "
            f"diffusers {result.versions['diffusers']}",
            result.revision,
            result.date[:10],
            f"`{result.command}`",
        ]
        for result in results.values()
    ]
    return table(("file", "machine", "versions", "commit", "date", "command"), rows, texts=6)


if __name__ == "__main__":
    sys.exit(main())
