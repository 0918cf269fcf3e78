"""Unit tests of reading the user's pictures and clips (one process).

Comparisons with diffusers are exact, for the same Pillow and numpy operations run in the same order. Where colours pass
through 8-bit YUV, the tolerance of 4 levels out of 255 covers its rounding and a lossy codec on uniform areas; the
wrong matrix or range would be off by more than 10.
"""

from __future__ import annotations

import gc
import os
import struct
import tempfile
import warnings
import wave
import weakref
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import skimage.data
import torch
from diffusers.utils import load_image
from diffusers.video_processor import VideoProcessor
from PIL import Image

from helios_cp.config.errors import RequestError
from helios_cp.files import clips
from helios_cp.files.clips import check_video, read_video
from helios_cp.files.given import to_image_tensor, to_video_tensor
from helios_cp.files.mp4 import EXACT_CONVERSION
from helios_cp.files.pictures import open_picture, read_image

HEIGHT, WIDTH = 48, 80
FRAMES = 33
PROCESSOR = VideoProcessor(vae_scale_factor=8)


def pan(frames: int = FRAMES, size: int = 64) -> np.ndarray:
    """A camera that moves over a photograph: uint8 [T, size, size, 3]."""
    photograph = skimage.data.astronaut()
    return np.stack([photograph[t : t + size, 100 + 2 * t : 100 + 2 * t + size] for t in range(frames)])


def encode(
    path: Path,
    frames: np.ndarray,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    movflags: str | None = None,
    **options: str,
) -> Path:
    with av.open(str(path), "w", options={"movflags": movflags} if movflags else {}) as file:
        stream = file.add_stream(codec, rate=24, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        stream.thread_count = 1  # the same bytes on every machine
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame))))
        file.mux(stream.encode())
    return path


def pictures_of(path: Path) -> list[Image.Image]:
    with av.open(str(path)) as file:
        return [frame.to_image(interpolation=EXACT_CONVERSION) for frame in file.decode(video=0)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode(tmp_path_factory.mktemp("clip") / "clip.mp4", pan(), movflags="faststart")


def refusal(check, path: Path | str, *arguments) -> str:
    """The message of the `RequestError` that a check of `path` raises: one line that starts with the flag."""
    with pytest.raises(RequestError) as caught:
        check(path, *arguments)
    message = str(caught.value)
    flag = "--image" if check in (open_picture, read_image) else "--video"
    assert message.startswith(f"{flag} {path}: ") and "\n" not in message
    return message


def refused_picture(path: Path) -> str:
    """Both the check and the reader refuse, in the same words."""
    message = refusal(open_picture, path)
    assert refusal(read_image, path, HEIGHT, WIDTH) == message
    return message


def refused_clip(path: Path) -> str:
    message = refusal(check_video, path, 1)
    assert refusal(read_video, path, HEIGHT, WIDTH) == message
    return message


# Pictures


def saved(picture: Image.Image, path: Path, **options) -> Path:
    picture.save(path, **options)
    return path


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("RGB", "a.png"),
        ("RGB", "a.jpg"),
        ("RGB", "a.webp"),
        ("RGB", "a.bmp"),
        ("L", "a.png"),
        ("1", "a.png"),
        ("P", "a.gif"),
        ("CMYK", "a.jpg"),
    ],
)
def test_pictures_are_those_of_diffusers(tmp_path, astronaut, mode, name):
    path = saved(astronaut.convert(mode), tmp_path / name)
    open_picture(path)
    tensor = read_image(str(path), HEIGHT, WIDTH)
    assert tensor.shape == (1, 3, HEIGHT, WIDTH) and tensor.dtype == torch.float32
    assert torch.equal(tensor, PROCESSOR.preprocess(load_image(str(path)), height=HEIGHT, width=WIDTH))
    assert -1 <= tensor.min() < -0.5 and 0.5 < tensor.max() <= 1
    # Another way of resizing would show.
    other = VideoProcessor(vae_scale_factor=8, resample="bilinear")
    assert not torch.equal(tensor, other.preprocess(load_image(str(path)), height=HEIGHT, width=WIDTH))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(tmp_path, astronaut, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(astronaut.crop((0, 0, 300, 200)), tmp_path / "a.png", exif=exif)
    tensor = read_image(path, HEIGHT, WIDTH)
    assert torch.equal(tensor, PROCESSOR.preprocess(load_image(str(path)), height=HEIGHT, width=WIDTH))
    ignored = PROCESSOR.preprocess(Image.open(path).convert("RGB"), height=HEIGHT, width=WIDTH)
    assert torch.equal(tensor, ignored) == (orientation == 1)


def is_white_on_the_left_only(tensor: torch.Tensor) -> bool:
    """Read at its own size a picture is not resampled, so the edge between its halves is sharp."""
    left, right = tensor.chunk(2, dim=-1)
    return (left == 1).all().item() and (right.amin(dim=1) < 0).all().item()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_an_alpha_channel_is_laid_over_white(tmp_path, mode):
    picture = Image.new("RGBA", (WIDTH, HEIGHT), (0, 0, 0, 0))
    picture.paste((77, 77, 77, 255), (WIDTH // 2, 0, WIDTH, HEIGHT))
    assert is_white_on_the_left_only(to_image_tensor(picture.convert(mode), HEIGHT, WIDTH))
    path = saved(picture, tmp_path / "a.png")
    assert is_white_on_the_left_only(read_image(path, HEIGHT, WIDTH))
    # `load_image` drops the channel, which shows whatever colour the transparent pixels happen to have.
    assert not is_white_on_the_left_only(PROCESSOR.preprocess(load_image(str(path)), height=HEIGHT, width=WIDTH))


@pytest.mark.parametrize(("mode", "clear", "solid"), [("P", 0, 1), ("L", 0, 77), ("RGB", (0, 0, 0), (255, 0, 0))])
def test_a_transparent_colour_is_laid_over_white(tmp_path, mode, clear, solid):
    picture = Image.new(mode, (WIDTH, HEIGHT), clear)
    picture.paste(solid, (WIDTH // 2, 0, WIDTH, HEIGHT))
    if mode == "P":
        picture.putpalette([0, 0, 0, 255, 0, 0])
    path = saved(picture, tmp_path / "a.png", transparency=clear)
    assert is_white_on_the_left_only(read_image(path, HEIGHT, WIDTH))


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.pgm"])
def test_16_bits_keep_their_brightness(tmp_path, name):
    ramp = np.linspace(0, 65535, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
    tensor = read_image(saved(Image.fromarray(ramp), tmp_path / name), HEIGHT, WIDTH)
    expected = torch.from_numpy(ramp.astype(np.float32) / 65535 * 2 - 1)
    # Half of one of 255 levels, on a scale of length 2.
    assert (tensor - expected).abs().max() <= 1 / 255 + 1e-6


def test_pixels_of_unknown_range_are_refused(tmp_path):
    ramp = np.linspace(0, 1, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.float32)
    assert "floating-point" in refused_picture(saved(Image.fromarray(ramp), tmp_path / "a.tiff"))
    large = np.full((HEIGHT, WIDTH), 70000, dtype=np.int32)
    assert "32-bit" in refused_picture(saved(Image.fromarray(large), tmp_path / "b.tiff"))


# Pictures that are refused


def test_missing_folder_pipe_and_empty(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for refused in (refused_picture, refused_clip):
        assert "No such file" in refused(tmp_path / "missing.png")
        assert "No such file" in refused(tmp_path / "link")
        assert "No such file" in refused("https://example.com/a.png")
        assert "folder" in refused(tmp_path)
        assert "no regular file" in refused(tmp_path / "pipe")
        assert "empty" in refused(tmp_path / "empty")
        assert "too long" in refused(tmp_path / ("x" * 300))
        assert "null" in refused("a\0b")


@pytest.mark.parametrize("refused", [refused_picture, refused_clip])
def test_unreadable(refused):
    """Root may read any file, so for root the check runs as an ordinary user."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder) / "secret"
        path.write_bytes(b"data")
        path.chmod(0o000)
        try:
            if user == 0:
                os.seteuid(65534)
            message = refused(path)
        finally:
            os.seteuid(user)
    assert "Permission denied" in message


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.bmp", "a.tiff"])
def test_cut_in_half(tmp_path, astronaut, name):
    path = saved(astronaut, tmp_path / name)
    open_picture(path)
    os.truncate(path, path.stat().st_size // 2)
    refused_picture(path)


def test_no_picture(tmp_path, clip):
    (tmp_path / "text.png").write_text("This is no picture.\n" * 100)
    assert "cannot identify" in refused_picture(tmp_path / "text.png")
    assert "cannot identify" in refused_picture(clip)
    (tmp_path / "zeros.jpg").write_bytes(bytes(1000))
    refused_picture(tmp_path / "zeros.jpg")


def test_corrupt_in_the_middle(tmp_path, astronaut):
    path = saved(astronaut, tmp_path / "a.png")
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 100] = bytes(100)
    path.write_bytes(data)
    refused_picture(path)


# Clips


def test_clips_are_those_of_diffusers(clip):
    check_video(clip, FRAMES)
    tensor = read_video(str(clip), HEIGHT, WIDTH)
    assert tensor.shape == (1, 3, FRAMES, HEIGHT, WIDTH) and tensor.dtype == torch.float32
    expected = PROCESSOR.preprocess_video(pictures_of(clip), height=HEIGHT, width=WIDTH)
    assert torch.equal(tensor, expected)
    assert not torch.equal(tensor, expected.flip(2))


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.mkv", "libx264", "yuv444p"),
        ("a.avi", "mpeg4", "yuv420p"),
        ("a.ts", "libx264", "yuv420p"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.mov", "libx265", "yuv420p10le"),
        ("a.gif", "gif", "rgb8"),
    ],
)
def test_other_formats(tmp_path, name, codec, pix_fmt):
    path = encode(tmp_path / name, pan(5), codec, pix_fmt)
    check_video(path, 5)
    expected = PROCESSOR.preprocess_video(pictures_of(path), height=HEIGHT, width=WIDTH)
    assert torch.equal(read_video(path, HEIGHT, WIDTH), expected)


@pytest.mark.parametrize(
    ("pix_fmt", "options"),
    [
        ("yuv420p", {"colorspace": "bt709", "color_range": "tv"}),
        ("yuv420p", {"colorspace": "smpte170m", "color_range": "tv"}),
        ("yuvj420p", {"colorspace": "smpte170m", "color_range": "pc"}),
    ],
)
def test_colours_are_read_by_the_tags_of_the_file(tmp_path, pix_fmt, options):
    colours = torch.tensor([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 100, 50)])
    frames = colours[:, None, None].expand(-1, 64, 64, -1).to(torch.uint8).numpy()
    matrix = {"bt709": 1, "smpte170m": 5}[options["colorspace"]]
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=24, options={**options, "crf": "1"})
        stream.height, stream.width, stream.pix_fmt = 64, 64, pix_fmt
        for rgb in frames:
            frame = av.VideoFrame.from_ndarray(rgb).reformat(
                format=pix_fmt,
                dst_colorspace=matrix,
                dst_color_range=2 if options["color_range"] == "pc" else 1,
                interpolation=EXACT_CONVERSION,
            )
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    found = (read_video(path, 64, 64)[0].movedim(0, -1) + 1) * 127.5
    assert (found - torch.from_numpy(frames)).abs().max() <= 4


def test_a_title_that_is_no_utf_8(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as file:
        file.metadata["title"] = "Caffee"
        stream = file.add_stream("libx264", rate=24)
        stream.height, stream.width = 64, 64
        file.mux(stream.encode(av.VideoFrame.from_ndarray(pan(1)[0])))
        file.mux(stream.encode())
    path.write_bytes(path.read_bytes().replace(b"Caffee", b"Caf\xe9e "))
    with pytest.raises(UnicodeDecodeError), av.open(str(path)):
        pass
    check_video(path, 1)


def test_a_turned_camera(tmp_path, clip):
    """A phone writes the sensor's rows and a matrix that says how to turn them; here the matrix is put in by hand."""
    one, unit, size = 1 << 16, 1 << 30, 64 << 16
    straight = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, unit)
    turns = {
        Image.Transpose.ROTATE_270: (0, one, 0, -one, 0, 0, size, 0, unit),
        Image.Transpose.ROTATE_180: (-one, 0, 0, 0, -one, 0, size, size, unit),
        Image.Transpose.ROTATE_90: (0, -one, 0, one, 0, 0, 0, size, unit),
    }
    pictures = pictures_of(clip)
    data = clip.read_bytes()
    track = data.index(b"tkhd")
    assert data.count(straight, track, track + 100) == 1
    for turn, matrix in turns.items():
        path = tmp_path / f"{turn.name}.mp4"
        path.write_bytes(data[:track] + data[track:].replace(straight, struct.pack(">9i", *matrix), 1))
        turned = [picture.transpose(turn) for picture in pictures]
        expected = PROCESSOR.preprocess_video(turned, height=HEIGHT, width=WIDTH)
        assert torch.equal(read_video(path, HEIGHT, WIDTH), expected)


def test_frames_are_resized_as_they_are_decoded(clip, monkeypatch):
    """When n frames are resized, n are decoded, and of the pictures in full size at most two are alive."""
    decoded, resized, alive = 0, 0, []
    decode, resize = clips.decoded, clips.resize

    def counted_decode(path):
        nonlocal decoded
        for frame in decode(path):
            decoded += 1
            yield frame

    def counted_resize(picture, height, width, mode):
        nonlocal resized
        resized += 1
        assert decoded == resized
        alive.append(weakref.ref(picture))
        assert sum(reference() is not None for reference in alive) <= 2
        return resize(picture, height, width, mode)

    monkeypatch.setattr(clips, "decoded", counted_decode)
    monkeypatch.setattr(clips, "resize", counted_resize)
    read_video(clip, HEIGHT, WIDTH)
    assert decoded == resized == FRAMES
    # Decoding everything first, as `preprocess_video` needs it, breaks the rule.
    monkeypatch.setattr(clips, "decoded", lambda path: list(counted_decode(path)))
    with pytest.raises(AssertionError):
        read_video(clip, HEIGHT, WIDTH)


def test_the_check_holds_one_frame_at_a_time(monkeypatch, tmp_path):
    class Frame:
        pass

    alive, most = [], 0

    def frames(path):
        nonlocal most
        for _ in range(100):
            frame = Frame()
            alive.append(weakref.ref(frame))
            most = max(most, sum(reference() is not None for reference in alive))
            yield frame

    monkeypatch.setattr(clips, "decoded", frames)
    for name in ("one.mp4", "other.mp4"):
        (tmp_path / name).write_text("-")
    check_video(tmp_path / "one.mp4", 100)
    assert most <= 2
    monkeypatch.setattr(clips, "decoded", lambda path: list(frames(path)))
    check_video(tmp_path / "other.mp4", 100)
    gc.collect()
    assert most == 100


# Clips that are refused


def test_too_few_frames(clip):
    check_video(clip, FRAMES)
    message = refusal(check_video, clip, FRAMES + 1)
    assert f"{FRAMES} frame" in message and f"{FRAMES + 1} are needed" in message


def test_no_clip(tmp_path, astronaut):
    text = "This is no clip.\n" * 100
    for name in ("text.mp4", "text.txt"):  # FFmpeg would draw the .txt as a terminal
        (tmp_path / name).write_text(text)
        refused_clip(tmp_path / name)
    (tmp_path / "zeros.mp4").write_bytes(bytes(1000))
    refused_clip(tmp_path / "zeros.mp4")
    still = saved(astronaut, tmp_path / "a.png")
    assert "1 frame(s), 33 are needed" in refusal(check_video, still, 33)
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", "not compressed"))
        sound.writeframes(bytes(8000))
    assert "no video stream" in refused_clip(tmp_path / "sound.wav")


def test_the_cover_of_a_sound_file_is_no_clip(tmp_path):
    path = tmp_path / "sound.m4a"
    with av.open(str(path), "w", format="mp4") as file:
        sound = file.add_stream("aac", rate=8000)
        cover = file.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt = 64, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        frame.pts, frame.time_base = 0, Fraction(1, 8000)
        file.mux(cover.encode(av.VideoFrame.from_ndarray(pan(1)[0])))
        file.mux(cover.encode())
        file.mux(sound.encode(frame))
        file.mux(sound.encode())
    with av.open(str(path)) as file:
        assert len(file.streams.video) == 1
    assert "no video stream" in refused_clip(path)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("movflags", ["faststart", None])
def test_a_clip_that_is_cut_off(tmp_path, share, movflags):
    """With the index at the front the file still opens; without, FFmpeg cannot tell what it is."""
    path = encode(tmp_path / "a.mp4", pan(), movflags=movflags)
    check_video(path, FRAMES)
    os.truncate(path, int(path.stat().st_size * share))
    message = refused_clip(path)
    assert "cannot be read" in message or "cut off" in message


def test_a_clip_that_is_cut_off_between_two_frames(tmp_path, clip):
    """FFmpeg takes this for the end of the clip; that the index reaches further gives it away."""
    with av.open(str(clip)) as file:
        start = next(packet.pos for index, packet in enumerate(file.demux(video=0)) if index == 20)
    path = tmp_path / "a.mp4"
    path.write_bytes(clip.read_bytes()[:start])
    assert len(pictures_of(path)) < FRAMES
    assert "cut off" in refused_clip(path)


@pytest.mark.parametrize("slices", ["1", "8"])
def test_a_clip_with_a_damaged_frame(tmp_path, slices):
    """FFmpeg patches up a frame whose last tenth is lost and goes on to the last, so it must be asked for damage.

    With several threads it does not even know of damage in a frame of several slices.
    """
    path = encode(tmp_path / "a.mp4", pan(size=128), slices=slices)
    with av.open(str(path)) as file:
        position, size = next((p.pos, p.size) for index, p in enumerate(file.demux(video=0)) if index == 1)
    data = bytearray(path.read_bytes())
    data[position + size - size // 10 : position + size] = bytes(size // 10)
    path.write_bytes(data)
    with av.open(str(path)) as file:
        file.streams.video[0].thread_count = 4
        flags = [frame.is_corrupt for frame in file.decode(video=0)]
    assert len(flags) == FRAMES and any(flags) == (slices == "1")
    assert "corrupt" in refused_clip(path)


# What Python users pass


def test_8_bit_pictures_are_the_same_in_any_form(tmp_path, astronaut):
    path = saved(astronaut, tmp_path / "a.png")
    array = np.array(astronaut)
    tensor = torch.from_numpy(array).movedim(-1, 0)
    expected = read_image(path, HEIGHT, WIDTH)
    for picture in (path, str(path), astronaut, array, array[None], tensor, tensor[None]):
        assert torch.equal(to_image_tensor(picture, HEIGHT, WIDTH), expected)


def test_8_bit_clips_are_the_same_in_any_form(clip):
    pictures = pictures_of(clip)
    array = np.stack(pictures)
    tensor = torch.from_numpy(array).movedim(-1, 1)
    expected = read_video(clip, HEIGHT, WIDTH)
    for form in (clip, str(clip), pictures, tuple(pictures), array, array[None], list(array), tensor, list(tensor)):
        assert torch.equal(to_video_tensor(form, HEIGHT, WIDTH), expected)


def test_a_transparent_pil_image_is_laid_over_white():
    assert (to_image_tensor(Image.new("RGBA", (10, 10)), HEIGHT, WIDTH) == 1).all()
    assert (to_video_tensor([Image.new("RGBA", (10, 10))], HEIGHT, WIDTH) == 1).all()


@pytest.mark.filterwarnings("error::FutureWarning")  # diffusers warns of a range that is documented here
@pytest.mark.parametrize("low", [0.0, -1.0])
def test_floating_point_follows_diffusers(low):
    """Values from 0 count as [0, 1] and are stretched; values from -1 are taken as they are."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.rand(5, 3, 40, 60, generator=generator) * (1 - low) + low
    frames[3] = frames[3].abs()  # one frame without a negative value does not change what the others mean
    frame = frames[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = PROCESSOR.preprocess_video(frames, height=HEIGHT, width=WIDTH)
        expected_frame = PROCESSOR.preprocess(frame, height=HEIGHT, width=WIDTH)
    array = frames.movedim(1, -1).numpy()
    for video in (frames, frames[None], list(frames), frames.double(), array, array[None], list(array)):
        assert torch.equal(to_video_tensor(video, HEIGHT, WIDTH), expected)
    for picture in (frame, frame[None], frame.movedim(0, -1).numpy(), frame.movedim(0, -1).numpy()[None]):
        assert torch.equal(to_image_tensor(picture, HEIGHT, WIDTH), expected_frame)
    assert expected.min() < -0.9 and expected.max() <= 1


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((4, 4)), "shape [4, 4]"),
        (np.zeros((3, 8, 8)), "allowed is [H, W, 3]"),
        (torch.zeros(8, 8, 3), "allowed is [3, H, W]"),
        (torch.zeros(2, 3, 8, 8), "shape [2, 3, 8, 8]"),
        (torch.zeros(3, 0, 8), "shape [3, 0, 8]"),
        (torch.full((3, 8, 8), 255.0), "from 255 to 255"),
        (torch.full((3, 8, 8), float("nan")), "from nan to nan"),
        (42, "type int"),
        (None, "type NoneType"),
    ],
)
def test_other_pictures_are_refused(picture, message):
    with pytest.raises(RequestError) as caught:
        to_image_tensor(picture, HEIGHT, WIDTH)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (torch.zeros(3, 8, 8), "allowed is [T, 3, H, W]"),
        (np.zeros((8, 3, 8, 8)), "allowed is [T, H, W, 3]"),
        (torch.zeros(2, 5, 3, 8, 8), "shape [2, 5, 3, 8, 8]"),
        (torch.zeros(0, 3, 8, 8), "shape [0, 3, 8, 8]"),
        ([], "type list"),
        ([Image.new("RGB", (8, 8)), np.zeros((8, 8, 3))], "type list"),
        ([np.zeros((8, 8, 3)), np.zeros((8, 9, 3))], "type list"),
        (Image.new("RGB", (8, 8)), "type Image"),
    ],
)
def test_other_clips_are_refused(clip, message):
    with pytest.raises(RequestError) as caught:
        to_video_tensor(clip, HEIGHT, WIDTH)
    assert message in str(caught.value) and "\n" not in str(caught.value)
