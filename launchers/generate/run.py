"""Makes what a checked call asks of a cluster, and says how it went."""

from __future__ import annotations

from collections import deque
from concurrent.futures import CancelledError
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter

from helios_cp.config.arguments import OneLineParser
from helios_cp.config.console import say
from helios_cp.config.errors import CheckpointError, RequestError
from helios_cp.generate.check import Session
from helios_cp.generate.claims import claimed
from helios_cp.generate.report import Report, tell_failures, write_report
from helios_cp.generate.run import files_of, turns_of
from helios_cp.generate.run_folder import RunFolder
from helios_cp.generate.stopping import Stopped, StopSignal
from helios_cp.weights.hub import HubId
from launchers.cluster.cluster import ClusterError
from launchers.cluster.faults import one_line
from launchers.driver.handle import VideoChunk, VideoHandle
from launchers.driver.pipeline import ChunkPipeline, PipelineError
from launchers.driver.timeline import draw
from launchers.generate import checks
from launchers.generate.flags import ClusterCall
from launchers.generate.opening import Opening

POLL = 0.2
"""Seconds between two looks for a stop signal."""

QUEUE = 4
"""Videos a group that are claimed and handed to the pipeline at once."""


def run(parser: OneLineParser, call: ClusterCall, cache: Path | None) -> int:
    """Returns the exit code."""
    try:
        with ExitStack() as stack:
            try:
                checks.check_files(call)
                opening = Opening.of(call, cache, stack)
                session = opening.session
                if session.jobs and not session.has_prompt_file:
                    stack.enter_context(claimed(session.jobs[0]))
            except RequestError as error:
                parser.error(str(error))
            if session.jobs:
                opening.start_instance(stack)
            return _generate(opening)
    except (ClusterError, PipelineError, CheckpointError, RequestError, OSError) as error:
        say(f"{parser.prog}: error: {' '.join(str(error).split())}")
        return 1
    except KeyboardInterrupt as reason:
        say("stopped before the first chunk; nothing was written")
        return getattr(reason, "exit_code", 130)


def _generate(opening: Opening[ClusterCall]) -> int:
    call, session = opening.call, opening.session
    for path in session.skipped:
        say(f"{path} exists, skipped")
    if not session.jobs:
        return 0
    for remark in session.remarks:
        say(remark)
    if call.address != "local" and call.device == "auto" and opening.device == "cpu":
        say("no node has a card by now, so all runs on CPUs; where cards come on demand, give --device cuda")
    if call.address != "local" and HubId.parse(session.model) is not None:
        say(f"{session.model}: each machine first downloads what its workers lack of it")
    layout = f" of {session.layout.degrees}" if session.layout.degrees.world > 1 else ""
    say(f"{opening.loading}: {call.groups} group(s){layout}, {call.decoders} decoder(s)")
    videos: list[_Video] = []
    all_written = True
    with ExitStack() as claims, StopSignal().installed() as stop, opening.pipeline(2 * call.groups) as pipeline:
        try:
            queue: deque[_Video] = deque()
            for number, claim in turns_of(session):
                claims.enter_context(claim)
                videos.append(_Video(pipeline, session, number, claim))
                queue.append(videos[-1])
                if len(queue) == QUEUE * call.groups:  # other calls may share the prompt file
                    queue.popleft().wait(stop)
            for video in queue:
                video.wait(stop)
        except Stopped as reason:
            _cancel(videos)
            for video in videos:
                if not video.is_done:
                    say(f"stopped; {video.report.standing()}")
            return reason.exit_code
        finally:
            all_written = _write_records(session, call, videos, pipeline)
    return tell_failures([video.report for video in videos], len(session.jobs)) or int(not all_written)


class _Video:
    """One job under way. `claim` is given up when it is done."""

    def __init__(self, pipeline: ChunkPipeline, session: Session, number: int, claim: ExitStack) -> None:
        job = session.jobs[number]
        self.claim = claim
        self.is_done = False
        self.report = Report(session, job)
        files = files_of(session, job)
        self.begin = perf_counter()
        folder = files if isinstance(files, RunFolder) else None
        self.report.resumed_from_chunk = finished = files.count()
        self.handle: VideoHandle | None = None
        if finished == job.request.num_chunks:
            files.join(job.output, session.save_latents)
            return
        self.handle = pipeline.submit(
            job.request, output=job.output, folder=folder, latents=session.save_latents, on_chunk=self._chunk
        )

    def _chunk(self, chunk: VideoChunk) -> None:
        """Its seconds are what the video waited for it; those of its stages overlap."""
        now = perf_counter()
        stages = {name: seconds for span in chunk.spans.values() for name, seconds in span.parts.items()}
        self.report.add(chunk.index, now - self.begin, stages)
        self.begin = now
        parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in stages.items())
        name = self.report.job.output[0].name
        say(f"{name}: chunk {chunk.index + 1} of {self.report.request.num_chunks}: {parts}")

    def wait(self, stop: StopSignal) -> None:
        """Until the end, or until a signal comes. A failure of this video alone is kept for the report."""
        is_made = self.handle is None or self._result(stop)
        self.is_done = True
        self.claim.close()
        if is_made:
            print(f"{self.report.job.names}: {self.report.summary()}", flush=True)

    def _result(self, stop: StopSignal) -> bool:
        while True:
            stop.check()
            try:
                self.handle.result(timeout=POLL)
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
            return True


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


def _write_records(session: Session, call: ClusterCall, videos: list[_Video], pipeline: ChunkPipeline) -> bool:
    """Report and timeline. Returns whether both are there; what keeps one from it is told, and hides no other error."""
    all_written = write_report(session, [video.report for video in videos])
    if call.timeline is not None and pipeline.events:
        try:
            draw(list(pipeline.events), call.timeline, pipeline.nodes())
        except Exception as error:  # drawing can fail in ways of its own
            all_written = False
            say(f"--timeline {call.timeline}: it could not be written: {one_line(error)}")
    return all_written
