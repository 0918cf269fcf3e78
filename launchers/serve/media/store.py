"""The media of a session on disk: immutable files that any web server can hand on.

init.mp4      the initialization segment
00007.m4s     chunk 7
00007.json    what is told of chunk 7
live.m3u8     the playlist
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from helios_cp.files.mp4 import encode_segment
from launchers.serve.media.fragments import fragment, mime

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


@functools.lru_cache(maxsize=64)
def blank_init(height: int, width: int, fps: float) -> bytes:
    """The initialization segment of every video of a size and rate: its headers do not depend on the pictures."""
    black = torch.zeros(1, height, width, 3, dtype=torch.uint8)
    return fragment(encode_segment(black, fps), 0, 0).init


def blank_mime(height: int, width: int, fps: float) -> str:
    return mime(blank_init(height, width, fps))


KEPT = 4
"""Of the newest chunks the bytes stay in memory: most viewers are at the end."""


class MediaStore:
    """`chunks` are the metadata of each, which counts once it is in the list; `init` is the initialization segment.

    The run folder has the same pictures, so these files are not synced to disk: what a power cut spoils is made again.
    """

    def __init__(self, folder: Path, init: bytes, fps: float, chunk_frames: int) -> None:
        self.folder = folder
        self.init = init
        self.fps = fps
        self.chunk_frames = chunk_frames
        self.chunks: list[dict[str, Any]] = []
        self._newest: dict[int, bytes] = {}

    @property
    def frames(self) -> int:
        return sum(each["frames"] for each in self.chunks)

    @property
    def seconds(self) -> float:
        """Of media that are ready."""
        return self.frames / self.fps

    @property
    def chunk_seconds(self) -> float:
        return self.chunk_frames / self.fps

    @property
    def mime(self) -> str:
        return mime(self.init)

    def write(self, segment: bytes, about: Mapping[str, Any]) -> dict[str, Any]:
        """Make the next chunk's files, but for the playlist; returns its metadata, which `add` makes count.

        It takes some milliseconds, and any thread may call it, one at a time.
        """
        chunk = len(self.chunks)
        made = fragment(segment, self.frames, chunk)
        if self.init != made.init:
            raise ValueError("the settings of this chunk's encoder are not those of the session")
        if chunk == 0:
            self._put(INIT, made.init)
        self._put(fragment_name(chunk), made.media)
        metadata = {
            "chunk": chunk,
            "first_frame": self.frames,
            "frames": made.frames,
            "bytes": len(made.media),
            "media_time": self.seconds,
            "duration": made.frames / self.fps,
            **about,
        }
        self._put(f"{chunk:05d}.json", json.dumps(metadata).encode())
        self._newest[chunk] = made.media
        self._newest.pop(chunk - KEPT, None)
        return metadata

    def add(self, metadata: dict[str, Any]) -> None:
        """Show a chunk that is written."""
        self.chunks.append(metadata)
        self.write_playlist(is_finished=False)

    def write_playlist(self, is_finished: bool) -> None:
        self._put(PLAYLIST, self.playlist(is_finished).encode())

    def playlist(self, is_finished: bool, query: str = "") -> str:
        return playlist([each["duration"] for each in self.chunks], self.chunk_seconds, is_finished, query)

    def media(self, chunk: int) -> bytes:
        """The fragment of a chunk."""
        kept = self._newest.get(chunk)
        return kept if kept is not None else (self.folder / fragment_name(chunk)).read_bytes()

    def load(self, most: int) -> None:
        """Take up the files that an earlier server left, in order, as far as they are whole, `most` chunks."""
        for chunk in range(most):
            try:
                metadata = json.loads((self.folder / f"{chunk:05d}.json").read_text())
                if (self.folder / fragment_name(chunk)).stat().st_size != metadata["bytes"]:
                    return
            except (OSError, ValueError, KeyError, TypeError):
                return
            self.chunks.append(metadata)

    def _put(self, name: str, content: bytes) -> None:
        """Whole or absent for all who read, though not yet on disk for good."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".{name}.partial"
        partial.write_bytes(content)
        os.replace(partial, self.folder / name)
