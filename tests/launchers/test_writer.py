"""Unit, without a cluster: a writer that is lost at any moment, and the figures of a timeline.

Files are compared byte for byte with those of a writer that was never lost.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helios_cp.files.mp4 import Mp4Writer, encode_segment
from launchers.driver.timeline import Event, draw, overlap, union
from launchers.messages.messages import Decoded, Span, Target
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
    with Mp4Writer(path, 24) as writer:
        for chunk in decoded:
            writer.append(chunk.segments[0].tobytes())
    return path.read_bytes()


def write(writer: VideoWriter, target: Target, before, chunk: int, decoded):
    return writer.write(target, before, chunk, chunk + 1 == CHUNKS, decoded[chunk], None, None)


@pytest.mark.parametrize("lost", range(CHUNKS))
@pytest.mark.parametrize("heard", [True, False], ids=["after the answer", "before the answer"])
def test_a_lost_writer_changes_no_byte(decoded, whole, tmp_path, lost, heard):
    """Lost once it has written chunk `lost`, for the last chunk once it has closed the file."""
    target = Target(0, (tmp_path / "a.mp4",), 24, None)
    writer, before = VideoWriter(), None
    chunk = 0
    while chunk < CHUNKS:
        answer = write(writer, target, before, chunk, decoded)
        if chunk == lost:
            writer, lost = VideoWriter(), None
            if not heard:
                continue
        before, chunk = answer, chunk + 1
    assert target.paths[0].read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_half_a_fragment_is_cut_off(decoded, whole, tmp_path):
    """A writer that is lost in the middle of a write leaves a torn file."""
    target = Target(0, (tmp_path / "a.mp4",), 24, None)
    before = write(VideoWriter(), target, None, 0, decoded)
    partial = next(tmp_path.glob(".*"))
    with partial.open("ab") as file:
        file.write(b"torn" * 100)
    writer = VideoWriter()
    for chunk in (1, 2):
        before = write(writer, target, before, chunk, decoded)
    assert target.paths[0].read_bytes() == whole


def test_a_missing_file_in_the_middle_is_an_error(decoded, tmp_path):
    target = Target(0, (tmp_path / "a.mp4",), 24, None)
    before = write(VideoWriter(), target, None, 0, decoded)
    next(tmp_path.glob(".*")).unlink()
    with pytest.raises(FileNotFoundError):
        write(VideoWriter(), target, before, 1, decoded)


@pytest.mark.parametrize("finished", [0, 1, 2])
@pytest.mark.parametrize("heard", [True, False], ids=["after the answer", "before the answer"])
def test_a_video_that_ends_while_its_writer_is_lost(decoded, tmp_path, finished, heard):
    """What was answered is in the finished file, what was not may be lost, and nothing hidden is left."""
    target = Target(0, (tmp_path / "a.mp4",), 24, None)
    writer, before = VideoWriter(), None
    for chunk in range(finished):
        before = write(writer, target, before, chunk, decoded)
    if not heard:
        write(writer, target, before, finished, decoded)
    VideoWriter().close(target, before)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"] * (finished > 0 or (not heard and finished == 2))
    if finished:
        assert frames_in(target.paths[0]) == 5 * (CHUNKS if finished == 2 and not heard else finished)
    VideoWriter().close(target, before)  # of a file that is finished already


def test_one_file_that_cannot_be_finished_leaves_no_other_open(decoded, tmp_path):
    paths = tmp_path / "a.mp4", tmp_path / "b.mp4"
    target, both = Target(0, paths, 24, None), Decoded(decoded[0].segments * 2, Span(0, 0, {}))
    writer = VideoWriter()
    writer.write(target, None, 0, False, both, None, None)
    (tmp_path / ".b.mp4.partial").unlink()
    with pytest.raises(FileNotFoundError):
        writer.close(target, None)
    assert frames_in(paths[0]) == 5 and not writer._open


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
