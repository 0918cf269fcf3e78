"""Unit: fragments of MP4 made from segments, as players read them; PyAV is the player."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from helios_cp.files.mp4 import encode_segment, join_segments
from launchers.serve.media import fragments
from launchers.serve.media.fragments import boxes, decode_time, find, fragment, mime, timescale

FRAMES = 33
RATES = [24, 16, 23.976, 29.97, 59.94, 1, 1000]


def segments(count: int, fps: float = 24, frames: int = FRAMES) -> list[bytes]:
    """Moving noise, so that each frame differs from the last."""
    noise = np.random.default_rng(0).integers(0, 256, (count, frames, 64, 64, 3), dtype=np.uint8)
    return [encode_segment(torch.from_numpy(chunk), fps) for chunk in noise]


def in_order(parts: list[bytes], fps: float = 24) -> list[fragments.Fragment]:
    return [fragment(part, FRAMES * number, number) for number, part in enumerate(parts)]


def times(content: bytes) -> list[Fraction]:
    """When each frame is shown, in seconds."""
    with av.open(io.BytesIO(content)) as container:
        return [frame.pts * frame.time_base for frame in container.decode(video=0)]


def pixels(content: bytes | str) -> np.ndarray:
    with av.open(io.BytesIO(content) if isinstance(content, bytes) else content) as container:
        return np.stack([frame.to_ndarray(format="yuv420p") for frame in container.decode(video=0)])


@pytest.fixture(scope="module")
def parts() -> list[bytes]:
    return segments(3)


@pytest.mark.parametrize("fps", RATES)
def test_fragments_are_one_continuous_video(fps):
    made = in_order(segments(2, fps, FRAMES))
    shown = times(made[0].init + made[0].media + made[1].media)
    tick = 1 / Fraction(fps).limit_denominator(1001)
    assert shown == [number * tick for number in range(2 * FRAMES)]


def test_pixels_are_those_of_the_joined_segments(parts, tmp_path):
    made = in_order(parts)
    files = [tmp_path / f"{number}.mp4" for number in range(len(parts))]
    for file, part in zip(files, parts, strict=True):
        file.write_bytes(part)
    join_segments(files, tmp_path / "joined.mp4")
    whole = made[0].init + b"".join(each.media for each in made)
    assert np.array_equal(pixels(whole), pixels(str(tmp_path / "joined.mp4")))


def test_all_segments_give_the_same_initialization(parts):
    assert len({each.init for each in in_order(parts)}) == 1


def test_a_late_viewer_needs_the_initialization_and_the_newest_alone(parts):
    made = in_order(parts)
    shown = times(made[0].init + made[2].media)
    assert len(shown) == FRAMES
    assert shown[0] == Fraction(2 * FRAMES, 24)


def test_each_begins_with_a_key_frame(parts):
    for each in in_order(parts):
        with av.open(io.BytesIO(each.init + each.media)) as container:
            first = next(container.demux(video=0))
            assert first.is_keyframe


def test_a_fragment_is_one_moof_and_one_mdat(parts):
    for number, each in enumerate(in_order(parts)):
        assert [box.kind for box in boxes(each.media)] == ["moof", "mdat"]
        assert [box.kind for box in boxes(each.init)] == ["ftyp", "moov"]
        begin = find(each.media, ("moof", "mfhd")).begin
        assert int.from_bytes(each.media[begin + 12 : begin + 16]) == number + 1
        assert Fraction(decode_time(each.media), timescale(each.init)) == Fraction(number * FRAMES, 24)
        assert each.frames == FRAMES


def test_without_its_decode_time_a_fragment_comes_too_early(parts, monkeypatch):
    """What the test of continuity would see."""
    monkeypatch.setattr(fragments, "_write", lambda *_: None)
    made = in_order(parts)
    shown = times(made[0].init + made[0].media + made[1].media)
    assert shown != sorted(set(shown)) or len(shown) != 2 * FRAMES


def test_the_codec_is_named_as_browsers_want_it(parts):
    assert mime(in_order(parts)[0].init).startswith('video/mp4; codecs="avc1.64')


@pytest.mark.parametrize("content", [b"", b"no video", b"\0\0\0\x08ftyp", bytes(1000)])
def test_what_is_no_segment_is_refused(content):
    with pytest.raises(ValueError, match="no segment"):
        fragment(content, 0, 0)


@pytest.mark.parametrize("content", [b"\0\0\0\x04abcd", b"\0\0\0\xffabcd", b"\0\0"])
def test_what_is_no_box_is_refused(content):
    with pytest.raises(ValueError, match="no box"):
        list(boxes(content))
    with pytest.raises(ValueError, match="no box"):
        find(b"\0\0\0\x08free", ("moov",))
