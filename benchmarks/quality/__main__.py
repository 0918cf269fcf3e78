"""Whether videos of the embedded models show what was asked for, how they join and drift, and what choices change.

python -m benchmarks.quality              60 prompts, 20 of them of combinations that no clip of the training shows
python -m benchmarks.quality --quick      12 prompts, drift over 4 chunks

Before them the VAE alone: rendered clips of held-out combinations, encoded and decoded.

A choice beside the exact run of its model is measured on the first third of the prompts.

A classifier that was trained on rendered clips says what a video shows. Its own figures, on rendered clips of the same
scenes, stand beside.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from benchmarks.measuring.output import add_output, table_console, write_output
from benchmarks.quality.cases import HEIGHT, LONG, STEPS, WIDTH, Case, cases_for, make_videos
from benchmarks.quality.figures import drift, likeness, motion
from benchmarks.quality.plot import LABELS, draw
from benchmarks.quality.reconstruction import reconstruction, to_bytes
from helios_cp.config.arguments import OneLineParser, whole_number
from helios_cp.config.errors import RequestError
from helios_cp.device.device import pick_device
from helios_cp.files.whole_files import check_file_target
from helios_cp.tiny.clips import render
from helios_cp.tiny.judge import Judge, compare, embedded_judge, name
from helios_cp.tiny.judging import seam, test_prompts, verdict
from helios_cp.tiny.latents import FRAMES
from helios_cp.tiny.sheet import write_sheet
from helios_cp.tiny.world import Scene

CHUNKS = 2
CLIPS = 12
"""What the VAE is measured on, at most."""
COLUMNS, ROWS = 8, 6
"""Of a contact sheet."""

Prompts = Sequence[tuple[str, Scene]]


def build_parser() -> OneLineParser:
    parser = OneLineParser(prog="benchmarks.quality", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="12 prompts, and drift over 4 chunks of 2 videos")
    parser.add_argument("--prompts", type=whole_number, metavar="N", help="default: 60, or 12 with --quick")
    parser.add_argument(
        "--case", action="append", metavar="TEXT", help="a model and flags, once for each (default: all that there are)"
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep what the file has of other cases; they took the same N"
    )
    parser.add_argument("--drift", type=whole_number, nargs="+", metavar="CHUNKS", help="default: 10 40; 0 for none")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="default: cpu")
    add_output(parser, "quality", "JSON to write; a plot and contact sheets go beside it")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0, or 2 for a call that cannot work."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        check_file_target("--output", options.output, ".json")
        if options.keep and not options.output.is_file():
            raise RequestError(f"--keep: there is no {options.output} yet; leave it out")
        device = pick_device(options.device)
        cases = [_case(text) for text in options.case] if options.case else cases_for(device)
    except RequestError as error:
        parser.error(str(error))
    prompts = test_prompts(options.prompts or (12 if options.quick else 60))
    lengths = [count for count in options.drift or ((4,) if options.quick else (10, 40)) if count]
    judge, folder = embedded_judge(), options.output.with_suffix("")
    results: dict[str, Any] = {
        "prompts": len(prompts),
        "held_out": sum(scene.is_held_out for _, scene in prompts),
        "size": [HEIGHT, WIDTH],
        "chunks": CHUNKS,
        "steps": STEPS,
        "judge": rendered(judge, prompts),
        "vae": reconstruction(min(len(prompts), CLIPS), device),
        "cases": {},
        "drift": {},
    }
    if options.keep:
        before = json.loads(options.output.read_text())["results"]
        results |= {kind: before[kind] for kind in ("cases", "drift")}
    references: dict[str, list[np.ndarray]] = {}
    console = table_console()

    def keep(kind: str, case: Case, found: dict[str, Any]) -> Path:
        results[kind][case.name] = found
        line = _line(found) if kind == "cases" else str(found)
        console.print(f"{case.name}: {line}", style="dim", soft_wrap=True)
        return write_output(options.output, results)  # after each, as all take long

    for case in cases:
        some = prompts if case.is_plain else third(prompts)
        path = keep("cases", case, measured(case, some, references, judge, device, folder))
    for case in [case for case in cases if case in LONG]:
        path = keep("drift", case, drifted(case, prompts[: 2 if options.quick else 4], lengths, judge, device))
    console.print(table_of(results))
    console.print(f"VAE: {results['vae']}", style="dim", soft_wrap=True)
    draw(results, path.with_suffix(".png"))
    console.print(f"written to {path}; contact sheets in {folder}", style="dim", soft_wrap=True)
    return 0


def third(prompts: Prompts) -> Prompts:
    """Those that choices are measured on."""
    return prompts[: max(2, len(prompts) // 3)]


def rendered(judge: Judge, prompts: Prompts) -> dict[str, float]:
    """What the classifier says of rendered clips of the prompts' scenes: what no model can be above."""
    videos = [to_bytes(render(scene, range(CHUNKS * FRAMES), HEIGHT, WIDTH)) for _, scene in prompts]
    said = verdict(judge, videos, prompts)
    return {**said["accuracy"], "seam": said["seam"], "motion": float(np.mean([motion(video) for video in videos]))}


def measured(
    case: Case,
    prompts: Prompts,
    references: dict[str, list[np.ndarray]],
    judge: Judge,
    device: torch.device,
    folder: Path,
) -> dict[str, Any]:
    """The figures of a case, or why it was refused. The exact run of a model becomes the reference for others."""
    try:
        videos = make_videos(case, [text for text, _ in prompts], CHUNKS, device)
    except RequestError as error:
        return {"refused": str(error)}
    folder.mkdir(parents=True, exist_ok=True)
    sheet = folder / f"{case.file_name}.jpg"
    write_sheet(videos[:ROWS], COLUMNS, sheet)
    said = verdict(judge, videos, prompts)
    found = {
        "prompts": len(prompts),
        "sheet": f"{folder.name}/{sheet.name}",
        "accuracy": said["accuracy"],
        "accuracy_held_out": said["accuracy_held_out"],
        "seam": said["seam"],
        "motion": float(np.mean([motion(video) for video in videos])),
    }
    if case.is_plain:
        some = verdict(judge, videos[: len(third(prompts))], third(prompts))
        references[case.model] = videos
        found["third"] = {"prompts": len(third(prompts)), "accuracy": some["accuracy"], "seam": some["seam"]}
    elif case.model in references:
        found |= likeness(videos, references[case.model][: len(videos)])
    return found


def drifted(
    case: Case, prompts: Prompts, lengths: Sequence[int], judge: Judge, device: torch.device
) -> dict[str, dict[str, float]]:
    """By the number of chunks: drift from the first chunk to the last, and whether its subject and colour are named."""
    videos = make_videos(case, [text for text, _ in prompts], max(lengths), device) if lengths else []
    found = {}
    for count in lengths:
        starts = [video[: count * FRAMES] for video in videos]
        named = [
            compare(name(judge, video[-FRAMES:]), scene) for video, (_, scene) in zip(starts, prompts, strict=True)
        ]
        shares = {key: float(np.mean([each[key] for each in named])) for key in LABELS}
        seams = float(np.mean([seam(video) for video in starts])) if count > 1 else None
        found[str(count)] = {**drift(starts), "seam": seams, "named": shares}
    return found


def table_of(results: dict[str, Any]) -> Table:
    title = (
        f"{results['prompts']} prompts, {results['held_out']} held out, {CHUNKS} chunks, {HEIGHT} × {WIDTH}; % as asked"
    )
    table = Table("model, flags", *LABELS, "seam", "motion", "PSNR", "SSIM", title=title)
    table.add_row("rendered clips", *_figures({"accuracy": results["judge"], **results["judge"]}))
    for case, found in results["cases"].items():
        row = [f"refused: {found['refused']}"] if "refused" in found else _figures(found)
        table.add_row(case, *row)
    return table


def _figures(found: dict[str, Any]) -> list[str]:
    shares = [f"{100 * found['accuracy'][label]:.0f}" for label in LABELS]
    others = [
        f"{found[name]:.2f}" if found.get(name) is not None else "" for name in ("seam", "motion", "psnr", "ssim")
    ]
    return [*shares, *others]


def _line(found: dict[str, Any]) -> str:
    return found.get("refused") or ", ".join(_figures(found))


def _case(text: str) -> Case:
    """From a model's name and flags. Raises `RequestError`."""
    model, _, flags = text.partition(" ")
    if model not in STEPS:
        raise RequestError(f"--case {text}: it starts with one of {', '.join(STEPS)}")
    return Case(model, flags)


if __name__ == "__main__":
    sys.exit(main())
