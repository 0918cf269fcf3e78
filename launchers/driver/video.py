"""What is known of one video under way: its results so far, the next call for each stage, what is delivered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from helios_cp.config.request import Request
from helios_cp.pipeline.start import Inputs
from launchers.cluster.calls import Payload
from launchers.driver.handle import VideoChunk, VideoHandle
from launchers.messages.messages import ChunkJob, Span, Target, Written
from launchers.schedule.terms import Course, Stage, Task


@dataclass(frozen=True)
class Call:
    """One call of a worker. `gang`: of all its actors. `beside`: in the thread for decoding, where it has one."""

    method: str
    arguments: Sequence[Any]
    results: int = 1
    gang: bool = False
    beside: bool = False


@dataclass
class Made:
    """What exists of one chunk between denoising and delivery."""

    latents: Payload
    after: Payload
    decoded: Payload | None = None
    frames: Payload | None = None
    spans: dict[str, Span] = field(default_factory=dict)


@dataclass(eq=False)
class Video:
    """`ready` chunks have been delivered. `error` is what ended it. With `is_writing` its files may have been begun."""

    handle: VideoHandle
    request: Request
    inputs: Inputs
    course: Course
    target: Target | None
    is_guided: bool
    text: Payload | None = None
    before: Payload | None = None
    written: Written | None = None
    is_writing: bool = False
    made: dict[int, Made] = field(default_factory=dict)
    ready: int = 0
    error: BaseException | None = None

    @property
    def key(self) -> int:
        return self.handle.key

    def change_prompt(self, text: str) -> None:
        self.request = replace(self.request, prompt=(text,) * self.request.batch_size, prompt_schedule=())

    def call(self, task: Task) -> Call:
        """How a worker is asked for a task. Raises `OSError` for a picture or clip that is gone."""
        if task.stage is Stage.TEXT:
            return Call("encode", [self.request, self.is_guided])
        if task.stage is Stage.START:
            media = Path(self.request.image or self.request.video).read_bytes()
            return Call("start", [self.request, media], beside=True)
        if task.stage is Stage.DENOISE:
            job = ChunkJob(self.key, task.prompt, self.request)
            before = None if self.before is None else self.before.reference
            return Call("denoise", [job, self.text.reference, before], results=2, gang=True)
        made = self.made[task.chunk]
        if task.stage is Stage.DECODE:
            wanted = [self.course.writes, self.course.streams]
            return Call("decode", [made.latents.reference, self.request.fps, *wanted], results=2, beside=True)
        self.is_writing = True
        is_last = task.chunk + 1 == self.course.chunks
        saved = [made.latents.reference, made.after.reference] if self.target.folder is not None else [None, None]
        return Call("write", [self.target, self.written, task.chunk, is_last, made.decoded.reference, *saved])

    def keep_call(self, chunk: int) -> Call | None:
        """How the writer is asked to save a denoised chunk at once; `None` for a video without a run folder."""
        if self.target is None or self.target.folder is None:
            return None
        made = self.made[chunk]
        return Call("keep", [self.target.folder, chunk, made.latents.reference, made.after.reference])

    def close_call(self) -> Call | None:
        """How the writer is asked to finish what there is of its files; `None` if it has none."""
        if self.target is None or not (self.is_writing or self.course.first):
            return None
        return Call("close", [self.target, self.written])

    def take(self, task: Task, results: Sequence[Payload]) -> None:
        """The results of a task that is done."""
        value = results[0].value
        if task.stage is Stage.TEXT:
            self.text = results[0]
        elif task.stage is Stage.START:
            self.before = results[0]
        elif task.stage is Stage.DENOISE:
            self.before = results[0]
            self.made[task.chunk] = Made(results[1], results[0], spans={"denoise": value.span})
        elif task.stage is Stage.DECODE:
            made = self.made[task.chunk]
            made.decoded, made.frames = results
            made.spans["decode"] = value.span
        else:
            self.written = value
            self.made[task.chunk].spans["write"] = value.span

    def deliver(self, ready: int) -> int:
        """Hand the first `ready` chunks to the handle; returns how many are new. Raises what `on_chunk` does."""
        before = self.ready
        while self.ready < ready:
            made = self.made.pop(self.ready)
            frames = None if made.frames is None else made.frames.value
            chunk = VideoChunk(self.ready, made.latents.value.values, frames, made.spans)
            self.ready += 1
            self.handle.deliver(chunk)
        return self.ready - before

    def put_again(self, chunk: int) -> None:
        """What a task of a chunk needs went down with its node: send this process's own view of it."""
        self.text = self.text and self.text.again()
        self.before = self.before and self.before.again()
        made = self.made.get(chunk)
        if made is not None:
            made.latents, made.after = made.latents.again(), made.after.again()
            made.decoded = made.decoded and made.decoded.again()
