"""Starts the web server at once and the cluster beside it; ends both in order."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from helios_cp.config.arguments import OneLineParser
from helios_cp.config.console import say
from helios_cp.config.errors import CheckpointError, RequestError
from helios_cp.files.locks import LockedError, locked
from helios_cp.files.whole_files import check_folder_target
from helios_cp.generate.stopping import Stopped, StopSignal
from launchers.cluster.cluster import ClusterError
from launchers.driver.pipeline import ChunkPipeline, PipelineError
from launchers.generate.opening import Opening
from launchers.serve.access import Access
from launchers.serve.app import build_app
from launchers.serve.flags import ServeCall
from launchers.serve.logs import Log, json_lines
from launchers.serve.loras import Loras
from launchers.serve.server import Server
from launchers.serve.web import WebServer, listen, url_of

POLL = 0.2
"""Seconds between two looks for a signal."""

EXAMPLE = "a red fox running through fresh snow"
"""In the place of a prompt where the call is checked before any session has given one."""


def run(parser: OneLineParser, call: ServeCall, cache: Path | None) -> int:
    """Returns the exit code: 0 after Ctrl-C or SIGTERM, which are how a server ends."""
    try:
        with ExitStack() as stack:
            try:
                access = Access.of(call.api_key_file, call.allow_origin)
                check_folder_target("--data", call.data)
                _be_alone(call.data, stack)
                stack.enter_context(json_lines(sys.stderr))
                listener = stack.enter_context(listen(call.host, call.port))
                opening = Opening.of(with_example(call), cache, stack)
                loras = Loras.of(call.lora_folder, opening.session.checkpoint)
            except RequestError as error:
                parser.error(str(error))
            call = opening.call
            server = Server(call, opening.session, access, loras, Log(prompts=call.log_prompts))
            server.restore()
            web = stack.enter_context(WebServer(build_app(server), listener, call.message_bytes))
            say(f"{opening.loading}; {url_of(listener)} tells how far")
            opening.start_instance(stack)
            with StopSignal().installed() as stop:
                try:
                    with opening.pipeline(active=call.most_sessions + call.groups) as pipeline:
                        _serve(server, web, pipeline, stop, url_of(listener))
                except Stopped:
                    say("stopped; the sessions that were running go on at the next start")
            return 0
    except (ClusterError, PipelineError, CheckpointError, RequestError, OSError) as error:
        say(f"{parser.prog}: error: {' '.join(str(error).split())}")
        return 1
    except KeyboardInterrupt:
        say("stopped while it started")
        return 0


def _be_alone(data: Path, stack: ExitStack) -> None:
    """Hold the lock on the folder. Raises `RequestError` where another server works there."""
    try:
        stack.enter_context(locked(data / "lock"))
    except LockedError as holder:
        raise RequestError(f"--data {data}: another server works there ({holder}); give another folder") from None


def with_example(call: ServeCall) -> ServeCall:
    """The call with a prompt, so that all else of it can be checked."""
    return replace(call, request={**call.request, "prompt": (EXAMPLE,)}, output=call.data / "example.mp4")


def _serve(server: Server, web: WebServer, pipeline: ChunkPipeline, stop: StopSignal, url: str) -> None:
    """Until a signal. Raises `Stopped`, and what ends the pipeline."""
    try:
        while not server.is_ready:
            stop.check()
            try:
                pipeline.wait_until_ready(POLL)
            except TimeoutError:
                continue
            web.loop.call_soon_threadsafe(server.opened, pipeline)
            print(url, flush=True)
            break
        while not web.ended.wait(POLL):
            stop.check()
            pipeline.wait_until_ready(0)  # raises what has ended the pipeline
    finally:
        if not web.ended.is_set():
            web.call(server.drain())
