"""Workers without Ray, in this process, for tests of the thread that makes videos. The writer writes real files."""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from helios_cp.config.request import Request
from helios_cp.files.mp4 import encode_segment
from launchers.cluster.faults import WorkerLostError
from launchers.cluster.worker import Payload, Standing
from launchers.driver.conductor import Conductor
from launchers.driver.handle import VideoHandle
from launchers.driver.submission import Submission
from launchers.messages.messages import Decoded, NextStart, Span, Text
from launchers.schedule.terms import Limits, Stage
from launchers.workers.writer import VideoWriter

SPAN = Span(0.0, 1.0, {})
FRAMES = 5
"""Of a chunk."""

PATIENCE = 300
"""Seconds for what takes none."""


@dataclass
class Numbers:
    """In place of `Array`."""

    values: np.ndarray


@dataclass
class StandIn:
    """A worker that answers at once, but for methods in `held`: those wait in `waiting`."""

    name: str
    capacity: dict
    tell: object
    held: set = field(default_factory=set)
    is_gang: bool = False

    def __post_init__(self) -> None:
        self.recipe = self
        self.places, self.standing = [], Standing.STARTING
        self.deaths = self.failed_starts = self.life = self.starts = 0
        self.waiting: list = []
        self.under_way: list = []
        self.calls: list[str] = []
        self.writer = VideoWriter()

    @property
    def is_ready(self) -> bool:
        return self.standing is Standing.READY

    def start(self) -> None:
        self.starts += 1
        self.writer = VideoWriter()
        self._end_life(Standing.STARTING)

    def stop(self) -> None:
        self._end_life(Standing.STARTING)

    def restart(self) -> None:
        self.start()  # `life` goes up once: whoever sees that it did knows the new one

    def give_up(self) -> None:
        self._end_life(Standing.GIVEN_UP)

    def _end_life(self, standing: Standing) -> None:
        self.life += 1
        self.standing = standing
        self.waiting = []
        lost, self.under_way = self.under_way, []
        for answer in lost:
            if not answer.done():
                answer.set_exception(WorkerLostError(f"{self.name} was stopped"))

    def says(self, event: str, value: object = ()) -> None:
        self.tell(self, self.life, event, value)

    def call(self, method, arguments, results=1, thread=None, gang=False) -> asyncio.Future:
        answer = asyncio.get_running_loop().create_future()
        plain = [argument.value if isinstance(argument, Payload) else argument for argument in arguments]
        is_held = method in self.held
        if is_held:
            self.waiting.append((method, plain, answer))
            self.under_way.append(answer)
        self.calls.append(method)  # after that, so that whoever sees a held call can release it
        if not is_held:
            self.answer(method, plain, answer)
        return answer

    def answer(self, method, arguments, answer) -> None:
        if answer.done():  # of an earlier life
            return
        try:
            answer.set_result([Payload(value, value) for value in getattr(self, "_" + method)(*arguments)])
        except Exception as error:
            answer.set_exception(error)

    def release(self) -> None:
        """Answer what was held; for any thread."""
        self.held.clear()
        while self.waiting:
            method, arguments, answer = self.waiting.pop(0)
            answer.get_loop().call_soon_threadsafe(self.answer, method, arguments, answer)

    def _encode(self, request, is_guided, first):
        return [Text(None, None, SPAN)]

    def _start(self, request, media):
        return [NextStart(None, SPAN)]

    def _denoise(self, job, text, before):
        return [NextStart(None, SPAN), Numbers(np.zeros((1, 1, 1, 2, 2), np.float32))]

    def _forget(self, video):
        return [None]

    def _decode(self, latents, fps, before, segments, frames):
        return [Decoded((segment(),) if segments else (), SPAN), None]

    def _write(self, *arguments):
        return [self.writer.write(*arguments)]

    def _close(self, *arguments):
        return [self.writer.close(*arguments)]

    def _keep(self, *arguments):
        return [None]


def segment() -> np.ndarray:
    frames = torch.zeros((FRAMES, 16, 16, 3), dtype=torch.uint8)
    return np.frombuffer(encode_segment(frames, 24), np.uint8)


class Studio:
    """A conductor with stand-ins: text, group-0 and more, decoder-0, writer."""

    def __init__(self, groups: int = 1, limits: Limits | None = None, is_ready: bool = True, **held: set) -> None:
        self.shown: list = []
        self.conductor = Conductor("model", limits or Limits(), False, self.shown.append)
        names = {"text": {Stage.TEXT: 1}, "decoder-0": {Stage.DECODE: 1, Stage.START: 1}, "writer": {Stage.WRITE: 4}}
        names |= {f"group-{index}": {Stage.DENOISE: 1} for index in range(groups)}
        workers = {
            name: StandIn(name, capacity, self.conductor.tell, held.get(name.partition("-")[0], set()))
            for name, capacity in names.items()
        }
        self.workers = workers
        self.keys = itertools.count()
        self.conductor.start(workers)
        if is_ready:
            for worker in workers.values():
                worker.says("ready")
            self.conductor.wait_until_ready(PATIENCE)

    def __enter__(self) -> Studio:
        return self

    def __exit__(self, *_: object) -> None:
        self.conductor.close()

    def submit(
        self,
        chunks: int,
        output: Path | None = None,
        streams: bool = False,
        on_chunk=None,
        prompt=("a fox",),
        **options,
    ) -> VideoHandle:
        handle = VideoHandle(self.conductor, next(self.keys), streams=streams, keep_latents=True, on_chunk=on_chunk)
        request = Request(prompt=prompt, num_frames=33 * chunks)
        paths = () if output is None else (output,)
        self.conductor.add(handle, Submission(request, paths, streams=streams, decodes=output is not None, **options))
        return handle

    def until(self, is_so) -> None:
        """Wait until the thread sees that it is so."""
        deadline = time.monotonic() + PATIENCE
        while not is_so():
            assert time.monotonic() < deadline, self.conductor.status()
            time.sleep(0.005)
