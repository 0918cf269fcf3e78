"""The HLS playlist of a session (RFC 8216): every fragment so far, in order."""

from __future__ import annotations

import math
from collections.abc import Sequence

INIT = "init.mp4"
PLAYLIST = "live.m3u8"


def fragment_name(chunk: int) -> str:
    return f"{chunk:05d}.m4s"


def playlist(durations: Sequence[float], target: float, is_finished: bool, query: str = "") -> str:
    """`durations`: seconds of each fragment; `target`: of the longest to come; `query`: follows each address.

    Nothing is ever taken from it, so a player can go back to the beginning (an EVENT playlist).
    """
    lines = [
        "#EXTM3U",
        "#EXT-X-VERSION:7",
        f"#EXT-X-TARGETDURATION:{math.ceil(max([target, *durations]))}",
        "#EXT-X-MEDIA-SEQUENCE:0",
        "#EXT-X-PLAYLIST-TYPE:EVENT",
        "#EXT-X-INDEPENDENT-SEGMENTS",
    ]
    if durations:
        lines.append(f'#EXT-X-MAP:URI="{INIT}{query}"')
    for chunk, seconds in enumerate(durations):
        lines += [f"#EXTINF:{seconds:.6f},", fragment_name(chunk) + query]
    if is_finished:
        lines.append("#EXT-X-ENDLIST")
    return "\n".join(lines) + "\n"
