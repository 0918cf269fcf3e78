"""Unit: clips look as FFmpeg's own program shows them; long clips, odd clips, and what is told of them.

FFmpeg turns, mirrors and converts to RGB by itself. Both convert by the same library, so frames are equal to one grey
level of rounding.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
import weakref
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from helios_cp.config.errors import RequestError
from helios_cp.files import clips, pictures
from helios_cp.files.clips import check_video, clip_remarks, read_ends, read_video
from helios_cp.files.given import clip_ends, to_video_tensor
from helios_cp.files.pictures import open_picture, picture_remarks, read_image

HEIGHT, WIDTH = 48, 64
UNIT = {0: 1 << 16, 1: 1 << 16, 2: 1 << 30}
"""Of the display matrix: 16.16 in its first two columns, 2.30 in the third."""

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="the program ffmpeg is not installed")


def corners(index: int = 0) -> np.ndarray:
    """A picture that no turn and no mirror leaves as it is: uint8 [48, 64, 3]."""
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    picture[:24, :32], picture[:24, 32:] = (220, 30, 30), (30, 220, 30)
    picture[24:, :32], picture[24:, 32:] = (30, 30, 220), (230, 230, 230)
    picture[20:28, (3 * index) % 64] = 0
    return picture


def write(
    path: Path, codec: str = "libx264", pix_fmt: str = "yuv420p", frames: int = 3, rate: int = 24, **options
) -> Path:
    """A clip of `corners`; where it has an alpha channel, its middle is transparent. `options` are the encoder's."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=rate, options={key: str(value) for key, value in options.items()})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pix_fmt
        for index in range(frames):
            alpha = np.full((HEIGHT, WIDTH, 1), 255, np.uint8)
            alpha[12:36, 16:48] = 0
            rgba = np.concatenate([corners(index), alpha], axis=2)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(rgba, format="rgba").reformat(format=pix_fmt)))
        file.mux(stream.encode())
    return path


def as_ffmpeg_shows(
    path: Path, height: int = HEIGHT, width: int = WIDTH, pix_fmt: str = "rgb24", decoder: tuple[str, ...] = ()
) -> np.ndarray:
    """The frames of a clip by the program, uint8 [T, H, W, C], converted as exactly as it can."""
    command = ["ffmpeg", "-v", "error", *decoder, "-i", str(path), "-sws_flags", "accurate_rnd+full_chroma_int+bicubic"]
    command += ["-f", "rawvideo", "-pix_fmt", pix_fmt, "-"]
    raw = subprocess.run(command, check=True, capture_output=True).stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, len(pix_fmt.removesuffix("24")))


def as_read(path: Path, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """The frames of a clip by our reader at their own size, [T, H, W, 3] in 0 to 255."""
    return ((read_video(path, height, width)[0].movedim(0, -1) + 1) * 127.5).numpy()


def inside(frames: np.ndarray) -> np.ndarray:
    """The middles of the four corners, where chroma of neighbours does not reach."""
    height, width = frames.shape[1:3]
    rows, columns = [height // 8, height - height // 8], [width // 8, width - width // 8]
    return frames[:, rows][:, :, columns].astype(float)


def with_matrix(path: Path, turned: Path, values: tuple[float, ...]) -> Path:
    """The same clip with another display matrix in its track header."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    struct.pack_into(">9i", data, at, *(int(value * UNIT[place % 3]) for place, value in enumerate(values)))
    turned.write_bytes(data)
    return turned


ORIENTATIONS = {
    "straight": (1, 0, 0, 0, 1, 0, 0, 0, 1),
    "90": (0, 1, 0, -1, 0, 0, HEIGHT, 0, 1),
    "180": (-1, 0, 0, 0, -1, 0, WIDTH, HEIGHT, 1),
    "270": (0, -1, 0, 1, 0, 0, 0, WIDTH, 1),
    "mirrored": (-1, 0, 0, 0, 1, 0, WIDTH, 0, 1),
    "upside down": (1, 0, 0, 0, -1, 0, 0, HEIGHT, 1),
    "transposed": (0, 1, 0, 1, 0, 0, 0, 0, 1),
    "transverse": (0, -1, 0, -1, 0, 0, HEIGHT, WIDTH, 1),
}


@needs_ffmpeg
@pytest.mark.parametrize("name", ORIENTATIONS)
def test_all_eight_orientations(tmp_path, name, monkeypatch):
    path = with_matrix(write(tmp_path / "a.mp4"), tmp_path / "b.mp4", ORIENTATIONS[name])
    size = (WIDTH, HEIGHT) if name in ("90", "270", "transposed", "transverse") else (HEIGHT, WIDTH)
    expected = inside(as_ffmpeg_shows(path, *size))
    assert np.abs(inside(as_read(path, *size)) - expected).max() <= 1
    if name != "straight":
        monkeypatch.setattr(clips, "TURNS", {})
        assert np.abs(inside(as_read(path, *size)) - expected).max() > 100


@pytest.mark.parametrize("matrix", [(0,) * 9, (0.996, 0.087, 0, -0.087, 0.996, 0, 0, 0, 1)])
def test_a_matrix_that_turns_by_no_quarter_changes_nothing(tmp_path, matrix):
    path = write(tmp_path / "a.mp4")
    assert np.array_equal(as_read(with_matrix(path, tmp_path / "b.mp4", matrix)), as_read(path))


@needs_ffmpeg
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p", "yuvj420p", "yuv422p10le", "gray"])
@pytest.mark.parametrize("colorspace", ["bt709", "smpte170m", "bt2020nc"])
@pytest.mark.parametrize("color_range", ["tv", "pc"])
def test_matrices_and_ranges(tmp_path, pix_fmt, colorspace, color_range):
    path = write(tmp_path / "a.mp4", pix_fmt=pix_fmt, frames=1, colorspace=colorspace, color_range=color_range)
    assert np.abs(inside(as_read(path)) - inside(as_ffmpeg_shows(path))).max() <= 2


@needs_ffmpeg
@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "options", "decoder"),
    [
        ("a.webm", "libvpx-vp9", "yuva420p", {}, ("-c:v", "libvpx-vp9")),
        ("b.webm", "libvpx", "yuva420p", {"auto-alt-ref": 0}, ("-c:v", "libvpx")),
        ("a.mov", "prores_ks", "yuva444p10le", {"profile": "4444"}, ()),
        ("b.mov", "qtrle", "argb", {}, ()),
        ("c.mov", "png", "rgba", {}, ()),
        ("a.apng", "apng", "rgba", {}, ()),
    ],
)
def test_transparent_clips_are_laid_over_white(tmp_path, name, codec, pix_fmt, options, decoder):
    path = write(tmp_path / name, codec, pix_fmt, **options)
    shown = as_ffmpeg_shows(path, HEIGHT, WIDTH, "rgba", decoder).astype(float)
    opacity = shown[..., 3:] / 255
    found, expected = as_read(path), shown[..., :3] * opacity + 255 * (1 - opacity)
    assert np.abs(inside(found) - inside(expected)).max() <= 3
    assert (found[:, 20:28, 24:40] >= 253).all(), "the colours that are hidden show"


def test_the_main_stream_is_read_and_not_a_preview_before_it(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as file:
        preview, main = file.add_stream("mjpeg", rate=24), file.add_stream("libx264", rate=24)
        preview.width = preview.height = 32
        preview.pix_fmt = "yuvj420p"
        main.width, main.height, main.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        grey = np.full((32, 32, 3), 128, np.uint8)
        file.mux(preview.encode(av.VideoFrame.from_ndarray(grey).reformat(format="yuvj420p")))
        for index in range(10):
            file.mux(main.encode(av.VideoFrame.from_ndarray(corners(index)).reformat(format="yuv420p")))
        for stream in (preview, main):
            file.mux(stream.encode())
    check_video(path, 10)
    assert read_video(path, HEIGHT, WIDTH).shape[2] == 10


def test_joined_transport_streams_are_read_whole(tmp_path):
    first, second = write(tmp_path / "a.ts", frames=20), write(tmp_path / "b.ts", frames=21)
    joined = tmp_path / "c.ts"
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    with av.open(str(joined)) as file:
        assert any(packet.is_corrupt for packet in file.demux(video=0))
    check_video(joined, 41)


def test_a_transport_stream_that_lost_packets_is_refused(tmp_path):
    path = write(tmp_path / "a.ts", frames=20, qp=1)
    data, middle = path.read_bytes(), path.stat().st_size // 188 // 2 * 188
    path.write_bytes(data[:middle] + data[middle + 5 * 188 :])
    with pytest.raises(RequestError, match="corrupt"):
        check_video(path, 1)


# Long clips


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("clip") / "long.mkv", "ffv1", "yuv444p", frames=1200)


def test_the_ends_of_a_long_clip_take_the_memory_of_the_ends(long_clip, monkeypatch):
    """However long it is: of 1200 frames, 1 + 99 are resized, and one in its full size is held at a time."""
    pictures_made, alive = [], 0
    picture_of = clips._picture

    def counted(frame, pixel_width):
        nonlocal alive
        picture = picture_of(frame, pixel_width)
        pictures_made.append(weakref.ref(picture))
        alive = max(alive, sum(each() is not None for each in pictures_made))
        return picture

    monkeypatch.setattr(clips, "_picture", counted)
    ends = read_ends(long_clip, 16, 16, 99)
    assert (ends.count, ends.first.shape[2], ends.last.shape[2]) == (1200, 1, 99)
    assert len(pictures_made) == 100 and alive <= 2


def test_the_ends_are_those_of_the_whole_clip(long_clip, tmp_path):
    for path in (long_clip, write(tmp_path / "short.mkv", "ffv1", "yuv444p", frames=7)):
        whole, ends = read_video(path, 16, 16), read_ends(path, 16, 16, 9)
        assert torch.equal(ends.first, whole[:, :, :1]) and torch.equal(ends.last, whole[:, :, -9:])
        assert ends.count == whole.shape[2]


def test_ends_of_frames_in_memory():
    frames = [Image.fromarray(corners(index)) for index in range(5)]
    whole, ends = to_video_tensor(frames, 16, 16), clip_ends(frames, 16, 16, 3)
    assert torch.equal(ends.first, whole[:, :, :1]) and torch.equal(ends.last, whole[:, :, -3:]) and ends.count == 5


def test_a_clip_that_was_checked_is_counted_once(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", frames=5)
    check_video(path, 5)
    decoded = []
    decode = clips.decoded
    monkeypatch.setattr(clips, "decoded", lambda path: decoded.append(path) or decode(path))
    read_ends(path, 16, 16, 2)
    assert len(decoded) == 1
    write(path, frames=6)  # another file of the same name
    assert read_ends(path, 16, 16, 2).count == 6


# Shapes


@pytest.mark.parametrize("kind", ["picture", "clip"])
def test_resize_modes(tmp_path, kind):
    """A red square in the middle of a picture twice as wide as high, brought to a square."""
    wide = np.full((32, 64, 3), 255, np.uint8)
    wide[8:24, 24:40] = (255, 0, 0)
    read, path = read_image, tmp_path / "a.png"
    Image.fromarray(wide).save(path)
    if kind == "clip":
        path = tmp_path / "a.mkv"
        with av.open(str(path), "w") as file:
            stream = file.add_stream("ffv1", rate=24)
            stream.width, stream.height, stream.pix_fmt = 64, 32, "bgr0"
            file.mux([*stream.encode(av.VideoFrame.from_ndarray(wide)), *stream.encode()])
        read = lambda *arguments: read_video(*arguments)[:, :, 0]  # noqa: E731

    def red(mode: str) -> tuple[int, int]:
        found = read(path, 64, 64, mode)[0]
        is_red = (found[0] > 0) & (found[1] < 0)
        return int(is_red.any(1).sum()), int(is_red.any(0).sum())

    assert [red(mode) for mode in ("stretch", "crop", "fit")] == [(32, 16), (32, 32), (16, 16)]


def test_pixels_that_are_not_square(tmp_path):
    """Stored 64 × 48 and shown 128 × 48; FFmpeg calls the ratio of a pixel's sides its sample aspect ratio."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.sample_aspect_ratio = 2
        file.mux([*stream.encode(av.VideoFrame.from_ndarray(corners()).reformat(format="yuv420p")), *stream.encode()])
    assert not clip_remarks(path, 48, 128, "stretch", 24)
    assert "128 × 48 is stretched to 64 × 48" in clip_remarks(path, 48, 64, "stretch", 24)[0]
    assert torch.equal(read_video(path, 48, 64), read_video(path, 48, 64, "stretch"))
    cropped = read_video(path, 48, 64, "crop")[0, :, 0]
    assert cropped[0, 4, 4] > 0 > cropped[1, 4, 4] and cropped[1, 4, -5] > 0 > cropped[0, 4, -5]


# What is told


def test_remarks(tmp_path):
    picture, clip = tmp_path / "a.png", write(tmp_path / "a.mp4", rate=60)
    Image.fromarray(corners()).save(picture)
    assert not picture_remarks(picture, 384, 512, "stretch") and not picture_remarks(picture, 384, 1024, "crop")
    (remark,) = picture_remarks(picture, 384, 1024, "stretch")
    assert "64 × 48 is stretched to 1024 × 384, 2.0 times as wide" in remark and "--resize-mode crop or fit" in remark
    (remark,) = clip_remarks(clip, 384, 512, "stretch", 24)
    assert "60 frames a second" in remark and "slower; give --fps 60" in remark
    assert not clip_remarks(clip, 384, 512, "stretch", 60)


@pytest.mark.parametrize(("transfer", "number"), [("PQ", "smpte2084"), ("HLG", "arib-std-b67")])
def test_hdr_is_told(tmp_path, transfer, number):
    path = write(tmp_path / "a.mp4", pix_fmt="yuv420p10le", color_trc=number)
    (remark,) = clip_remarks(path, 384, 512, "stretch", 24)
    assert f"HDR ({transfer})" in remark and "white looks grey" in remark


# Pictures that Pillow's limits refuse


@pytest.mark.parametrize("compressed", [True, False])
def test_a_png_with_a_workflow_in_it(tmp_path, compressed):
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "{" + "x" * 3_000_000, zip=compressed)
    Image.fromarray(corners()).save(tmp_path / "a.png", pnginfo=info)
    assert torch.equal(read_image(tmp_path / "a.png", 48, 64), read_image(plain(tmp_path), 48, 64))


def test_a_png_with_a_large_profile(tmp_path):
    Image.fromarray(corners()).save(tmp_path / "a.png", icc_profile=bytes(3_000_000))
    assert torch.equal(read_image(tmp_path / "a.png", 48, 64), read_image(plain(tmp_path), 48, 64))


def test_a_png_with_broken_exif(tmp_path):
    Image.fromarray(corners()).save(tmp_path / "a.png", exif=b"\0\x08\0\x02\x01\x12\0\x03")
    assert torch.equal(read_image(tmp_path / "a.png", 48, 64), read_image(plain(tmp_path), 48, 64))


def test_the_limit_of_pixels_is_our_own(tmp_path, monkeypatch):
    path = plain(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    open_picture(path)
    assert Image.MAX_IMAGE_PIXELS == 10, "the limit is put back"
    monkeypatch.setattr(pictures, "MOST_PIXELS", 64 * 48 - 1)
    with pytest.raises(RequestError, match="64 × 48 pixels; at most 3071 are allowed"):
        open_picture(path)


def plain(folder: Path) -> Path:
    path = folder / "plain.png"
    Image.fromarray(corners()).save(path)
    return path
