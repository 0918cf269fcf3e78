"""Makes what a checked session asks for: MP4s, latents, a report; and says how it went."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from time import perf_counter

import diffusers
import torch
import transformers
from torch import Tensor

from helios_cp.device.device import dtype_name
from helios_cp.files.mp4 import Mp4Writer, encode_segment
from helios_cp.files.whole_files import write_json, write_tensors
from helios_cp.generate.background import BackgroundWriter, HostCopies
from helios_cp.generate.check import Followed, Session
from helios_cp.generate.progress import ProgressReporter
from helios_cp.generate.prompt_files import Job
from helios_cp.generate.report import Report
from helios_cp.generate.run_folder import Run, RunFolder
from helios_cp.generate.stopping import Stopped, StopSignal
from helios_cp.pipeline.chunk import Chunk
from helios_cp.pipeline.parallelize import ParallelPipeline, load_parallel
from helios_cp.pipeline.world import World
from helios_cp.sampling.denoise import Step
from parallel.mesh import Mesh

PATIENCE = 5.0
"""Seconds that rank 0 has to finish its files when torchrun ends the job."""


def run(session: Session, world: World) -> int:
    """Generate everything in a checked session; returns the exit code: 0, 1 if a video failed, 130 or 143 if stopped.

    On one rank a failing video of a prompt file is told and passed over. Any other error is raised: with several ranks
    it ends them all, since the others are in the middle of the same video.
    """
    for path in session.skipped:
        say(f"{path} exists, skipped")
    for remark in session.remarks():
        say(remark)
    pipeline = _load(session, world)
    reports: list[Report] = []
    try:
        with StopSignal(PATIENCE if world.ranks.size > 1 else None).installed() as stop:
            for job, folder in zip(session.jobs, session.run_folders, strict=True):
                output = [str(path) for path in job.output]
                reports.append(
                    Report(
                        job.request,
                        session.checkpoint,
                        session.layout,
                        session.dtype,
                        session.device,
                        output,
                        session.execution,
                    )
                )
                try:
                    run_job(pipeline, session, job, folder, stop, reports[-1])
                except Exception as error:
                    reports[-1].error = " ".join(f"{type(error).__name__}: {error}".split())
                    if not session.has_prompt_file or world.ranks.size > 1:
                        raise
                    traceback.print_exc()
                else:
                    print(f"{', '.join(output)}: {reports[-1].summary()}", flush=True)
    except Stopped as reason:
        world.claim_end()  # the other ranks lose their connection to this one, which is no failure
        say(_stop_message(session, reports[-1]))
        return reason.exit_code
    finally:
        if session.report is not None:
            values = [report.to_json() for report in reports]
            write_json(session.report, values if session.has_prompt_file else values[0])
    failed = [f"{', '.join(report.output)}: {report.error}" for report in reports if report.error is not None]
    if failed:
        say("\n  ".join([f"{len(failed)} of {len(session.jobs)} videos failed:", *failed]))
    return 1 if failed else 0


def follow(session: Followed, world: World) -> None:
    """The part in a session of a rank other than 0: the same videos in step, and no files."""
    quiet_libraries()
    if not session.requests:
        return
    pipeline = load_pipeline(session, world)
    for request in session.requests:
        for _ in pipeline.stream(request, state=pipeline.share_state(request, None)):
            pass


def run_job(
    pipeline: ParallelPipeline | None,
    session: Session,
    job: Job,
    folder: Path | None,
    stop: StopSignal,
    report: Report,
) -> None:
    """Generate one request into its MP4s; whatever happens, the finished chunks end in playable MP4s.

    A chunk is encoded, saved and committed in the background while the next is made, in order, and is finished only
    then. `pipeline` may be `None` if `folder` holds all chunks. `report` is filled as chunks are finished.
    """
    stop.check()
    request = job.request
    run_folder = run_folder_of(session, job, folder)
    state = run_folder.state(session.device) if run_folder else None
    report.resumed_from_chunk = finished = state.index if state else 0
    latents: list[Tensor] = []

    with ExitStack() as stack:
        if session.save_latents is not None:
            stack.callback(_write_latents, session.save_latents, latents)
        writers = [stack.enter_context(Mp4Writer(path, request.fps)) for path in job.output]
        for index in range(finished):
            if session.save_latents is not None:
                latents.append(run_folder.latents(index))
            for writer, segment in zip(writers, run_folder.segments(index), strict=True):
                writer.append(segment)
        if finished == request.num_chunks:
            return

        state = pipeline.share_state(request, state)
        progress = stack.enter_context(ProgressReporter(job.output[0].name, request.num_chunks, finished))
        last_finished = perf_counter()

        def write(chunk: Chunk) -> None:
            nonlocal last_finished
            start = perf_counter()
            segments = [encode_segment(frames, request.fps) for frames in chunk.frames]
            if run_folder is not None:
                run_folder.save(chunk, segments)
            for writer, segment in zip(writers, segments, strict=True):
                writer.append(segment)
            if session.save_latents is not None:
                latents.append(chunk.latents.clone())  # the pinned memory that they came by is for the next chunk
            now = perf_counter()
            chunk.seconds["write"] = now - start
            report.add(chunk.index, now - last_finished, chunk.seconds, chunk.skipped)
            last_finished = now
            progress.chunk(chunk)

        background = stack.enter_context(BackgroundWriter(write))
        on_step, to_host = _on_step(progress, stop, background), HostCopies(session.device)
        chunks = stack.enter_context(closing(pipeline.stream(request, state=state, on_step=on_step)))
        for chunk in chunks:
            background.put(to_host(chunk))
            if chunk.index + 1 < request.num_chunks:
                stop.check()


def say(line: str) -> None:
    """A line for the user, apart from the results on stdout."""
    print(line, file=sys.stderr, flush=True)


def _load(session: Session, world: World) -> ParallelPipeline | None:
    """The pipeline, or `None` if every chunk of every job is finished already."""
    quiet_libraries()
    if not session.for_followers()["requests"]:
        return None
    layout = f", {session.layout.degrees}" if session.layout.degrees.world > 1 else ""
    say(f"loading {session.model} as {dtype_name(session.dtype)} on {session.device}{layout}")
    return load_pipeline(session, world)


def load_pipeline(session: Session | Followed, world: World) -> ParallelPipeline:
    """This rank's part of the session's checkpoint; every rank calls it, connected to the others."""
    mesh = Mesh.build(session.layout.degrees, timeout=world.timeout)
    return load_parallel(
        session.checkpoint,
        mesh,
        dtype=session.dtype,
        device=session.device,
        attention=session.layout.attention,
        shard_weights=session.layout.shard_weights,
        execution=session.execution,
    )


def quiet_libraries() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    diffusers.logging.set_verbosity_error()


def run_folder_of(session: Session, job: Job, folder: Path | None) -> RunFolder | None:
    """The run kept in `folder`, a new one where there is none."""
    if folder is None:
        return None
    if RunFolder.is_run(folder):
        return RunFolder.open(folder)
    output = tuple(str(path.absolute()) for path in job.output)
    run = Run(job.request, session.model, dtype_name(session.dtype), output, session.execution)
    return RunFolder.create(folder, run)


def _on_step(
    progress: ProgressReporter, stop: StopSignal, background: BackgroundWriter[Chunk]
) -> Callable[[Step], None]:
    def on_step(step: Step) -> None:
        progress.step(step)
        stop.check()
        background.check()

    return on_step


def _write_latents(path: Path, latents: list[Tensor]) -> None:
    """All chunks as `latents` `[B, C, T, h, w]` fp32, T frames in time."""
    if latents:
        write_tensors(path, {"latents": torch.cat(latents, dim=2)})


def _stop_message(session: Session, report: Report) -> str:
    """Where the video stands and how to go on."""
    names = ", ".join(report.output)
    standing = f"{names}: {report.finished_chunks} of {report.request.num_chunks} chunks are finished"
    if report.finished_chunks:
        standing += f" and can be played, {report.finished_chunks * report.request.frames_per_chunk} frames"
    again = "the same call starts over; with --checkpoint-dir DIR it could go on"
    if session.checkpoint_dir is not None:
        again = f"go on with --resume {session.checkpoint_dir}"
        again += " in place of --checkpoint-dir" if session.has_prompt_file else ""
    elif session.has_prompt_file:
        again = "the same call makes it again, and those after it"
    return f"stopped; {standing}; {again}"
