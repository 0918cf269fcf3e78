"""From a request to a video that the pipeline can run: what is refused, where it goes, where it goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.errors import RequestError
from helios_cp.config.request import Request
from helios_cp.config.sampling_plan import SamplingPlan
from helios_cp.generate.run_folder import RunFolder
from helios_cp.pipeline.start import Inputs
from helios_cp.sampling.state import ChunkState
from launchers.cluster.calls import Payload
from launchers.driver.handle import VideoHandle
from launchers.driver.video import Made, Video
from launchers.messages.arrays import Array, StateArrays
from launchers.messages.messages import Denoised, Span, Target
from launchers.schedule.terms import Course
from launchers.workers import ahead


@dataclass(frozen=True)
class Submission:
    """A checked request; see `ChunkPipeline.submit`. `first` is the first chunk that no earlier run has finished."""

    request: Request
    inputs: Inputs
    output: tuple[Path, ...]
    folder: RunFolder | None
    streams: bool
    decode: bool
    is_guided: bool
    state: ChunkState | None

    @classmethod
    def of(
        cls,
        request: Request,
        checkpoint: Checkpoint,
        output: Sequence[Path],
        folder: RunFolder | None,
        stream: bool | None,
        decode: bool,
    ) -> Submission:
        """Raises `RequestError`."""
        request, inputs = Inputs().merged(request)
        request = request.resolve(checkpoint)
        _check(request, output, folder, decode)
        if folder is not None:
            folder = RunFolder(folder.path.absolute(), folder.run)  # the writer works in another folder
        state = folder.state(torch.device("cpu")) if folder is not None else None
        if state is not None and state.index == request.num_chunks:
            raise RequestError(f"{folder.path}: all {state.index} chunks are finished; there is nothing to go on with")
        paths = tuple(Path(path).absolute() for path in output)
        streams = not output if stream is None else stream
        is_guided = SamplingPlan.of(request, checkpoint).is_guided
        return cls(request, inputs, paths, folder, streams, decode, is_guided, state)

    @property
    def first(self) -> int:
        return 0 if self.state is None else self.state.index

    def video(self, handle: VideoHandle, put: Callable[[object], Payload] = Payload.put) -> Video:
        """The video, with what an earlier run left of it in the object store."""
        denoised = [] if self.folder is None else ahead.load(self.folder, self.first)
        starts = self.inputs.has_anchor and self.state is None and not denoised
        course = Course(
            self.request.num_chunks, self.first, len(denoised), starts, self.decode, bool(self.output), self.streams
        )
        target = Target(handle.key, self.output, self.request.fps, self.folder) if self.output else None
        video = Video(handle, self.request, self.inputs, course, target, self.is_guided, ready=self.first)
        if self.state is not None:
            video.before = put(_left(self.state))
        for chunk, (latents, after) in enumerate(denoised, self.first):
            video.before = put(_left(after))
            video.made[chunk] = Made(put(Array.of(latents)), video.before)
        return video


def _left(state: ChunkState) -> Denoised:
    return Denoised(StateArrays.of(state), Span(0, 0, {}))


def _check(request: Request, output: Sequence[Path], folder: RunFolder | None, decode: bool) -> None:
    if output and len(output) != request.batch_size:
        raise RequestError(f"{len(output)} outputs for {request.batch_size} video(s); give one each")
    if output and not decode:
        raise RequestError("decode=False makes no frames for a file; leave out output")
    if folder is not None and not output:
        raise RequestError(f"{folder.path}: a run is saved beside its files; give output too")
