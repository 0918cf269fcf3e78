"""The worker that writes files."""

from __future__ import annotations

import torch

from helios_cp.generate.run_folder import RunFolder
from helios_cp.pipeline.decoding import Chunk
from launchers.messages.arrays import Array
from launchers.messages.messages import ActorInfo, Clock, Decoded, NextStart, Schedule, VideoFiles, Written
from launchers.workers import denoised_chunks
from launchers.workers.denoised_chunks import DenoisedChunk
from launchers.workers.watched import Watched, own_info

CPU = torch.device("cpu")


class VideoWriter(Watched):
    """Writes chunks into files, and joins them. It runs on the driver's node, where the files belong.

    It keeps nothing in memory, and each call can be made again: a lost writer loses nothing.
    """

    def load(self) -> ActorInfo:
        return own_info()

    def keep(self, folder: RunFolder, chunk: int, latents: Array, after: NextStart, schedule: Schedule) -> None:
        """Save a chunk as soon as it is denoised, while it is decoded."""
        made = DenoisedChunk(latents.tensor(), after.state.state(CPU), schedule)
        denoised_chunks.keep(folder, chunk, made)

    def write(
        self,
        files: VideoFiles,
        chunk: int,
        is_last: bool,
        decoded: Decoded,
        latents: Array | None,
        after: NextStart | None,
        schedule: Schedule,
    ) -> Written:
        """Save a chunk; the last one closes. `latents` and `after` come where the files keep them.

        `schedule` is what it was made of, as changes of the prompt left it.
        """
        clock = Clock()
        segments = [segment.tobytes() for segment in decoded.segments]
        if isinstance(files.chunks, RunFolder):
            made = Chunk(chunk, latents.tensor(), None, after.state.state(CPU), {})
            files.chunks.commit(made, segments, schedule)
            denoised_chunks.forget(files.chunks, chunk + 1)
        else:
            files.chunks.save(chunk, segments, latents and latents.tensor())
        if is_last:
            self.close(files)
        clock.part("write")
        return Written(clock.span())

    def close(self, files: VideoFiles) -> Written:
        """Finish the files of a video with the chunks there are."""
        clock = Clock()
        files.chunks.join(files.paths, files.latents)
        if not isinstance(files.chunks, RunFolder):
            files.chunks.remove()
        clock.part("close")
        return Written(clock.span())
