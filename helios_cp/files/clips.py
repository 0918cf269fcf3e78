"""Clips that users give: checked before any model is loaded, and read as tensors in [-1, 1].

Frames look as FFmpeg shows them: by the colour matrix and range of the file, turned and mirrored by its display matrix,
and laid over white where they are transparent.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from PIL import Image

from helios_cp.config.errors import RequestError
from helios_cp.files.mp4 import EXACT_CONVERSION
from helios_cp.files.pictures import PathLike, check_readable, resize, stretch_remark, to_rgb

if TYPE_CHECKING:
    import torch

TURNS = {
    (False, True, False): Image.Transpose.FLIP_LEFT_RIGHT,
    (False, False, True): Image.Transpose.FLIP_TOP_BOTTOM,
    (False, True, True): Image.Transpose.ROTATE_180,
    (True, False, False): Image.Transpose.TRANSPOSE,
    (True, True, False): Image.Transpose.ROTATE_270,
    (True, False, True): Image.Transpose.ROTATE_90,
    (True, True, True): Image.Transpose.TRANSVERSE,
}
"""The turn, by whether rows and columns are exchanged, and then left and right, and top and bottom."""

WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""FFmpeg's own decoders of these leave the alpha channel out."""

MOST_DOUBT = 3
"""How many packets may lie between one that FFmpeg calls corrupt and the next key frame.

Where transport streams were joined, FFmpeg calls some packets before the join corrupt, though they are whole.
"""

HDR = {16: "PQ", 18: "HLG"}
"""Transfer functions by their number in ITU-T H.273."""


@dataclass(frozen=True)
class Ends:
    """Of a clip of `count` frames, the first `[1, 3, 1, H, W]` and some of the last `[1, 3, T, H, W]`, in [-1, 1]."""

    count: int
    first: torch.Tensor
    last: torch.Tensor


def check_video(path: PathLike, minimum_frames: int) -> None:
    """Raise `RequestError` unless every frame decodes and there are at least `minimum_frames` of them.

    It holds one frame at a time, whatever the length of the clip. It finds damage that the format can show: VP9 cannot
    show any, and a Matroska file that is cut off looks like a shorter one.
    """
    count = _count(path)
    if count < minimum_frames:
        raise RequestError(
            f"--video {path}: the clip has {count} frame(s), {minimum_frames} are needed; give a longer one"
        )


def read_video(path: PathLike, height: int, width: int, mode: str = "stretch") -> torch.Tensor:
    """Read a clip as fp32 `[1, 3, T, height, width]` in [-1, 1], T being the number of frames in the file.

    Frames are resized as they are decoded, so memory holds resized frames only. The frame rate is not looked at. Raises
    `RequestError`.
    """
    return _stack(_resized(path, height, width, mode))


def read_ends(path: PathLike, height: int, width: int, most: int, mode: str = "stretch") -> Ends:
    """The first frame of a clip and at most the last `most`. Raises `RequestError`.

    No other frame is resized or kept, so memory does not grow with the clip.
    """
    count = _count(path)
    kept = list(_resized(path, height, width, mode, {0, *range(max(0, count - most), count)}))
    return Ends(count, _stack(kept[:1]), _stack(kept[-min(count, most) :]))


def clip_remarks(path: PathLike, height: int, width: int, mode: str, fps: float) -> list[str]:
    """What to tell of a clip that was checked, before it goes on as a video of this size and frame rate."""
    with _opened(path) as (container, stream):
        rate, transfer = stream.average_rate, stream.codec_context.color_trc
        first = next(container.decode(stream))
        shown = _picture(first, float(stream.sample_aspect_ratio or 1))
    remarks = []
    if mode == "stretch":
        remarks += stretch_remark("--video", path, (shown.height, shown.width), height, width)
    if rate and not 0.98 < float(rate) / fps < 1.02:
        remarks.append(
            f"--video {path}: the clip has {float(rate):.3g} frames a second and goes on at {fps:g}, so motion looks "
            f"{'slower' if rate > fps else 'faster'}; give --fps {float(rate):.3g}, or convert the clip"
        )
    if transfer in HDR:
        remarks.append(
            f"--video {path}: the clip is HDR ({HDR[transfer]}) and is read as it is, so white looks grey; convert it "
            "to SDR first"
        )
    return remarks


def _stack(frames: Iterator[torch.Tensor] | list[torch.Tensor]) -> torch.Tensor:
    import torch  # here, because who only checks a clip need not wait for it

    return torch.stack(list(frames), dim=2)


def _resized(
    path: PathLike, height: int, width: int, mode: str, wanted: set[int] | None = None
) -> Iterator[torch.Tensor]:
    with _opened(path) as (_, stream):
        pixel_width = 1 if mode == "stretch" else float(stream.sample_aspect_ratio or 1)
    for index, frame in enumerate(decoded(path)):
        if wanted is None or index in wanted:
            yield resize(_picture(frame, pixel_width), height, width, mode)


def _count(path: PathLike) -> int:
    """The number of frames of a clip. All are decoded for it, once while the file stays the same."""
    check_readable("--video", path)
    status = os.stat(path)
    return _counted(os.path.abspath(path), os.fspath(path), status.st_mtime_ns, status.st_size, status.st_ino)


@functools.lru_cache(maxsize=16)
def _counted(absolute: str, path: PathLike, *version: int) -> int:
    return sum(1 for _ in decoded(path))


def decoded(path: PathLike) -> Iterator[av.VideoFrame]:
    """Yield every frame of a clip, as it is stored; a corrupt or missing part raises `RequestError`."""
    with _opened(path) as (container, stream):
        # Only with one thread does FFmpeg's H.264 decoder say which frames it had to patch up.
        stream.thread_type = "NONE"
        decoder = stream.codec_context
        if stream.metadata.get("alpha_mode") == "1" and decoder.name in WITH_ALPHA:
            decoder = av.CodecContext.create(WITH_ALPHA[decoder.name], "r")
        count, doubt = 0, 0
        for packet in container.demux(stream):
            doubt = 0 if packet.is_keyframe else doubt + (packet.is_corrupt or doubt > 0)
            for frame in decoder.decode(packet if packet.size else None):
                if frame.is_corrupt or doubt > MOST_DOUBT:
                    raise RequestError(f"--video {path}: frame {count} is corrupt; give an undamaged clip")
                yield frame
                count += 1
    if not count:
        raise RequestError(f"--video {path}: no frame could be decoded; give an MP4")


@contextmanager
def _opened(path: PathLike) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    check_readable("--video", path)
    try:
        # An absolute path, for FFmpeg takes a name such as "a:b.mp4" for a protocol.
        with av.open(os.path.abspath(path), metadata_errors="ignore") as container:
            yield container, _video_stream(path, container)
    except (av.FFmpegError, OSError) as error:
        raise RequestError(f"--video {path}: this cannot be read as a video ({error.strerror}); give an MP4") from None


def _video_stream(path: PathLike, container: av.container.InputContainer) -> av.VideoStream:
    # A sound file's cover is no clip, and neither is text, which FFmpeg would render as a terminal.
    streams = [s for s in container.streams.video if s.codec_context and not s.disposition & Disposition.attached_pic]
    if not streams or container.format.name == "tty":
        raise RequestError(f"--video {path}: there is no video stream to decode in it; give an MP4")
    best = container.streams.best("video")  # some cameras put a preview first
    stream = best if best in streams else streams[0]
    end = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
    if end > os.path.getsize(path):
        raise RequestError(f"--video {path}: the file is cut off, its frames reach to byte {end}; give the whole file")
    return stream


def _picture(frame: av.VideoFrame, pixel_width: float) -> Image.Image:
    """A frame as people see it, in RGB with square pixels. `pixel_width` is width over height of its own pixels."""
    if any(component.is_alpha for component in frame.format.components):
        pixels = frame.reformat(format="rgba", interpolation=EXACT_CONVERSION).to_ndarray()
        picture = to_rgb(Image.fromarray(pixels, "RGBA"))
    else:
        picture = frame.to_image(interpolation=EXACT_CONVERSION)
    if pixel_width != 1:
        picture = picture.resize((max(1, round(picture.width * pixel_width)), picture.height), Image.Resampling.LANCZOS)
    return _upright(picture, frame)


def _upright(picture: Image.Image, frame: av.VideoFrame) -> Image.Image:
    """Turned by quarters and mirrored as the display matrix of the frame says; other angles are left as they are.

    The matrix holds rows of three numbers: x' = m0·x + m3·y + m6 and y' = m1·x + m4·y + m7 (ISO/IEC 14496-12, 8.3.2).
    """
    found = frame.side_data.get(SideData.DISPLAYMATRIX)
    if found is None:
        return picture
    m = np.frombuffer(bytes(found), dtype=np.int32).reshape(3, 3)[:2, :2].astype(np.int64)
    is_turned = abs(m[0, 1]) + abs(m[1, 0]) > abs(m[0, 0]) + abs(m[1, 1])
    across, down = (m[1, 0], m[0, 1]) if is_turned else (m[0, 0], m[1, 1])
    turn = TURNS.get((bool(is_turned), bool(across < 0), bool(down < 0)))
    return picture if turn is None else picture.transpose(turn)
