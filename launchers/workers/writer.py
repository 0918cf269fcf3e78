"""The worker that writes files."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from helios_cp.files.mp4 import Mp4Writer, Position
from helios_cp.generate.run_folder import RunFolder
from helios_cp.pipeline.chunk import Chunk
from launchers.messages.arrays import Array
from launchers.messages.messages import Clock, Decoded, Denoised, Place, Target, Written
from launchers.workers import ahead
from launchers.workers.watched import Watched, own_place

NOTHING = Position(0, 0, 0, 0)


class VideoWriter(Watched):
    """Writes chunks in order into MP4s and run folders. It runs on the driver's node, where the files belong.

    A lost writer loses nothing: every call says how far the files were, and what lies beyond is cut off.
    """

    def __init__(self) -> None:
        self._open: dict[int, Sequence[Mp4Writer | None]] = {}

    def load(self) -> Place:
        return own_place()

    def keep(self, folder: RunFolder, chunk: int, latents: Array, after: Denoised) -> None:
        """Save a chunk as soon as it is denoised, while it is decoded."""
        ahead.keep(folder, chunk, latents.tensor(), after.state.state(torch.device("cpu")))

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
            ahead.forget(target.folder, chunk + 1)
        writers = self._writers(target, before, chunk, is_last)
        for writer, segment in zip(writers, segments, strict=True):
            if writer is not None:
                writer.append(segment)
        positions = tuple(None if writer is None else writer.position for writer in writers)
        if is_last:
            self.close(target, None)
        clock.part("write")
        return Written(positions, clock.span())

    def close(self, target: Target, written: Written | None) -> Written:
        """Finish the files of a video with what they have, up to `written` if a lost writer left them open."""
        clock = Clock()
        writers = self._open.pop(target.video, None)
        if writers is None:
            writers = _left_open(target, written)
        with ExitStack() as stack:  # an error of one does not leave the others open
            for writer in writers:
                if writer is not None:
                    stack.callback(writer.close)
        clock.part("close")
        return Written((None,) * len(target.paths), clock.span())

    def _writers(self, target: Target, before: Written | None, chunk: int, is_last: bool) -> Sequence[Mp4Writer | None]:
        """A writer for each file, with all chunks before this one in it; `None` where a lost one had just closed it."""
        found = self._open.get(target.video, ())
        if found and all(writer is not None and writer.segments == chunk for writer in found):
            return found
        if before is not None:
            pairs = zip(target.paths, before.positions, strict=True)
            found = [_resume(path, target.fps, position, is_last) for path, position in pairs]
        else:
            found = _from_folder(target, chunk)
        self._open[target.video] = found
        return found


def _left_open(target: Target, written: Written | None) -> list[Mp4Writer | None]:
    """Writers at what a lost writer left: without any answer of it, at what the run folder holds, or at nothing."""
    if written is None and target.folder is not None:
        return _from_folder(target, target.folder.finished_chunks())
    positions = (NOTHING,) * len(target.paths) if written is None else written.positions
    return [_resume(path, target.fps, position, True) for path, position in zip(target.paths, positions, strict=True)]


def _from_folder(target: Target, chunks: int) -> list[Mp4Writer | None]:
    """New writers with the first `chunks` of an earlier run in them."""
    writers = [Mp4Writer(path, target.fps) for path in target.paths]
    for earlier in range(chunks):
        for writer, segment in zip(writers, target.folder.segments(earlier), strict=True):
            writer.append(segment)
    return writers


def _resume(path: Path, fps: int, position: Position | None, may_be_closed: bool) -> Mp4Writer | None:
    """`None` if the file is closed already."""
    try:
        return None if position is None else Mp4Writer.resume(path, fps, position)
    except FileNotFoundError:
        if not may_be_closed:
            raise
        return None


def _chunk(index: int, latents: Array, after: Denoised) -> Chunk:
    return Chunk(index, latents.tensor(), None, after.state.state(torch.device("cpu")), {})
