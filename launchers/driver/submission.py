"""From a request to a video that the pipeline can make: what is refused, where it goes, where it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.errors import RequestError
from helios_cp.config.request import Request
from helios_cp.config.sampling_plan import SamplingPlan
from helios_cp.files.chunk_files import ChunkFiles
from helios_cp.generate.run_folder import RunFolder
from helios_cp.pipeline.start import Inputs
from helios_cp.sampling.state import ChunkState
from helios_cp.weights.check import check_lora
from launchers.messages.messages import VideoFiles
from launchers.workers import denoised_chunks


@dataclass(frozen=True)
class Submission:
    """A checked request; see `ChunkPipeline.submit`.

    Of a run that goes on, `state` is what its first unfinished chunk starts from, and `denoised` the chunks that are
    denoised and not finished.
    """

    request: Request
    output: tuple[Path, ...] = ()
    folder: RunFolder | None = None
    latents: Path | None = None
    streams: bool = False
    decodes: bool = True
    is_guided: bool = False
    starts: bool = False
    state: ChunkState | None = None
    denoised: Sequence[denoised_chunks.DenoisedChunk] = field(default=(), repr=False)
    allowed: int | None = None

    @classmethod
    def of(
        cls,
        request: Request,
        checkpoint: Checkpoint,
        output: Sequence[Path] = (),
        folder: RunFolder | None = None,
        latents: Path | None = None,
        stream: bool | None = None,
        decode: bool = True,
        allowed: int | None = None,
    ) -> Submission:
        """Raises `RequestError`."""
        request, inputs = Inputs().merged(request)
        request = request.resolve(checkpoint)
        _check(request, output, folder, latents, decode)
        check_lora(checkpoint, [request])
        state, denoised = None, []
        if folder is not None:
            folder = RunFolder(folder.path.absolute(), folder.run)  # the writer works in another folder
            state = folder.state(torch.device("cpu"))
            if state is not None and state.index == request.num_chunks:
                raise RequestError(f"{folder.path}: all {state.index} chunks are finished; nothing is left to make")
            denoised = denoised_chunks.load(folder, 0 if state is None else state.index)
            request = folder.current(request).with_schedule(denoised[-1].schedule if denoised else ())
        return cls(
            request,
            output=tuple(Path(path).absolute() for path in output),
            folder=folder,
            latents=latents and latents.absolute(),
            streams=not output if stream is None else stream,
            decodes=decode,
            is_guided=SamplingPlan.of(request, checkpoint).is_guided,
            starts=inputs.has_anchor and state is None and not denoised,
            state=state,
            denoised=denoised,
            allowed=allowed,
        )

    @property
    def first(self) -> int:
        """The first chunk that no earlier run has finished."""
        return 0 if self.state is None else self.state.index

    @property
    def chunks(self) -> int:
        return self.request.num_chunks

    @property
    def writes(self) -> bool:
        return bool(self.output)

    def files(self, video: int) -> VideoFiles:
        """The files of a submission that writes."""
        return VideoFiles(video, self.output, self.folder or ChunkFiles.beside(self.output), self.latents)


def _check(
    request: Request, output: Sequence[Path], folder: RunFolder | None, latents: Path | None, decode: bool
) -> None:
    if output and len(output) != request.batch_size:
        raise RequestError(f"{len(output)} outputs for {request.batch_size} video(s); give one each")
    if output and not decode:
        raise RequestError("decode=False makes no frames for a file; leave out output")
    if folder is not None and not output:
        raise RequestError(f"{folder.path}: a run is saved beside its files; give output too")
    if latents is not None and not output:
        raise RequestError(f"{latents}: latents are saved beside a video's files; give output too, or keep_latents")
