"""Fragmented MP4 from the segments that a run folder keeps: packets are copied, nothing is encoded twice.

All segments of a session give the same *initialization segment* (`ftyp`, `moov`), and each its own *fragment* (one
`moof`, one `mdat`) that begins with a key frame. `tfdt` says where a fragment lies in media time, so a player takes any
fragment after the initialization segment. See ISO/IEC 14496-12.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

import av

MOVFLAGS = "+frag_custom+empty_moov+default_base_moof+skip_trailer"
"""One fragment, closed at the end; no index behind it."""


@dataclass(frozen=True)
class Fragment:
    """`init` is the initialization segment, `media` the fragment with its `frames`."""

    init: bytes
    media: bytes
    frames: int


def fragment(segment: bytes, first_frame: int, number: int) -> Fragment:
    """A segment of `helios_cp.files.mp4.encode_segment` as a fragment that begins with frame `first_frame`.

    `number` counts fragments from 0. Raises `ValueError` for what is no such segment.
    """
    buffer, frames = io.BytesIO(), 0
    options = {"fflags": "+bitexact", "movflags": MOVFLAGS, "write_btrt": "0"}  # a bit rate would make inits differ
    try:
        with av.open(io.BytesIO(segment), format="mp4") as source, av.open(buffer, "w", "mp4", options=options) as made:
            video = source.streams.video[0]
            tick = 1 / video.average_rate
            stream = made.add_stream_from_template(video, time_base=tick)
            for packet in source.demux(video):
                if packet.dts is None:  # the demuxer's end mark
                    continue
                packet.stream, packet.time_base = stream, tick
                packet.pts = packet.dts = frames
                packet.duration = 1
                made.mux(packet)
                frames += 1
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"this is no segment of an MP4: {error}") from None
    whole = buffer.getvalue()
    split = next(box.begin for box in boxes(whole) if box.kind == "moof")
    init, media = whole[:split], bytearray(whole[split:])
    ticks_per_frame, rest = divmod(timescale(init) * tick.numerator, tick.denominator)
    if rest:
        raise ValueError(f"a timescale of {timescale(init)} cannot count frames of {tick} s")
    _write(media, ("moof", "traf", "tfdt"), 4, 8, first_frame * ticks_per_frame)
    _write(media, ("moof", "mfhd"), 4, 4, number + 1)
    return Fragment(init, bytes(media), frames)


def mime(init: bytes) -> str:
    """Of an initialization segment, as Media Source Extensions want it, such as `video/mp4; codecs="avc1.64000a"`."""
    at = init.index(b"avcC") + 4
    return f'video/mp4; codecs="avc1.{init[at + 1 : at + 4].hex()}"'


def timescale(init: bytes) -> int:
    """Ticks a second of the only track."""
    begin = find(init, ("moov", "trak", "mdia", "mdhd")).begin
    return int.from_bytes(init[begin + 20 : begin + 24])  # version 0: size, kind, version, two times


def decode_time(media: bytes) -> int:
    """In ticks, when a fragment begins."""
    begin = find(media, ("moof", "traf", "tfdt")).begin
    return int.from_bytes(media[begin + 12 : begin + 20])


@dataclass(frozen=True)
class Box:
    """A box of an MP4 and where it lies, its head of 8 bytes included."""

    kind: str
    begin: int
    end: int


def boxes(content: bytes | bytearray, begin: int = 0, end: int | None = None) -> Iterator[Box]:
    """Those side by side from `begin` to `end`. Raises `ValueError` for what is none."""
    end = len(content) if end is None else end
    while begin < end:
        size = int.from_bytes(content[begin : begin + 4])
        if size < 8 or begin + size > end:
            raise ValueError(f"byte {begin}: no box of an MP4 begins there")
        yield Box(content[begin + 4 : begin + 8].decode("latin-1"), begin, begin + size)
        begin += size


def find(content: bytes | bytearray, path: tuple[str, ...]) -> Box:
    """The first box by its path. Raises `ValueError` where there is none."""
    begin, end, found = 0, len(content), None
    for kind in path:
        found = next((box for box in boxes(content, begin, end) if box.kind == kind), None)
        if found is None:
            raise ValueError(f"there is no box {'/'.join(path)}")
        begin, end = found.begin + 8, found.end
    return found


def _write(content: bytearray, path: tuple[str, ...], offset: int, size: int, value: int) -> None:
    """Overwrite a number `offset` bytes behind the head of a box."""
    begin = find(content, path).begin + 8 + offset
    content[begin : begin + size] = value.to_bytes(size)
