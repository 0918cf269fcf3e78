"""MP4 files written chunk by chunk, so that a stopped run can go on and end with the same bytes.

Each chunk of frames becomes a *segment*: a small MP4 of its own, encoded by a fresh H.264 encoder. `Mp4Writer` appends
the segments' packets to a fragmented MP4 beside the target, which is playable at any moment, and turns it into an
ordinary MP4 at the end. Nothing is encoded twice, and no byte depends on the machine's number of cores, on the clock,
or on whether the segments came in one run or in several.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import torch
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

# libswscale's flags for full chroma interpolation, accurate rounding and the same bits on every CPU. With its fast
# defaults the way from RGB to YUV and back darkens a picture by about one level out of 255.
EXACT_CONVERSION = Interpolation.BICUBIC | 0x2000 | 0x40000 | 0x80000

# x264's output depends on its number of threads, so that number is fixed and not the machine's.
ENCODER_THREADS = 4

ENCODER_OPTIONS = {
    "preset": "medium",
    "flags": "+bitexact+cgop",
    # Without B-frames decoding order is display order: segments are joined by adding one offset to all timestamps.
    "bf": "0",
    # Headers that do not depend on the content, and the same algorithms on every CPU.
    "x264-params": "stitchable=1:cpu-independent=1",
    "color_primaries": "bt709",
    "color_trc": "bt709",
    "colorspace": "bt709",
    "color_range": "tv",
}


def frame_rate(fps: float | Fraction) -> Fraction:
    """Frames per second as the fraction that timestamps count in: 24 → 24/1, 23.976 → 2997/125.

    Raises `ValueError` unless it is finite and at least 1/1001.
    """
    if not (math.isfinite(fps) and fps * 1001 >= 1):
        raise ValueError(f"fps {fps}: a finite number of at least 1/1001 is allowed")
    return Fraction(fps).limit_denominator(1001)


def encode_segment(frames: torch.Tensor, fps: float | Fraction, *, crf: int = 18) -> bytes:
    """Encode a chunk as an MP4 that starts with an IDR frame and refers to no other chunk.

    frames: uint8 RGB `[T, H, W, 3]`, with even H and W, on any device.
    crf: x264's constant rate factor, from 0 (lossless but for the colour conversion) to 51; 18 looks like the source.

    The stream is H.264 in yuv420p, BT.709 in TV range, and tagged so. The same input gives the same bytes. Raises
    `ValueError` for other frames.
    """
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise ValueError(f"frames {frames.dtype} {list(frames.shape)}: allowed is uint8 [T, H, W, 3], T of at least 1")
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"frames of {height}x{width}: yuv420p takes even heights and widths")
    tick = 1 / frame_rate(fps)
    buffer, reformatter = io.BytesIO(), VideoReformatter()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        options = {**ENCODER_OPTIONS, "crf": str(crf)}
        stream = container.add_stream("libx264", rate=1 / tick, time_base=tick, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.thread_count, stream.thread_type = ENCODER_THREADS, "FRAME"
        for index, rgb in enumerate(frames.cpu().contiguous().numpy()):
            frame = reformatter.reformat(
                av.VideoFrame.from_ndarray(rgb, format="rgb24"),
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=EXACT_CONVERSION,
                threads=1,
            )
            frame.pts, frame.time_base = index, tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


@dataclass(frozen=True)
class Position:
    """How far an unfinished MP4 is: bytes of its partial file and of the header in it, frames and segments."""

    size: int
    header_size: int
    frames: int
    segments: int


class Mp4Writer:
    """Write segments of `encode_segment` to an MP4 at `path`, as a context manager.

    Until `close`, the chunks lie in `partial`, a fragmented MP4 beside the target that is flushed after every chunk:
    even a killed process leaves a playable file. Leaving the `with` by an exception finishes the MP4 with the chunks so
    far; without any chunk nothing is created. No chunk stays in memory once `append` has returned; `close` needs the
    index of the MP4, about a hundred bytes a frame.

    To continue a stopped run, append the earlier segments again, then the new ones: the finished file has the same
    bytes as that of a run that never stopped.

    path: the target, replaced only when the new file is complete; its folder is created with the first chunk.
    fps: frames per second of all segments.
    """

    def __init__(self, path: str | os.PathLike[str], fps: float | Fraction) -> None:
        self.path = Path(path)
        self.partial = partial_path(path)
        self.fps = frame_rate(fps)
        self.frames = 0
        self.segments = 0
        self._file: BinaryIO | None = None
        self._header = b""
        self._closed = False

    @classmethod
    def resume(cls, path: str | os.PathLike[str], fps: float | Fraction, position: Position) -> Mp4Writer:
        """Go on with the partial file of another writer, from a position that it had; what it wrote later is cut off.

        Raises `FileNotFoundError` if there is no partial file, as after `close`.
        """
        writer = cls(path, fps)
        writer.frames, writer.segments = position.frames, position.segments
        writer._file = open(writer.partial, "r+b", buffering=0)  # noqa: SIM115
        writer._header = writer._file.read(position.header_size)
        writer._file.truncate(position.size)
        writer._file.seek(position.size)
        return writer

    @property
    def position(self) -> Position:
        """Where `resume` could go on from now."""
        size = 0 if self._file is None else self._file.tell()
        return Position(size, len(self._header), self.frames, self.segments)

    def append(self, segment: bytes) -> None:
        """Add a segment and flush it. Raises `ValueError` when its size, rate or settings are not the first one's."""
        if self._closed:
            raise ValueError(f"{self.path}: the writer is closed; open a new one and append all segments again")
        header, fragment, frames = _to_fragment(segment, self.fps, self.frames, self.segments)
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: nothing of a failed write can linger and come back later.
            self._file = open(self.partial, "wb", buffering=0)  # noqa: SIM115
        if self.segments and header != self._header:
            raise ValueError(
                f"{self.path}: segment {self.segments} was encoded with another size or other settings than segment 0; "
                "encode all segments alike"
            )
        _write_whole(self._file, fragment if self.segments else header + fragment)
        self._header = header
        self.frames += frames
        self.segments += 1

    def close(self) -> None:
        """Finish the MP4 and remove the partial file. Closing again does nothing."""
        self._closed = True
        if self._file is None:
            return
        self._file.close()
        self._file = None
        if self.segments:
            finished = self.path.with_name(f".{self.path.name}.finished")
            try:
                _to_ordinary_mp4(self.partial, finished)
                os.replace(finished, self.path)
            finally:
                finished.unlink(missing_ok=True)
        self.partial.unlink()

    def __enter__(self) -> Mp4Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if error is None:
            self.close()
            return
        # The error under way matters more than one of finishing, say a full disk; then the partial file stays.
        with contextlib.suppress(Exception):
            self.close()


def partial_path(path: str | os.PathLike[str]) -> Path:
    """Where the chunks of an unfinished `path` lie: `.NAME.mp4.partial` in the same folder."""
    return Path(path).with_name(f".{Path(path).name}.partial")


def _to_fragment(segment: bytes, fps: Fraction, first_frame: int, index: int) -> tuple[bytes, bytes, int]:
    """The segment as (header, fragment, frames) of a fragmented MP4 in which it starts at `first_frame`.

    A fresh muxer serves each segment, for a muxer that lives on writes a fragment only when the next one begins. All
    segments of a video have the same header, so their fragments may follow one header in one file.
    """
    options = {
        "fflags": "+bitexact",
        # One fragment, positioned relative to itself, that starts at its own timestamp in place of zero.
        "movflags": "frag_custom+empty_moov+default_base_moof+frag_discont+skip_trailer",
        "avoid_negative_ts": "disabled",
        "fragment_index": str(index + 1),
        # The bit rate is the one part of a header that depends on the content.
        "write_btrt": "0",
    }
    buffer, frames, tick = io.BytesIO(), 0, 1 / fps
    with av.open(io.BytesIO(segment)) as source, av.open(buffer, "w", format="mp4", options=options) as container:
        video = source.streams.video[0]
        if video.average_rate != fps:
            raise ValueError(
                f"segment {index} has {video.average_rate} frames per second, the writer {fps}; use one rate"
            )
        stream = container.add_stream_from_template(video, time_base=tick)
        container.start_encoding()
        header_size = buffer.tell()
        for packet in source.demux(video):
            if packet.dts is None:  # the demuxer's end mark
                continue
            if packet.pts != packet.dts or not (frames or packet.is_keyframe):
                raise ValueError(f"segment {index} has B-frames or no leading IDR frame; use encode_segment")
            packet.stream, packet.time_base = stream, tick
            packet.pts = packet.dts = first_frame + frames
            packet.duration = 1
            container.mux(packet)
            frames += 1
    data = buffer.getvalue()
    return data[:header_size], data[header_size:], frames


def _to_ordinary_mp4(partial: Path, target: Path) -> None:
    """Copy the packets of a fragmented MP4 into one with its index at the front, where players that stream want it."""
    options = {"fflags": "+bitexact", "movflags": "faststart"}
    # Absolute paths, for FFmpeg takes a name such as "a:b.mp4" for a protocol.
    with (
        av.open(os.path.abspath(partial), format="mp4") as source,
        av.open(os.path.abspath(target), "w", format="mp4", options=options) as container,
    ):
        video = source.streams.video[0]
        stream = container.add_stream_from_template(video)
        for packet in source.demux(video):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)


def _write_whole(file: BinaryIO, data: bytes) -> None:
    """Write all bytes or, on an error or an interrupt, none: a fragment cut in half would spoil the finished video."""
    start = file.tell()
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except BaseException:
        file.seek(start)
        file.truncate()
        raise
