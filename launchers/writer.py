"""The worker that writes files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from helios_cp.video import Mp4Writer, Position
from launchers.arrays import Array
from launchers.messages import Clock, Decoded, Denoised, Place, Target, Written
from launchers.watched import Watched, own_place


class VideoWriter(Watched):
    """Writes chunks in order into MP4s and run folders. It runs on the driver's node, where the files belong.

    A lost writer loses nothing: every call says how far the files were, and what lies beyond is cut off.
    """

    def __init__(self) -> None:
        self._open: dict[int, list[Mp4Writer | None]] = {}

    def load(self) -> Place:
        return own_place()

    def write(
        self,
        target: Target,
        before: Written | None,
        chunk: int,
        is_last: bool,
        decoded: Decoded,
        latents: Array | None,
        after: Denoised | None,
    ) -> Written:
        """Append a chunk. `latents` and `after` go to the run folder, where there is one. The last chunk closes."""
        clock = Clock()
        segments = [segment.tobytes() for segment in decoded.segments]
        if target.folder is not None:
            target.folder.save(_chunk(chunk, latents, after), segments)
        writers = self._writers(target, before, chunk, is_last)
        for writer, segment in zip(writers, segments, strict=True):
            if writer is not None:
                writer.append(segment)
        positions = tuple(None if writer is None else writer.position for writer in writers)
        if is_last:
            self.close(target.video)
        clock.part("write")
        return Written(positions, clock.span())

    def close(self, video: int) -> None:
        """Finish the files of a video with what they have."""
        for writer in self._open.pop(video, ()):
            if writer is not None:
                writer.close()

    def _writers(self, target: Target, before: Written | None, chunk: int, is_last: bool) -> Sequence[Mp4Writer | None]:
        """A writer for each file, with all chunks before this one in it; `None` where a lost one had just closed it."""
        found = self._open.get(target.video, ())
        if found and all(writer is not None and writer.segments == chunk for writer in found):
            return found
        if before is not None:
            pairs = zip(target.paths, before.positions, strict=True)
            found = [_resume(path, target.fps, position, is_last) for path, position in pairs]
        else:
            found = [Mp4Writer(path, target.fps) for path in target.paths]
            for earlier in range(chunk):  # of the run that this one goes on with
                for writer, segment in zip(found, target.folder.segments(earlier), strict=True):
                    writer.append(segment)
        self._open[target.video] = found
        return found


def _resume(path: Path, fps: int, position: Position, is_last: bool) -> Mp4Writer | None:
    try:
        return Mp4Writer.resume(path, fps, position)
    except FileNotFoundError:
        if not is_last:
            raise
        return None


def _chunk(index: int, latents: Array, after: Denoised) -> Any:
    from helios_cp.pipeline import Chunk

    return Chunk(index, latents.tensor(), None, after.state.state(torch.device("cpu")), {})
