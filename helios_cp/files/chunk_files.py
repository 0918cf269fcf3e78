"""The finished chunks of a video on disk, one by one, and the files that they become in the end."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from helios_cp.files.mp4 import join_segments
from helios_cp.files.whole_files import replacing, write_bytes, write_tensors


class ChunkFiles:
    """A folder with the finished chunks of a video, or of a batch of `videos`; it is made with the first chunk.

    chunk-00002-0.mp4         the frames of chunk 2, one file a video of the batch; a player takes it as it is
    chunk-00002.safetensors   its latents `[B, C, T, h, w]`, where they are kept

    Each file is whole or absent. No chunk stays in memory.
    """

    def __init__(self, path: Path, videos: int = 1) -> None:
        self.path = path
        self.videos = videos

    @classmethod
    def beside(cls, outputs: Sequence[Path]) -> ChunkFiles:
        """For MP4s that are not finished: `.NAME.mp4.chunks` beside the first, or beside what a link points to."""
        target = Path(os.path.realpath(outputs[0]))
        return cls(target.with_name(f".{target.name}.chunks"), len(outputs))

    def save(self, chunk: int, segments: Sequence[bytes], latents: Tensor | None = None) -> None:
        """Write a chunk: a segment of `encode_segment` for each video, and latents `[B, C, T, h, w]`."""
        if latents is not None:
            write_tensors(self._latents(chunk), {"latents": latents.cpu().contiguous()})
        for video, segment in enumerate(segments):
            write_bytes(self.segment(chunk, video), segment)

    def count(self) -> int:
        """How many chunks are there, from the first on."""
        count = 0
        while all(self.segment(count, video).is_file() for video in range(self.videos)):
            count += 1
        return count

    def join(self, outputs: Sequence[Path], latents: Path | None = None) -> int:
        """Join all chunks to an MP4 for each video and, at `latents`, a file of all latents; returns how many they are.

        Without a chunk nothing is written. The same chunks give the same bytes.
        """
        count = self.count()
        if count:
            for video, output in enumerate(outputs):
                join_segments([self.segment(chunk, video) for chunk in range(count)], output)
            if latents is not None:
                _join_latents([self._latents(chunk) for chunk in range(count)], latents)
        return count

    def remove(self) -> None:
        """Remove the folder with all that is in it, if it is there."""
        self.segment(0, 0).unlink(missing_ok=True)  # first: then no chunk counts, whenever this process is killed
        shutil.rmtree(self.path, ignore_errors=True)

    def segment(self, chunk: int, video: int = 0) -> Path:
        """The MP4 of a chunk, which is there once the chunk is saved."""
        return self.path / f"chunk-{chunk:05d}-{video}.mp4"

    def _latents(self, chunk: int) -> Path:
        return self.path / f"chunk-{chunk:05d}.safetensors"


def _join_latents(files: Sequence[Path], path: Path) -> None:
    """One safetensors file with `latents` `[B, C, T, h, w]` fp32 of all chunks, T frames in time.

    safetensors' own writer takes whole tensors only; this one has a chunk at a time in memory.
    """
    batch, channels, length, *size = load_file(files[0])["latents"].shape
    shape = [batch, channels, length * len(files), *size]
    frame = 4 * size[0] * size[1]
    end = batch * channels * shape[2] * frame
    tensor = {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}
    header = json.dumps({"latents": tensor}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        begin = file.tell()
        for chunk, each in enumerate(files):
            planes = load_file(each)["latents"].float().flatten(0, 1)  # [B·C, T, h, w]
            for plane, values in enumerate(planes):
                file.seek(begin + (plane * shape[2] + chunk * length) * frame)
                file.write(values.contiguous().numpy().tobytes())
