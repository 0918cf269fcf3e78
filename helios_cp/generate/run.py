"""Makes what a checked session asks for: MP4s, latents, a report; and says how it went."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from time import perf_counter

import torch

from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.console import say
from helios_cp.config.errors import CheckpointError, RequestError
from helios_cp.config.imports import import_schedulers, import_text_encoder
from helios_cp.device.device import dtype_name, pick_dtype
from helios_cp.files.chunk_files import ChunkFiles
from helios_cp.files.mp4 import encode_segment
from helios_cp.generate.background import BackgroundWriter, HostCopies
from helios_cp.generate.check import Session, Work, is_finished
from helios_cp.generate.claims import turns
from helios_cp.generate.progress import ProgressReporter
from helios_cp.generate.prompt_files import Job
from helios_cp.generate.report import Report, tell_failures, write_report
from helios_cp.generate.run_folder import Run, RunFolder
from helios_cp.generate.stopping import Stopped, StopSignal, handled, stop_at_once
from helios_cp.pipeline.decoding import Chunk
from helios_cp.pipeline.parallelize import ParallelPipeline, load_parallel
from helios_cp.pipeline.world import World
from helios_cp.sampling.denoise import Step
from helios_cp.weights.load import resolve
from parallel.mesh import Mesh

PATIENCE = 5.0
"""Seconds that rank 0 has to finish its files when torchrun ends the job."""

END = -1
"""In place of a video's number: there is no other one."""

TOLD = (RequestError, CheckpointError, OSError)
"""Errors that say in a line what is wrong, and leave the device as it was."""


def run(session: Session, world: World) -> int:
    """Generate everything in a checked session; returns the exit code: 0, 1 if a video failed, 128 + N by signal N.

    On one rank a failing video of a prompt file is told and passed over. Any other error is raised: with several ranks
    it ends them all, since the others are in the middle of the same video.
    """
    for path in session.skipped:
        say(f"{path} exists, skipped")
    for remark in session.remarks:
        say(remark)
    reports: list[Report] = []
    is_reported = True
    with handled(lambda *_: None):  # outside of loading and of the making of videos all is nearly over
        try:
            code = _make_all(session, world, reports)
        finally:
            is_reported = write_report(session, reports)
    return code or int(not is_reported)


def _make_all(session: Session, world: World, reports: list[Report]) -> int:
    with handled(stop_at_once):
        pipeline = _load(session, world)
    try:
        with StopSignal(PATIENCE if world.ranks.size > 1 else None).installed() as stop:
            for number, claim in turns_of(session):
                with claim:
                    if pipeline is None and session.work.requests:  # an error broke it
                        gc.collect()
                        pipeline = load_pipeline(session.work, session.checkpoint, session.device, world)
                    report = Report(session, session.jobs[number])
                    reports.append(report)
                    try:
                        run_job(pipeline, number, stop, report)
                    except Exception as error:
                        report.error = " ".join(f"{type(error).__name__}: {error}".split())
                        if not session.has_prompt_file or world.ranks.size > 1:
                            report.raise_with_standing(error)
                        if not isinstance(error, TOLD):
                            traceback.print_exc()
                            pipeline = None  # an error of a card can break all that comes after it
                    else:
                        print(f"{report.job.names}: {report.summary()}", flush=True)
            _announce(pipeline, END)
    except Stopped as reason:
        world.claim_end()  # the other ranks lose their connection to this one, which is no failure
        say(f"stopped; {reports[-1].standing()}" if reports else "stopped; nothing was written")
        return reason.exit_code
    return tell_failures(reports, len(session.jobs))


def turns_of(session: Session) -> Iterator[tuple[int, ExitStack]]:
    """The videos to make, by number, each with a claim to close; that on a single one is held by the caller."""
    if not session.has_prompt_file:
        return iter([(0, ExitStack())])
    return turns(session.jobs, is_finished)


def follow(work: Work, device: torch.device, cache: Path | None, world: World) -> None:
    """What a rank other than 0 does: the same videos in step, and no files."""
    if not work.requests:
        return
    pipeline = load_pipeline(work, resolve(work.model, cache, weights=()), device, world)
    while (number := _announce(pipeline, END)) != END:
        request = work.requests[number]
        for _ in pipeline.stream(request, state=pipeline.share_state(request, None)):
            pass


def run_job(pipeline: ParallelPipeline | None, number: int, stop: StopSignal, report: Report) -> None:
    """Generate video `number`, or a batch, into its MP4s; whatever happens, finished chunks end in playable MP4s.

    A chunk is encoded, saved and committed in the background while the next is made, in order, and is finished only
    then. `pipeline` may be `None` if the run folder holds all chunks. `report` is filled as chunks are finished.
    """
    stop.check()
    session, job, request = report.session, report.job, report.request
    chunks, state = files_of(session, job), None
    if isinstance(chunks, RunFolder):
        state = chunks.state(session.device)
    report.resumed_from_chunk = finished = state.index if state else 0
    with ExitStack() as stack:
        stack.enter_context(_finished_files(chunks, stop, report))
        if finished == request.num_chunks:
            return
        _announce(pipeline, number)
        state = pipeline.share_state(request, state)
        progress = stack.enter_context(ProgressReporter(job.output[0].name, request.num_chunks, finished))
        last_finished = perf_counter()

        def write(chunk: Chunk) -> None:
            nonlocal last_finished
            start = perf_counter()
            segments = [encode_segment(frames, request.fps) for frames in chunk.frames]
            if isinstance(chunks, RunFolder):
                chunks.commit(chunk, segments)
            else:
                chunks.save(chunk.index, segments, chunk.latents if session.save_latents is not None else None)
            now = perf_counter()
            chunk.seconds["write"] = now - start
            report.add(chunk.index, now - last_finished, chunk.seconds, chunk.skipped)
            report.peak_bytes = pipeline.peak_bytes
            report.vae_group = pipeline.codec.last_group
            last_finished = now
            progress.chunk(chunk)

        background = stack.enter_context(BackgroundWriter(write))
        to_host = HostCopies(session.device)

        def on_step(step: Step) -> None:
            progress.step(step)
            stop.check()
            background.check()

        stream = stack.enter_context(closing(pipeline.stream(request, state=state, on_step=on_step)))
        for chunk in stream:
            background.put(to_host(chunk))
            if chunk.index + 1 < request.num_chunks:
                stop.check()


@contextmanager
def _finished_files(chunks: ChunkFiles, stop: StopSignal, report: Report) -> Iterator[None]:
    """At the end, and where `stop` ends the process, the chunks are joined to what was asked for."""

    def join() -> None:
        report.playable = f"{chunks.path}/chunk-*.mp4"
        chunks.join(report.job.output, report.session.save_latents)
        report.playable = None
        if not isinstance(chunks, RunFolder):
            chunks.remove()

    def last_words() -> None:
        with suppress(Exception):
            join()
        say(f"stopped; {report.standing()}")

    stop.last_words = last_words
    try:
        yield
    except BaseException:
        stop.leave()
        with suppress(Exception):  # the error under way matters more than one of joining, say on a full disk
            join()
        raise
    else:
        join()
    finally:
        stop.last_words = None


def _load(session: Session, world: World) -> ParallelPipeline | None:
    """The pipeline, or `None` if every chunk of every job is finished already."""
    if not session.work.requests:
        return None
    layout = f", {session.layout.degrees}" if session.layout.degrees.world > 1 else ""
    say(f"loading {session.model} as {dtype_name(session.dtype)} on {session.device}{layout}")
    import_text_encoder()
    return load_pipeline(session.work, session.checkpoint, session.device, world)


def load_pipeline(work: Work, checkpoint: Checkpoint, device: torch.device, world: World) -> ParallelPipeline:
    """This rank's part of a checkpoint; every rank calls it, connected to the others."""
    import_schedulers()
    return load_parallel(
        checkpoint,
        Mesh.build(work.layout.degrees, timeout=world.timeout),
        dtype=pick_dtype(work.dtype, device),
        device=device,
        attention=work.layout.attention,
        shard_weights=work.layout.shard_weights,
        execution=work.execution,
    )


def _announce(pipeline: ParallelPipeline | None, number: int) -> int:
    """The number of the next video, or `END`, as rank 0 gives it; every rank calls it."""
    if pipeline is None or pipeline.mesh.world.size == 1:
        return number
    return int(pipeline.mesh.world.broadcast(torch.tensor([number], device=pipeline.device)))


def files_of(session: Session, job: Job) -> ChunkFiles:
    """Where a job's chunks go: its run folder, with what is in it; or a folder beside its MP4, emptied."""
    if job.folder is None:
        chunks = ChunkFiles.beside(job.output)
        chunks.remove()  # what a killed call left
        return chunks
    if RunFolder.is_run(job.folder):
        run_folder = RunFolder.open(job.folder)
        run_folder.end_at(job.request.num_frames)
        return run_folder
    output = tuple(str(path.absolute()) for path in job.output)
    run = Run(job.request, session.model, dtype_name(session.dtype), output, session.execution, session.made_with)
    return RunFolder.create(job.folder, run)
