"""What a file is by its first bytes, whatever its name says, and whether it is that and nothing else beside."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

PICTURE, CLIP = "picture", "clip"
ALLOWED = "allowed are PNG, JPEG and WebP pictures, and MP4, MOV, WebM and Matroska clips"

FOREIGN = re.compile(rb"<script|<html|<\?php|PK\x05\x06", re.IGNORECASE)
"""What other programs would run, show or unpack: the last is the directory at the end of a ZIP file."""


class NotAllowedError(ValueError):
    """The text says what the file is."""


@dataclass(frozen=True)
class Format:
    """`starts` tells it by its content; `end` is where it ends by its own account, `None` where it does not say."""

    name: str
    kind: str
    suffix: str
    starts: Callable[[bytes], bool]
    end: Callable[[bytes], int | None]


def format_of(content: bytes) -> Format:
    """Raises `NotAllowedError` for another format, a file that is cut off, and one that is two files in one."""
    found = next((each for each in FORMATS if each.starts(content)), None)
    if found is None:
        raise NotAllowedError(f"{_guess(content)}; {ALLOWED}")
    end = found.end(content)
    if end is not None and end > len(content):
        raise NotAllowedError(f"this {found.name} is cut off; give the whole file")
    if end is not None and end < len(content):
        raise NotAllowedError(f"this {found.name} has {len(content) - end} bytes behind its end; give it without them")
    return found


def _guess(content: bytes) -> str:
    if not content:
        return "the file is empty"
    start = content[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    names = {b"<svg": "an SVG", b"<?xml": "an XML file", b"<!doctype": "a web page", b"<html": "a web page"}
    names |= {b"gif8": "a GIF", b"bm": "a BMP", b"%pdf": "a PDF", b"pk\x03\x04": "a ZIP file", b"#extm3u": "a playlist"}
    return next((f"this is {name}" for begin, name in names.items() if start.startswith(begin)), "this is neither")


def _png_end(content: bytes) -> int:
    """A chunk is its length, its name, that many bytes and a checksum (PNG specification, 5.3)."""
    at = 8
    while at < len(content):
        length, name = int.from_bytes(content[at : at + 4]), content[at + 4 : at + 8]
        at += 12 + length
        if name == b"IEND":
            return at
    return len(content) + 1


def _jpeg_end(content: bytes) -> int | None:
    """Segments up to the end of the image (ITU-T T.81, B.1). Cameras put a second picture or a short clip behind it,
    which is no harm; a program there is refused."""
    at = 2
    while at + 4 <= len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if marker == 0xFF:  # may stand before each marker
            at += 1
        elif marker == 0xD9:
            foreign = FOREIGN.search(content, at + 2)
            return None if foreign is None else at + 2
        elif marker == 0x01 or 0xD0 <= marker <= 0xD7:
            at += 2
        else:
            at += 2 + int.from_bytes(content[at + 2 : at + 4])
            if marker == 0xDA:  # compressed data, up to a marker that is none of its own
                found = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]").search(content, at)
                at = len(content) if found is None else found.start()
    return None if content.endswith(b"\xff\xd9") else len(content) + 1


def _webp_end(content: bytes) -> int:
    size = int.from_bytes(content[4:8], "little")
    return 8 + size + size % 2


def _mp4_end(content: bytes) -> int:
    """Boxes, each of which begins with its size and its name (ISO/IEC 14496-12, 4.2)."""
    at = 0
    while at + 8 <= len(content):
        size, name = int.from_bytes(content[at : at + 4]), content[at + 4 : at + 8]
        if not (name.isascii() and name.decode().isprintable()):
            return at
        if size == 1:
            size = int.from_bytes(content[at + 8 : at + 16])
        if size == 0:
            return len(content)
        if size < 8:
            return at
        at += size
    return at


FORMATS = (
    Format("PNG", PICTURE, ".png", lambda content: content.startswith(b"\x89PNG\r\n\x1a\n"), _png_end),
    Format("JPEG", PICTURE, ".jpg", lambda content: content.startswith(b"\xff\xd8\xff"), _jpeg_end),
    Format("WebP", PICTURE, ".webp", lambda content: content[:4] == b"RIFF" and content[8:12] == b"WEBP", _webp_end),
    Format("MP4", CLIP, ".mp4", lambda content: content[4:8] == b"ftyp", _mp4_end),
    Format("Matroska", CLIP, ".mkv", lambda content: content.startswith(b"\x1a\x45\xdf\xa3"), lambda content: None),
)
