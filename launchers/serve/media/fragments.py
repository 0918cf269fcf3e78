"""Fragmented MP4 from the segments that a run folder keeps: packets are copied, nothing is encoded twice.

All segments of a session give the same *initialization segment* (`ftyp`, `moov`), and each its own *fragment* (one
`moof`, one `mdat`) that begins with a key frame and says where it lies in media time, so a player takes any fragment
after the initialization segment. See ISO/IEC 14496-12.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import av

OPTIONS = {
    "fflags": "+bitexact",
    "movflags": "+frag_custom+empty_moov+default_base_moof+skip_trailer+frag_discont",
    "use_editlist": "0",
    "avoid_negative_ts": "disabled",  # by itself FFmpeg would shift every fragment to the beginning
    "write_btrt": "0",  # a bit rate would make the initialization segments differ
}
"""One fragment, closed at the end, that begins at the time of its first packet; no index behind it."""


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
    options = {**OPTIONS, "fragment_index": str(number + 1)}
    try:
        with av.open(io.BytesIO(segment), format="mp4") as source, av.open(buffer, "w", "mp4", options=options) as made:
            video = source.streams.video[0]
            tick = 1 / video.average_rate
            stream = made.add_stream_from_template(video, time_base=tick)
            for packet in source.demux(video):
                if packet.dts is None:  # the demuxer's end mark
                    continue
                packet.stream, packet.time_base = stream, tick
                packet.pts = packet.dts = first_frame + frames
                packet.duration = 1
                made.mux(packet)
                frames += 1
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"this is no segment of an MP4: {error}") from None
    whole = buffer.getvalue()
    split = whole.index(b"moof") - 4  # a box begins with its size
    return Fragment(whole[:split], whole[split:], frames)


def mime(init: bytes) -> str:
    """Of an initialization segment, as Media Source Extensions want it, such as `video/mp4; codecs="avc1.64000a"`."""
    at = init.index(b"avcC") + 4
    return f'video/mp4; codecs="avc1.{init[at + 1 : at + 4].hex()}"'
