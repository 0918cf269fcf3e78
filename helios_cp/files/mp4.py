"""MP4 files made chunk by chunk, so that a stopped run can go on and end with the same bytes.

Each chunk of frames becomes a *segment*: a small MP4 of its own, encoded by a fresh H.264 encoder. In the end the
segments are joined by copying their packets. Nothing is encoded twice, and no byte depends on the machine's number of
cores, on the clock, or on whether the segments came in one run or in several.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import av
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from helios_cp.files.whole_files import replacing

if TYPE_CHECKING:
    import torch

# libswscale's flags for full chroma interpolation, accurate rounding and the same bits on every CPU. With its fast
# defaults the way from RGB to YUV and back darkens a picture by about one level out of 255.
EXACT_CONVERSION = Interpolation.BICUBIC | 0x2000 | 0x40000 | 0x80000

# x264's output depends on its number of threads, so that number is fixed and not the machine's.
ENCODER_THREADS = 4

ENCODER_OPTIONS = {
    "preset": "medium",
    "crf": "18",  # x264's constant rate factor, from 0 (lossless but for the colour conversion) to 51
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


def encode_segment(frames: torch.Tensor, fps: float | Fraction) -> bytes:
    """Encode a chunk as an MP4 that starts with an IDR frame and refers to no other chunk.

    frames: uint8 RGB `[T, H, W, 3]`, with even H and W, on any device.

    The stream is H.264 in yuv420p, BT.709 in TV range, and tagged so. The same input gives the same bytes. Raises
    `ValueError` for other frames.
    """
    if str(frames.dtype) != "torch.uint8" or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise ValueError(f"frames {frames.dtype} {list(frames.shape)}: allowed is uint8 [T, H, W, 3], T of at least 1")
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"frames of {height}x{width}: yuv420p takes even heights and widths")
    tick = 1 / frame_rate(fps)
    buffer, reformatter = io.BytesIO(), VideoReformatter()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=1 / tick, time_base=tick, options=ENCODER_OPTIONS)
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


def join_segments(segments: Sequence[Path], path: Path) -> None:
    """Join MP4s of `encode_segment` to one, with its index at the front, where players that stream want it.

    Packets are copied: nothing is decoded or encoded again, and the same segments give the same bytes. Raises
    `ValueError` for segments of different sizes, rates or settings, and for such as hold B-frames.
    """
    options = {"fflags": "+bitexact", "movflags": "faststart"}
    # Absolute paths, because FFmpeg takes a name such as "a:b.mp4" for a protocol.
    with replacing(path) as partial, av.open(os.path.abspath(partial), "w", "mp4", options=options) as container:
        stream, settings, position = None, None, 0
        for segment in segments:
            with av.open(os.path.abspath(segment), format="mp4") as source:
                video = source.streams.video[0]
                context = video.codec_context
                found = video.average_rate, context.width, context.height, context.extradata
                if stream is None:
                    settings, tick = found, 1 / video.average_rate
                    stream = container.add_stream_from_template(video, time_base=tick)
                if found != settings:
                    raise ValueError(f"{segment}: its size, rate or settings are not those of {segments[0]}")
                for packet in source.demux(video):
                    if packet.dts is None:  # the demuxer's end mark
                        continue
                    if packet.pts != packet.dts:
                        raise ValueError(f"{segment}: it has B-frames; use encode_segment")
                    packet.stream, packet.time_base = stream, tick
                    packet.pts = packet.dts = position
                    packet.duration = 1
                    container.mux(packet)
                    position += 1
