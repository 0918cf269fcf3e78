"""Command line: a prompt, picture or clip in, an MP4 out.

python -m helios_cp.generate --prompt "a red fox in the snow" --output fox.mp4
torchrun --nproc_per_node 1 -m helios_cp.generate --model BestWishYsh/Helios-Distilled --prompt … --output fox.mp4
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from contextlib import ExitStack
from pathlib import Path

import diffusers
import torch
import transformers

from helios_cp.arguments import OneLineParser, add_model_arguments, add_request_arguments
from helios_cp.config import RequestError
from helios_cp.device import dtype_name
from helios_cp.files import write_json, write_tensors
from helios_cp.jobs import INTERPOLATE_TIME, Job
from helios_cp.pipeline import Pipeline
from helios_cp.progress import ProgressReporter
from helios_cp.report import Report
from helios_cp.run_folder import Run, RunFolder
from helios_cp.sampling import Step
from helios_cp.session import Session, check
from helios_cp.stopping import Stopped, StopSignal
from helios_cp.video import Mp4Writer, encode_segment
from helios_cp.weights import CheckpointError


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="helios_cp.generate",
        description="Generate videos with Helios, 33 frames a chunk, written to an MP4 as they come.",
        epilog="Ctrl-C stops after the step in hand and leaves a playable MP4 of the finished chunks.",
        argument_default=argparse.SUPPRESS,
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output", type=Path, metavar="FILE", help="MP4 to write; with --prompt-file a folder (default: out.mp4)"
    )
    output.add_argument("--save-latents", type=Path, metavar="FILE", help="also write the latents, as safetensors")
    output.add_argument("--report", type=Path, metavar="FILE", help="also write times, FPS and memory, as JSON")
    output.add_argument(
        "--checkpoint-dir", type=Path, metavar="DIR", help="save the state after every chunk, to go on after a stop"
    )
    output.add_argument(
        "--resume",
        type=Path,
        metavar="DIR",
        help="go on from the last finished chunk saved there; the other flags need not be repeated",
    )
    add_model_arguments(parser)
    add_request_arguments(parser)
    files = parser.add_argument_group("many videos")
    files.add_argument(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help=".txt with a prompt a line, or .csv with id and prompt (and image_name, or prompt_index for interactive "
        "videos); writes NAME.mp4 each and skips those that exist",
    )
    files.add_argument(
        "--image-folder", type=Path, metavar="DIR", help="where image_name is looked up (default: beside the .csv)"
    )
    files.add_argument(
        "--interpolate-time",
        type=int,
        metavar="CHUNKS",
        help=f"how long each prompt of an interactive .csv holds (default: {INTERPOLATE_TIME})",
    )
    return parser


def run_job(pipeline: Pipeline, session: Session, job: Job, folder: Path | None, stop: StopSignal) -> Report:
    """Generate one request; whatever happens, the finished chunks end in playable MP4s."""
    request = job.request
    run_folder = None
    if folder is not None:
        exists = (folder / "run.json").exists()
        outputs = tuple(str(path.absolute()) for path in job.output)
        run = Run(request, session.model, dtype_name(session.dtype), outputs)
        run_folder = RunFolder.open(folder) if exists else RunFolder.create(folder, run)
    finished = run_folder.finished_chunks() if run_folder else 0
    state = run_folder.state(session.device) if run_folder else None
    report = Report(request, session.checkpoint, session.dtype, session.device, finished)
    latents = [run_folder.latents(index) for index in range(finished)] if run_folder and session.save_latents else []
    complete = False

    def on_step(step: Step) -> None:
        progress.step(step)
        stop.check()

    try:
        with ExitStack() as stack:
            writers = [stack.enter_context(Mp4Writer(path, request.fps)) for path in job.output]
            for index in range(finished):
                for writer, segment in zip(writers, run_folder.segments(index), strict=True):
                    writer.append(segment)
            progress = stack.enter_context(ProgressReporter(job.output[0].name, request.num_chunks, finished))
            start = time.perf_counter()
            for chunk in pipeline.stream(request, state=state, on_step=on_step):
                encode_start = time.perf_counter()
                segments = [encode_segment(frames.cpu(), request.fps) for frames in chunk.frames]
                if run_folder is not None:
                    run_folder.save(chunk, segments)
                for writer, segment in zip(writers, segments, strict=True):
                    writer.append(segment)
                chunk.seconds["write"] = time.perf_counter() - encode_start
                if session.save_latents is not None:
                    latents.append(chunk.latents.cpu())
                report.add(chunk.index, time.perf_counter() - start, chunk.seconds)
                progress.chunk(chunk)
                start = time.perf_counter()
        complete = True
    finally:
        if session.save_latents is not None and latents:
            write_tensors(session.save_latents, {"latents": torch.cat(latents, dim=2)})
        if session.report is not None and len(session.jobs) == 1:
            write_json(session.report, report.to_json([str(path) for path in job.output], complete=complete))
    return report


def run(session: Session) -> int:
    """Generate everything in a checked session; returns the exit code."""
    if session.checkpoint.random_weights:
        print(
            f"{session.model}: the weights are random, so the video is noise; "
            "--model BestWishYsh/Helios-Distilled gets the real ones",
            file=sys.stderr,
        )
    if not session.jobs:
        return 0
    pipeline = Pipeline.from_pretrained(session.checkpoint, dtype=session.dtype, device=session.device)
    failures, reports = [], []
    with StopSignal().installed() as stop:
        for job, folder in zip(session.jobs, session.run_folders, strict=True):
            names = ", ".join(str(path) for path in job.output)
            try:
                report = run_job(pipeline, session, job, folder, stop)
            except (Stopped, KeyboardInterrupt) as reason:
                kept = [str(path) for path in job.output if path.exists()]
                again = f"; go on with --resume {folder}" if folder is not None else ""
                print(f"stopped: {', '.join(kept) or 'no chunk'} was finished{again}", file=sys.stderr)
                return reason.exit_code if isinstance(reason, Stopped) else 130
            except Exception as error:
                if len(session.jobs) == 1:
                    raise
                traceback.print_exc()
                failures.append(f"{names}: {error}")
                continue
            reports.append(report.to_json([str(path) for path in job.output], complete=True))
            print(f"{names}: {report.summary()}")
    if session.report is not None and len(session.jobs) > 1:
        write_json(session.report, reports)
    if failures:
        print(f"{len(failures)} of {len(session.jobs)} videos failed:", *failures, sep="\n  ", file=sys.stderr)
    return 1 if failures else 0


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        parser.error(f"torchrun --nproc_per_node {world}: context parallelism is not in this version; use 1")
    cache = os.environ.get("HELIOS_CP_CACHE")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    diffusers.logging.set_verbosity_error()
    try:
        session = check(arguments, Path(cache) if cache else None)
    except RequestError as error:
        parser.error(str(error))
    try:
        return run(session)
    except (CheckpointError, RequestError) as error:
        print(f"helios_cp.generate: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
