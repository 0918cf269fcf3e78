"""Makes what a checked call asks of a cluster, and says how it went."""

from __future__ import annotations

import argparse
import math
from concurrent.futures import CancelledError
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter

import ray

from helios_cp.arguments import OneLineParser
from helios_cp.config import RequestError
from helios_cp.device import dtype_name
from helios_cp.distributed import Ranks
from helios_cp.files import write_json, write_tensors
from helios_cp.generate import DEFAULT_TIMEOUT
from helios_cp.jobs import Job
from helios_cp.report import Report
from helios_cp.runner import quiet_libraries, run_folder_of, run_job, say
from helios_cp.session import Session, check
from helios_cp.stopping import Stopped, StopSignal
from helios_cp.weights import CheckpointError
from launchers.automatic import take_best_layout
from launchers.cluster import ClusterError, connected
from launchers.handle import VideoChunk, VideoHandle
from launchers.pipeline import ChunkPipeline, PipelineError
from launchers.recipes import Resources, text_gpus
from launchers.schedule import Limits
from launchers.timeline import draw

POLL = 0.2
"""Seconds between two looks for a stop signal."""


def run(parser: OneLineParser, arguments: argparse.Namespace, cache: Path | None) -> int:
    """Returns the exit code."""
    quiet_libraries()
    try:
        with ExitStack() as stack:
            if arguments.address != "local":
                stack.enter_context(connected(arguments.address, cpus=0))
            try:
                device = pick_cluster_device(arguments)
                resources = Resources(*arguments.gpus) if hasattr(arguments, "gpus") else Resources.of(device)
                if getattr(arguments, "layout", None) == "auto":
                    take_best_layout(arguments, cache, device, resources)
                ranks = ranks_of_group(arguments)
                session = check_session(arguments, cache, ranks, device)
            except RequestError as error:
                parser.error(str(error))
            if arguments.address == "local" and session.jobs:
                cpus = arguments.groups * ranks + arguments.decoders + 1
                gpus = arguments.groups * ranks * resources.rank_gpus + arguments.decoders * resources.decoder_gpus
                gpus += text_gpus(session.layout.shard_weights, resources)
                stack.enter_context(connected("local", cpus=cpus, gpus=gpus))
            return _generate(session, arguments, device, resources, cache)
    except (ClusterError, PipelineError, CheckpointError, RequestError, OSError) as error:
        say(f"{parser.prog}: error: {' '.join(str(error).split())}")
        return 1
    except KeyboardInterrupt:
        say("stopped before the first chunk; nothing was written")
        return 130


def ranks_of_group(arguments: argparse.Namespace) -> int:
    """`--ranks`, or the product of the degrees given."""
    degrees = (getattr(arguments, name, 1) for name in ("cfg_parallel", "ring", "ulysses"))
    return getattr(arguments, "ranks", math.prod(degrees))


def pick_cluster_device(arguments: argparse.Namespace) -> str:
    """CUDA where the cluster has cards, for the driver's machine may have none."""
    if arguments.device in ("cpu", "cuda"):
        return arguments.device
    if arguments.device != "auto":
        raise RequestError(f"--device {arguments.device}: on a cluster allowed are auto, cpu and cuda")
    if ray.is_initialized():
        return "cuda" if ray.cluster_resources().get("GPU", 0) else "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def check_session(arguments: argparse.Namespace, cache: Path | None, ranks: int, device: str) -> Session:
    """As `helios_cp.session.check`, for a group of `ranks` whose cards this machine need not have."""
    import torch

    arguments.vae_parallel = 1
    if device == "cuda" and not torch.cuda.is_available():
        if getattr(arguments, "dtype", "auto") == "auto" and not hasattr(arguments, "resume"):
            arguments.dtype = "bfloat16"
        arguments.device = "cpu"
        if getattr(arguments, "backend", None) == "nccl":
            del arguments.backend
    else:
        arguments.device = device
    return check(arguments, cache, Ranks(size=ranks, local_size=min(ranks, max(torch.cuda.device_count(), 1))))


def _generate(
    session: Session, arguments: argparse.Namespace, device: str, resources: Resources, cache: Path | None
) -> int:
    for path in session.skipped:
        say(f"{path} exists, skipped")
    if not session.jobs:
        return 0
    layout = f" of {session.layout.degrees}" if session.layout.degrees.world > 1 else ""
    for remark in session.remarks():
        say(remark)
    say(f"loading {session.model}: {arguments.groups} group(s){layout}, {arguments.decoders} decoder(s)")
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
                _write_report(session, videos)
                if hasattr(arguments, "timeline") and pipeline.events:
                    draw(list(pipeline.events), arguments.timeline, pipeline.nodes())
    failed = [f"{', '.join(video.report.output)}: {video.report.error}" for video in videos if video.report.error]
    if failed:
        say("\n  ".join([f"{len(failed)} of {len(videos)} videos failed:", *failed]))
    return 1 if failed else 0


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


def _write_report(session: Session, videos: list[_Video]) -> None:
    if session.report is not None:
        values = [video.report.to_json() for video in videos]
        write_json(session.report, values if session.has_prompt_file else values[0])
