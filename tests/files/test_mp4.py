"""Unit tests of MP4 segments and of joining them.

What is decoded is compared with what was encoded by PSNR. At crf 18 a panned photograph of 64x64 comes back above
31 dB, most of the loss being chroma at half the resolution, while neighbouring frames are at most 19 dB alike: a bound
of 25 dB holds for the right frame and fails for its neighbours. All else is exact: counts, timestamps and bytes.
"""

from __future__ import annotations

import io
import os
from fractions import Fraction
from pathlib import Path

import av
import pytest
import skimage.data
import torch

from helios_cp.files import mp4 as video
from helios_cp.files.chunk_files import ChunkFiles
from helios_cp.files.mp4 import encode_segment, frame_rate

SIZE = 64
CHUNK = 33
FPS = 24
PSNR_BOUND = 25.0


def pan(frames: int, start: int = 0) -> torch.Tensor:
    """A camera that moves over a photograph, two pixels down and to the right a frame: uint8 [T, 64, 64, 3]."""
    photograph = torch.from_numpy(skimage.data.astronaut())
    steps = range(start, start + frames)
    return torch.stack([photograph[160 + t * 2 :, 80 + t * 2 :][:SIZE, :SIZE] for t in steps])


@pytest.fixture(scope="module")
def source() -> torch.Tensor:
    return pan(4 * CHUNK)


@pytest.fixture(scope="module")
def segments(source: torch.Tensor) -> list[bytes]:
    return [encode_segment(chunk, FPS) for chunk in source.split(CHUNK)]


@pytest.fixture(scope="module")
def reference(segments: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The MP4 that a run without any interruption writes."""
    return written(tmp_path_factory.mktemp("reference") / "out.mp4", segments)


def written(path: Path, segments: list[bytes]) -> bytes:
    """The MP4 of a few segments."""
    files = ChunkFiles.beside([path])
    for index, segment in enumerate(segments):
        files.save(index, [segment])
    files.join([path])
    files.remove()
    return path.read_bytes()


def decoded(file: Path | bytes) -> torch.Tensor:
    """Every frame as uint8 [T, H, W, 3]."""
    with av.open(io.BytesIO(file) if isinstance(file, bytes) else str(file)) as container:
        frames = [f.to_ndarray(format="rgb24", interpolation=video.EXACT_CONVERSION) for f in container.decode(video=0)]
    return torch.stack([torch.from_numpy(frame) for frame in frames])


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each frame in dB."""
    return 10 * torch.log10(255**2 / (a.double() - b.double()).square().mean(dim=(1, 2, 3)))


def boxes(data: bytes) -> list[str]:
    """Names of the top-level boxes of an MP4."""
    names, position = [], 0
    while position < len(data):
        names.append(data[position + 4 : position + 8].decode())
        position += int.from_bytes(data[position : position + 4], "big")
    return names


# Segments


def test_the_same_frames_give_the_same_bytes(source, segments):
    assert encode_segment(source[:CHUNK].clone(), FPS) == segments[0]


def test_a_segment_decodes_alone(source, segments):
    for chunk, segment in zip(source.split(CHUNK), segments, strict=True):
        assert psnr(decoded(segment), chunk).min() > PSNR_BOUND


def test_a_segment_of_one_frame(source):
    assert decoded(encode_segment(source[:1], FPS)).shape == (1, SIZE, SIZE, 3)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux binds a process to one core")
def test_bytes_do_not_depend_on_the_number_of_cores(monkeypatch):
    frames = pan(CHUNK).repeat(1, 4, 4, 1)  # large enough for x264 to use several threads
    cores = os.sched_getaffinity(0)

    def on_one_core() -> bytes:
        os.sched_setaffinity(0, {min(cores)})
        try:
            return encode_segment(frames, FPS)
        finally:
            os.sched_setaffinity(0, cores)

    assert encode_segment(frames, FPS) == on_one_core()
    if len(cores) > 1:
        monkeypatch.setattr(video, "ENCODER_THREADS", 0)  # as many as there are cores
        assert encode_segment(frames, FPS) != on_one_core()


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 100, 50)])
def test_colours_come_back(colour, monkeypatch):
    """Uniform frames, so chroma resolution plays no part: 8-bit YUV in TV range is off by at most 2 levels."""
    frames = torch.tensor(colour, dtype=torch.uint8).expand(2, SIZE, SIZE, 3)

    def error() -> int:
        return (decoded(encode_segment(frames, FPS)).int() - frames.int()).abs().max().item()

    assert error() <= 2
    if len(set(colour)) > 1:
        # Converted by another matrix than the one that the tags name, the same colours are far off.
        monkeypatch.setattr(video, "Colorspace", type("Wrong", (), {"ITU709": video.Colorspace.ITU601}))
        assert error() > 4


@pytest.mark.parametrize(
    "frames",
    [
        torch.zeros(2, SIZE, SIZE, 3),
        torch.zeros(SIZE, SIZE, 3, dtype=torch.uint8),
        torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8),
        torch.zeros(0, SIZE, SIZE, 3, dtype=torch.uint8),
        torch.zeros(2, SIZE, SIZE + 1, 3, dtype=torch.uint8),
    ],
)
def test_other_frames_are_refused(frames):
    with pytest.raises(ValueError, match="frames"):
        encode_segment(frames, FPS)


# The finished file


def test_every_frame_is_there_once_and_in_order(source, reference):
    frames = decoded(reference)
    assert len(frames) == len(source)
    assert psnr(frames, source).min() > PSNR_BOUND
    # A file with one frame lost, or one shown twice, would not pass.
    assert psnr(frames[:-1], source[1:]).max() < PSNR_BOUND


@pytest.mark.parametrize("fps", [24, 1, 60, 23.976, 29.97, Fraction(30000, 1001)])
def test_format_and_timestamps(tmp_path, fps):
    rate = frame_rate(fps)
    lengths = (CHUNK, 1, 5)
    written(tmp_path / "out.mp4", [encode_segment(pan(length), fps) for length in lengths])
    with av.open(str(tmp_path / "out.mp4")) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.codec.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (context.width, context.height) == (SIZE, SIZE)
        bt709, tv_range = 1, 1
        assert (context.color_primaries, context.color_trc, context.colorspace) == (bt709,) * 3
        assert context.color_range == tv_range
        assert stream.average_rate == rate
        assert stream.frames == sum(lengths)
        assert stream.duration * stream.time_base == sum(lengths) / rate
        packets = [packet for packet in container.demux(stream) if packet.dts is not None]
    assert [packet.pts * packet.time_base * rate for packet in packets] == list(range(sum(lengths)))
    assert [packet.dts for packet in packets] == [packet.pts for packet in packets]
    assert {packet.duration * packet.time_base * rate for packet in packets} == {1}
    assert {0, CHUNK, CHUNK + 1} <= {index for index, packet in enumerate(packets) if packet.is_keyframe}


def test_the_index_comes_first(reference):
    names = boxes(reference)
    assert names.index("moov") < names.index("mdat") and "moof" not in names


@pytest.mark.parametrize(("fps", "rate"), [(24, 24), (23.976, Fraction(2997, 125)), (Fraction(30000, 1001),) * 2])
def test_frame_rate(fps, rate):
    assert frame_rate(fps) == rate


@pytest.mark.parametrize("fps", [0, -24, float("nan"), float("inf"), 1e-9])
def test_frame_rates_that_no_file_has(fps):
    with pytest.raises(ValueError, match="fps"):
        frame_rate(fps)


def test_only_the_file_is_left(tmp_path, segments):
    written(tmp_path / "new" / "folder" / "out.mp4", segments[:1])
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["out.mp4"]


def test_a_name_that_ffmpeg_would_take_for_a_protocol(tmp_path, segments, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(decoded(written(Path("http:out%03d.mp4"), segments[:1]))) == CHUNK


@pytest.mark.parametrize("other", ["size", "rate", "B-frames", "no video"])
def test_segments_that_do_not_belong_together(tmp_path, source, segments, other, monkeypatch):
    """An earlier file stays, and so do the segments."""
    path = tmp_path / "out.mp4"
    path.write_bytes(b"earlier")
    if other == "B-frames":  # their timestamps would not survive the joining
        monkeypatch.setitem(video.ENCODER_OPTIONS, "bf", "2")
    frames = source[:CHUNK, :32] if other == "size" else source[:CHUNK]
    odd = b"no video" if other == "no video" else encode_segment(frames, 25 if other == "rate" else FPS)
    files = ChunkFiles.beside([path])
    files.save(0, [odd if other == "B-frames" else segments[0]])
    files.save(1, [odd])
    with pytest.raises((ValueError, av.FFmpegError)) as caught:
        files.join([path])
    assert other in ("size", "rate", "no video") or "B-frames" in str(caught.value)
    assert path.read_bytes() == b"earlier" and files.count() == 2
    assert sorted(each.name for each in tmp_path.iterdir()) == [".out.mp4.chunks", "out.mp4"]
