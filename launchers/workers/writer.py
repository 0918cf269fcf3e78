"""The worker that writes files."""

from __future__ import annotations

import torch

from helios_cp.generate.run_folder import RunFolder
from helios_cp.pipeline.chunk import Chunk
from launchers.messages.arrays import Array
from launchers.messages.messages import Clock, Decoded, Denoised, Place, Target, Written
from launchers.workers import ahead
from launchers.workers.watched import Watched, own_place


class VideoWriter(Watched):
    """Writes chunks into files, and joins them. It runs on the driver's node, where the files belong.

    It keeps nothing in memory, and each call can be made again: a lost writer loses nothing.
    """

    def load(self) -> Place:
        return own_place()

    def keep(self, folder: RunFolder, chunk: int, latents: Array, after: Denoised, prompt: str | None) -> None:
        """Save a chunk as soon as it is denoised, while it is decoded."""
        ahead.keep(folder, chunk, ahead.Kept(latents.tensor(), after.state.state(torch.device("cpu")), prompt))

    def write(
        self,
        target: Target,
        chunk: int,
        is_last: bool,
        decoded: Decoded,
        latents: Array | None,
        after: Denoised | None,
        prompt: str | None,
    ) -> Written:
        """Save a chunk; the last one closes. `latents` and `after` come where the target keeps them.

        `prompt` is the chunk's if it was changed.
        """
        clock = Clock()
        segments = [segment.tobytes() for segment in decoded.segments]
        if isinstance(target.chunks, RunFolder):
            target.chunks.commit(_chunk(chunk, latents, after), segments, prompt)
            ahead.forget(target.chunks, chunk + 1)
        else:
            target.chunks.save(chunk, segments, latents and latents.tensor())
        if is_last:
            self.close(target)
        clock.part("write")
        return Written(clock.span())

    def close(self, target: Target) -> Written:
        """Finish the files of a video with the chunks there are."""
        clock = Clock()
        target.chunks.join(target.paths, target.latents)
        if not isinstance(target.chunks, RunFolder):
            target.chunks.remove()
        clock.part("close")
        return Written(clock.span())


def _chunk(index: int, latents: Array, after: Denoised) -> Chunk:
    return Chunk(index, latents.tensor(), None, after.state.state(torch.device("cpu")), {})
