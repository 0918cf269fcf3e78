"""Unit tests of the MP4 writer (one process; one test kills a child process).

What is decoded is compared with what was encoded by PSNR. At crf 18 a panned photograph of 64x64 comes back above
31 dB, most of the loss being chroma at half the resolution, while neighbouring frames are at most 19 dB alike: a bound
of 25 dB holds for the right frame and fails for its neighbours. All else is exact: counts, timestamps and bytes.
"""

from __future__ import annotations

import contextlib
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import tracemalloc
import weakref
from fractions import Fraction
from pathlib import Path

import av
import pytest
import skimage.data
import torch

from helios_cp.files import mp4 as video
from helios_cp.files.mp4 import Mp4Writer, encode_segment, frame_rate

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


def written(path: Path, segments: list[bytes], fps: float | Fraction = FPS) -> bytes:
    with Mp4Writer(path, fps) as writer:
        for segment in segments:
            writer.append(segment)
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
    written(tmp_path / "out.mp4", [encode_segment(pan(length), fps) for length in lengths], fps)
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


def test_segments_that_do_not_belong_together(tmp_path, source, segments):
    with Mp4Writer(tmp_path / "out.mp4", FPS) as writer:
        writer.append(segments[0])
        with pytest.raises(ValueError, match="another size"):
            writer.append(encode_segment(source[:5, :32], FPS))
        with pytest.raises(ValueError, match="25 frames per second, the writer 24"):
            writer.append(encode_segment(source[:5], 25))
        with pytest.raises(ValueError):
            writer.append(b"no video")
    assert (writer.segments, writer.frames) == (1, CHUNK)
    assert len(decoded(tmp_path / "out.mp4")) == CHUNK


def test_b_frames_are_refused(tmp_path, source, monkeypatch):
    """Their timestamps would not survive the joining, which is why segments have none."""
    monkeypatch.setitem(video.ENCODER_OPTIONS, "bf", "2")
    with Mp4Writer(tmp_path / "out.mp4", FPS) as writer, pytest.raises(ValueError, match="B-frames"):
        writer.append(encode_segment(source[:CHUNK], FPS))


def test_a_closed_writer_takes_nothing(tmp_path, segments):
    with Mp4Writer(tmp_path / "out.mp4", FPS) as writer:
        writer.append(segments[0])
    writer.close()
    with pytest.raises(ValueError, match="closed"):
        writer.append(segments[1])
    assert len(decoded(tmp_path / "out.mp4")) == CHUNK


# Stopping and going on


def test_the_partial_file_is_playable_after_every_chunk(tmp_path, source, segments):
    with Mp4Writer(tmp_path / "out.mp4", FPS) as writer:
        for count, segment in enumerate(segments, start=1):
            writer.append(segment)
            frames = decoded(writer.partial)
            assert len(frames) == count * CHUNK
            assert psnr(frames, source[: count * CHUNK]).min() > PSNR_BOUND
            assert not writer.path.exists()
            data = writer.partial.read_bytes()
            assert boxes(data) == ["ftyp", "moov"] + ["moof", "mdat"] * count
            # A fragment's number follows the 4 bytes of flags of its `mfhd` box, and counts from 1.
            numbers = [int.from_bytes(part[4:8], "big") for part in data.split(b"mfhd")[1:]]
            assert numbers == list(range(1, count + 1))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_finishes_the_chunks_so_far(tmp_path, segments, error):
    with pytest.raises(error), Mp4Writer(tmp_path / "out.mp4", FPS) as writer:
        writer.append(segments[0])
        writer.append(segments[1])
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    assert (tmp_path / "out.mp4").read_bytes() == written(tmp_path / "same.mp4", segments[:2])


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_without_a_chunk_nothing_is_left(tmp_path, error):
    with contextlib.suppress(RuntimeError, KeyboardInterrupt), Mp4Writer(tmp_path / "folder" / "out.mp4", FPS):
        if error:
            raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("done", [1, 2, 3])
def test_a_second_writer_gives_the_same_bytes(tmp_path, segments, reference, done):
    with pytest.raises(RuntimeError), Mp4Writer(tmp_path / "out.mp4", FPS) as writer:
        for segment in segments[:done]:
            writer.append(segment)
        raise RuntimeError
    assert written(tmp_path / "out.mp4", segments) == reference
    # The bytes tell a lost or repeated chunk.
    assert written(tmp_path / "wrong.mp4", segments[done:]) != reference
    assert written(tmp_path / "wrong.mp4", [segments[0], *segments]) != reference


def test_an_earlier_file_stays_until_the_new_one_is_complete(tmp_path, segments, monkeypatch):
    path = tmp_path / "out.mp4"
    earlier = written(path, segments[:1])
    with Mp4Writer(path, FPS) as writer:
        writer.append(segments[1])
        assert path.read_bytes() == earlier
    assert path.read_bytes() != earlier


def test_a_failure_to_finish_leaves_the_partial_file(tmp_path, segments, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(video.os, "replace", fail)
    with pytest.raises(OSError, match="no space left"), Mp4Writer(tmp_path / "out.mp4", FPS) as writer:
        writer.append(segments[0])
    assert [path for path in tmp_path.iterdir()] == [writer.partial]
    assert len(decoded(writer.partial)) == CHUNK
    # While another error is under way, that one is shown.
    with pytest.raises(KeyboardInterrupt), Mp4Writer(tmp_path / "out.mp4", FPS) as writer:
        writer.append(segments[0])
        raise KeyboardInterrupt
    assert len(decoded(writer.partial)) == CHUNK


def test_a_full_disk_costs_only_the_chunk_that_does_not_fit(tmp_path, segments):
    """A limit on the size of files makes the kernel refuse the rest of a fragment, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Mp4Writer(tmp_path / "out.mp4", FPS) as writer:
        writer.append(segments[0])
        size = writer.partial.stat().st_size
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, hard))
            with pytest.raises(OSError):
                writer.append(segments[1])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert writer.partial.stat().st_size == size
        writer.append(segments[1])
    assert (tmp_path / "out.mp4").read_bytes() == written(tmp_path / "same.mp4", segments[:2])


WRITE_FOREVER = """
import sys
from helios_cp.files.mp4 import Mp4Writer
segments = [open(path, "rb").read() for path in sys.argv[2:]]
with Mp4Writer(sys.argv[1], 24) as writer:
    while True:
        for segment in segments:
            writer.append(segment)
            print(writer.segments, flush=True)
"""


def test_a_killed_process_leaves_a_playable_file_and_can_be_continued(tmp_path, source, segments, reference):
    files = [tmp_path / f"{index}.segment" for index in range(len(segments))]
    for file, segment in zip(files, segments, strict=True):
        file.write_bytes(segment)
    path = tmp_path / "video" / "out.mp4"
    command = [sys.executable, "-c", WRITE_FOREVER, str(path), *map(str, files)]
    root = Path(video.__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as child:
        try:
            assert [next(child.stdout).strip() for _ in range(3)] == ["1", "2", "3"]
        finally:
            child.send_signal(signal.SIGKILL)
    partial = video.partial_path(path)
    assert [entry.name for entry in path.parent.iterdir()] == [partial.name]
    index = -1
    # The kill may have cut the fragment that was being written, which the decoder says when it gets there.
    with av.open(str(partial)) as container, contextlib.suppress(av.FFmpegError):
        for index, frame in enumerate(container.decode(video=0)):
            if index == 3 * CHUNK:
                break
            rgb = torch.from_numpy(frame.to_ndarray(format="rgb24", interpolation=video.EXACT_CONVERSION))
            assert psnr(rgb[None], source[index][None]).item() > PSNR_BOUND
    assert index >= 3 * CHUNK - 1
    assert written(path, segments) == reference


def test_a_partial_file_cut_in_the_middle_of_a_chunk_plays_up_to_there(tmp_path, segments):
    """What a kill in the middle of a write leaves: the fragment's table is there, part of its frames is not."""
    with contextlib.suppress(RuntimeError), Mp4Writer(tmp_path / "out.mp4", FPS) as writer:
        writer.append(segments[0])
        whole = writer.partial.stat().st_size
        writer.append(segments[1])
        cut = (whole + writer.partial.stat().st_size) // 2
        shutil.copy(writer.partial, tmp_path / "cut.mp4")
    os.truncate(tmp_path / "cut.mp4", cut)
    count = 0
    with av.open(str(tmp_path / "cut.mp4")) as container, contextlib.suppress(av.InvalidDataError):
        for _ in container.decode(video=0):
            count += 1
    assert CHUNK <= count < 2 * CHUNK


# Memory


class Segment(bytearray):
    """Bytes that can be watched by a weak reference."""


class Hoarder(Mp4Writer):
    """A writer that is broken on purpose: it keeps its segments."""

    def append(self, segment: bytes) -> None:
        self.kept = [*getattr(self, "kept", []), segment]
        super().append(segment)


def growth(writer: Mp4Writer, segment: bytes, appends: int) -> tuple[int, int]:
    """What `appends` more segments leave behind: segments alive, and bytes on Python's heap."""
    watched = []

    def append(times: int) -> None:
        for _ in range(times):
            each = Segment(segment)
            watched.append(weakref.ref(each))
            writer.append(each)

    tracemalloc.start()
    try:
        append(10)  # caches and pools fill first
        heap = tracemalloc.get_traced_memory()[0]
        append(appends)
        del append
        heap = tracemalloc.get_traced_memory()[0] - heap
    finally:
        tracemalloc.stop()
    return sum(reference() is not None for reference in watched), heap


def test_memory_does_not_grow_with_the_number_of_chunks(tmp_path):
    """200 segments of more than 50 kB pass through, and at most half of one may stay on the heap."""
    noise = torch.randint(0, 256, (CHUNK, SIZE, SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    segment = encode_segment(noise, FPS)
    assert len(segment) > 50_000
    with Mp4Writer(tmp_path / "out.mp4", FPS) as writer:
        alive, heap = growth(writer, segment, appends=200)
        assert alive == 0
        assert heap < len(segment) // 2
    with Hoarder(tmp_path / "hoard.mp4", FPS) as hoarder:
        alive, heap = growth(hoarder, segment, appends=20)
        assert alive == 30
        assert heap > 19 * len(segment)
