"""Makes what a checked call asks of a cluster, and says how it went."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter

from helios_cp.config.arguments import DEFAULT_TIMEOUT, OneLineParser
from helios_cp.config.errors import CheckpointError, RequestError
from helios_cp.device.device import dtype_name
from helios_cp.files.whole_files import write_json, write_tensors
from helios_cp.generate.check import Session
from helios_cp.generate.prompt_files import Job
from helios_cp.generate.report import Report
from helios_cp.generate.run import quiet_libraries, run_folder_of, run_job, say
from helios_cp.generate.stopping import Stopped, StopSignal
from launchers.cluster.cluster import ClusterError, connected
from launchers.driver.handle import VideoChunk, VideoHandle
from launchers.driver.pipeline import ChunkPipeline, PipelineError
from launchers.driver.recipes import Resources
from launchers.driver.timeline import draw
from launchers.generate import checks
from launchers.generate.automatic_layout import take_best_layout
from launchers.schedule.terms import Limits

POLL = 0.2
"""Seconds between two looks for a stop signal."""


def run(parser: OneLineParser, arguments: argparse.Namespace, cache: Path | None) -> int:
    """Returns the exit code."""
    quiet_libraries()
    try:
        with ExitStack() as stack:
            try:
                checks.check_files(arguments)
                if arguments.address != "local":
                    checks.check_without_cluster(arguments, cache)
                    stack.enter_context(connected(arguments.address, wait=arguments.wait))
                device = checks.pick_cluster_device(arguments)
                resources = checks.resources_of(arguments, device)
                if getattr(arguments, "layout", None) == "auto":
                    take_best_layout(arguments, cache, device, resources)
                session = checks.check_session(arguments, cache, checks.ranks_of_group(arguments), device)
                shares = checks.shares_of_workers(
                    arguments, device, session.layout, session.execution.offload, resources
                )
                if arguments.address == "local" and session.jobs:
                    checks.check_cards(arguments, shares)
            except RequestError as error:
                parser.error(str(error))
            if arguments.address == "local" and session.jobs:
                stack.enter_context(connected("local", cpus=len(shares), gpus=checks.cards_for(shares)))
            return _generate(session, arguments, device, resources, cache)
    except (ClusterError, PipelineError, CheckpointError, RequestError, OSError) as error:
        say(f"{parser.prog}: error: {' '.join(str(error).split())}")
        return 1
    except KeyboardInterrupt:
        say("stopped before the first chunk; nothing was written")
        return 130


def _generate(
    session: Session, arguments: argparse.Namespace, device: str, resources: Resources, cache: Path | None
) -> int:
    for path in session.skipped:
        say(f"{path} exists, skipped")
    if not session.jobs:
        return 0
    for remark in session.remarks():
        say(remark)
    if arguments.address != "local" and arguments.device == "auto" and device == "cpu":
        say("no node has a card by now, so all runs on CPUs; where cards come on demand, give --device cuda")
    layout = f" of {session.layout.degrees}" if session.layout.degrees.world > 1 else ""
    workers = f"{arguments.groups} group(s){layout}, {arguments.decoders} decoder(s)"
    say(f"loading {session.model} on {device} in {dtype_name(session.dtype)}: {workers}")
    all_written = True
    with StopSignal().installed() as stop:
        pipeline = ChunkPipeline(
            session.model,
            groups=arguments.groups,
            decoders=arguments.decoders,
            layout=session.layout,
            execution=session.execution,
            dtype=dtype_name(session.dtype),
            device=device,
            backend=getattr(arguments, "backend", None),
            cache=cache,
            timeout=getattr(arguments, "timeout", DEFAULT_TIMEOUT),
            limits=Limits(undelivered=arguments.undelivered, active=2 * arguments.groups),
            resources=resources,
            spread=arguments.spread,
            patience=arguments.wait,
        )
        with pipeline:
            videos = [
                _Video(pipeline, session, job, folder, stop)
                for job, folder in zip(session.jobs, session.run_folders, strict=True)
            ]
            try:
                for video in videos:
                    video.wait(stop)
            except Stopped as reason:
                _cancel(videos)
                again = f"; go on with --resume {session.checkpoint_dir}" if session.checkpoint_dir else ""
                say(f"stopped; the finished chunks can be played{again}")
                return reason.exit_code
            finally:
                all_written = _write_records(session, arguments, videos, pipeline)
    failed = [f"{', '.join(video.report.output)}: {video.report.error}" for video in videos if video.report.error]
    if failed:
        say("\n  ".join([f"{len(failed)} of {len(videos)} videos failed:", *failed]))
    return 1 if failed or not all_written else 0


class _Video:
    """One job under way."""

    def __init__(
        self, pipeline: ChunkPipeline, session: Session, job: Job, folder: Path | None, stop: StopSignal
    ) -> None:
        self.session = session
        self.job = job
        output = [str(path) for path in job.output]
        self.report = Report(
            job.request, session.checkpoint, session.layout, session.dtype, session.device, output, session.execution
        )
        self.folder = run_folder_of(session, job, folder)
        self.begin = perf_counter()
        finished = self.folder.finished_chunks() if self.folder else 0
        self.report.resumed_from_chunk = finished
        self.handle: VideoHandle | None = None
        if finished == job.request.num_chunks:
            run_job(None, session, job, folder, stop, self.report)
            return
        self.handle = pipeline.submit(
            job.request,
            output=job.output,
            folder=self.folder,
            keep_latents=session.save_latents is not None,
            on_chunk=self._chunk,
        )

    def _chunk(self, chunk: VideoChunk) -> None:
        """Its seconds are what the video waited for it; those of its stages overlap."""
        now = perf_counter()
        stages = {name: seconds for span in chunk.spans.values() for name, seconds in span.parts.items()}
        self.report.add(chunk.index, now - self.begin, stages)
        self.begin = now
        parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in stages.items())
        say(f"{self.job.output[0].name}: chunk {chunk.index + 1} of {self.job.request.num_chunks}: {parts}")

    def wait(self, stop: StopSignal) -> None:
        """Until the end, or until a signal comes. A failure of this video alone is kept for the report."""
        if self.handle is not None and not self._result(stop):
            return
        print(f"{', '.join(self.report.output)}: {self.report.summary()}", flush=True)

    def _result(self, stop: StopSignal) -> bool:
        while True:
            stop.check()
            try:
                result = self.handle.result(timeout=POLL)
            except TimeoutError as error:
                if self.handle.is_done:
                    self.report.error = str(error)
                    return False
                continue
            except (PipelineError, CheckpointError, CancelledError):
                raise
            except Exception as error:
                self.report.error = " ".join(f"{type(error).__name__}: {error}".split())
                return False
            if self.session.save_latents is not None:
                self._save_latents(result.latents)
            return True

    def _save_latents(self, latents) -> None:
        import torch

        earlier = [self.folder.latents(index) for index in range(self.report.resumed_from_chunk)]
        write_tensors(self.session.save_latents, {"latents": torch.cat([*earlier, torch.from_numpy(latents)], dim=2)})


def _cancel(videos: list[_Video]) -> None:
    """And wait until the files are finished."""
    for video in videos:
        if video.handle is not None:
            video.handle.cancel()
    for video in videos:
        if video.handle is not None:
            try:
                video.handle.result(timeout=60)
            except (Exception, CancelledError):
                continue


def _write_records(
    session: Session, arguments: argparse.Namespace, videos: list[_Video], pipeline: ChunkPipeline
) -> bool:
    """Report and timeline. Returns whether both are there; what keeps one from it is told, and hides no other error."""

    def write_report() -> None:
        values = [video.report.to_json() for video in videos]
        write_json(session.report, values if session.has_prompt_file else values[0])

    def draw_timeline() -> None:
        draw(list(pipeline.events), arguments.timeline, pipeline.nodes())

    records: list[tuple[str, Callable[[], None]]] = []
    if session.report is not None:
        records.append((f"--report {session.report}", write_report))
    if hasattr(arguments, "timeline") and pipeline.events:
        records.append((f"--timeline {arguments.timeline}", draw_timeline))
    all_written = True
    for name, write in records:
        try:
            write()
        except Exception as error:  # drawing can fail in ways of its own
            all_written = False
            say(f"{name}: it could not be written ({type(error).__name__}: {' '.join(str(error).split())})")
    return all_written
