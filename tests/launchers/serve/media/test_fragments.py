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
from launchers.serve.media.fragments import fragment, mime

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


def boxes(content: bytes) -> dict[str, bytes]:
    """Kind -> content of boxes that lie side by side, in order."""
    found, at = {}, 0
    while at < len(content):
        size = int.from_bytes(content[at : at + 4])
        found[content[at + 4 : at + 8].decode()] = content[at + 8 : at + size]
        at += size
    return found


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
        init, media = boxes(each.init), boxes(each.media)
        assert list(media) == ["moof", "mdat"]
        assert list(init) == ["ftyp", "moov"]
        moof = boxes(media["moof"])
        assert int.from_bytes(moof["mfhd"][4:8]) == number + 1
        begins = int.from_bytes(boxes(moof["traf"])["tfdt"][4:12])
        track = boxes(boxes(init["moov"])["trak"])
        ticks_a_second = int.from_bytes(boxes(track["mdia"])["mdhd"][12:16])
        assert Fraction(begins, ticks_a_second) == Fraction(number * FRAMES, 24)
        assert each.frames == FRAMES


def test_without_its_decode_time_a_fragment_comes_too_early(parts, monkeypatch):
    """What the test of continuity would see."""
    monkeypatch.delitem(fragments.OPTIONS, "avoid_negative_ts")
    made = in_order(parts)
    shown = times(made[0].init + made[0].media + made[1].media)
    assert shown != sorted(set(shown)) or len(shown) != 2 * FRAMES


def test_the_codec_is_named_as_browsers_want_it(parts):
    assert mime(in_order(parts)[0].init).startswith('video/mp4; codecs="avc1.64')


@pytest.mark.parametrize("content", [b"", b"no video", b"\0\0\0\x08ftyp", bytes(1000)])
def test_what_is_no_segment_is_refused(content):
    with pytest.raises(ValueError, match="no segment"):
        fragment(content, 0, 0)
