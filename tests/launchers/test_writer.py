"""Unit, without a cluster: a writer that is lost at any moment, and the figures of a timeline.

Files are compared byte for byte with those of a writer that was never lost.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helios_cp.files.chunk_files import ChunkFiles
from helios_cp.files.mp4 import encode_segment
from launchers.driver.timeline import Event, draw, overlap, union
from launchers.messages.arrays import Array
from launchers.messages.messages import Decoded, Span, VideoFiles
from launchers.workers.writer import VideoWriter
from tests.launchers.conftest import frames_in

CHUNKS = 3


@pytest.fixture(scope="module")
def decoded():
    generator = torch.Generator().manual_seed(0)
    videos = [torch.randint(0, 256, (5, 32, 32, 3), generator=generator, dtype=torch.uint8) for _ in range(CHUNKS)]
    return [Decoded((np.frombuffer(encode_segment(video, 24), np.uint8),), Span(0, 0, {})) for video in videos]


@pytest.fixture(scope="module")
def whole(decoded, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "a.mp4"
    files = ChunkFiles(path.parent)
    for index, chunk in enumerate(decoded):
        files.save(index, [chunk.segments[0].tobytes()])
    files.join([path])
    return path.read_bytes()


def files_of(*paths: Path, latents: Path | None = None) -> VideoFiles:
    return VideoFiles(0, paths, ChunkFiles.beside(paths), latents)


def write(writer: VideoWriter, files: VideoFiles, chunk: int, decoded):
    return writer.write(files, chunk, chunk + 1 == CHUNKS, decoded[chunk], None, None, None)


@pytest.mark.parametrize("lost", range(CHUNKS))
@pytest.mark.parametrize("heard", [True, False], ids=["after the answer", "before the answer"])
def test_a_lost_writer_changes_no_byte(decoded, whole, tmp_path, lost, heard):
    """Lost once it has written chunk `lost`, for the last chunk once it has closed the file."""
    files = files_of(tmp_path / "a.mp4")
    writer = VideoWriter()
    chunk = 0
    while chunk < CHUNKS:
        write(writer, files, chunk, decoded)
        if chunk == lost:
            writer, lost = VideoWriter(), None
            if not heard:
                continue
        chunk += 1
    assert files.paths[0].read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize("finished", range(CHUNKS + 1))
def test_a_video_that_ends_early_has_what_was_written(decoded, tmp_path, finished):
    """By a writer that never saw the chunks; and once more, of a file that is finished already."""
    files = files_of(tmp_path / "a.mp4")
    for chunk in range(finished):
        write(VideoWriter(), files, chunk, decoded)
    for _ in range(2):
        VideoWriter().close(files)
        assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"] * (finished > 0)
        assert not finished or frames_in(files.paths[0]) == 5 * finished


def test_latents_are_written_as_they_come(decoded, tmp_path):
    files = files_of(tmp_path / "a.mp4", latents=tmp_path / "l.safetensors")
    chunks = [torch.full((1, 2, 3, 4, 4), float(chunk)) for chunk in range(CHUNKS)]
    for chunk, latents in enumerate(chunks):
        VideoWriter().write(files, chunk, chunk + 1 == CHUNKS, decoded[chunk], Array.of(latents), None, None)
    assert load_file(tmp_path / "l.safetensors")["latents"].equal(torch.cat(chunks, dim=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "l.safetensors"]


EVENTS = [
    Event("group", "denoise", 0, 0, 0.0, 2.0),
    Event("group", "denoise", 0, 1, 2.0, 4.0),
    Event("decoder", "decode", 0, 0, 3.0, 5.0),
    Event("writer", "write", 0, 0, 5.0, 6.0),
]


def test_union():
    assert union([(3, 5), (0, 2), (1, 2.5), (5, 6)]) == [(0, 2.5), (3, 6)]


def test_overlap():
    assert overlap(EVENTS) == pytest.approx(1 / 3)  # one of three seconds
    assert overlap(EVENTS[:2]) is None


def test_draw(tmp_path):
    draw(EVENTS, tmp_path / "new" / "a.png", {"group": "host", "decoder": "host", "writer": "host"})
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to draw"):
        draw([], tmp_path / "b.png")
