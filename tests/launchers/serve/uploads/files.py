"""Files that people send, good and bad, made here."""

from __future__ import annotations

import base64
import io
import struct
import zipfile
import zlib

import av
import numpy as np
from PIL import Image


def picture(kind: str = "PNG", width: int = 96, height: int = 64, mode: str = "RGB", **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def clip(frames: int = 40, kind: str = "mp4", codec: str = "libx264", width: int = 64, height: int = 64) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=24)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            pixels = np.full((height, width, 3), index * 5 % 255, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def sound(kind: str = "mp4") -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream("aac" if kind == "mp4" else "libopus", rate=48000, layout="mono")
        for index in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 960), dtype=np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts = 48000, index * 960
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def png_of_size(width: int, height: int, *, with_pixels: bool = True) -> bytes:
    """A small file that claims, and with pixels holds, a huge black picture: a decompression bomb."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = zlib.compressobj(9)
    packed = b""
    if with_pixels:
        for _ in range(height):
            packed += rows.compress(bytes(1 + width // 8 + 1))
    packed += rows.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def zip_file() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("run.js", "alert(1)")
    return buffer.getvalue()


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def without_frames() -> bytes:
    """An MP4 whose one video track has no sample."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.start_encoding()
    return buffer.getvalue()


BAD_FILES = {
    "empty": b"",
    "text": b"a fox",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
    "svg behind xml": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>',
    "web page": b"<!DOCTYPE html><html><script>alert(1)</script></html>",
    "gif": picture("GIF"),
    "bmp": picture("BMP"),
    "tiff": picture("TIFF"),
    "icon": picture("ICO"),
    "pdf": picture("PDF"),
    "zip": zip_file(),
    "playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
    "list of files": b"ffconcat version 1.0\nfile /etc/passwd\n",
    "session description": b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 5000 RTP/AVP 96\n",
    "pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix.",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(id) system\n",
    "half a PNG": picture()[:2000],
    "a PNG's beginning": picture()[:8],
    "half a JPEG": picture("JPEG")[:1500],
    "half a WebP": picture("WEBP")[:500],
    "PNG with a web page behind": picture() + b"<html><script>alert(1)</script></html>",
    "PNG with a ZIP behind": picture() + zip_file(),
    "JPEG with a ZIP behind": picture("JPEG") + zip_file(),
    "JPEG with a web page behind": picture("JPEG") + b"<html><script>alert(1)</script></html>",
    "JPEG with a program behind": picture("JPEG") + b"<?php system('id'); ?>",
    "WebP with a ZIP behind": picture("WEBP") + zip_file(),
    "MP4 with a ZIP behind": clip() + zip_file(),
    "MP4 with a web page behind": clip() + b"<html><script>alert(1)</script></html>",
    "PNG with wrong checksums": picture().replace(b"IDAT", b"IDAT\x00\x00", 1),
    "PNG without pixels": png_of_size(64, 64, with_pixels=False),
    "PNG of 10^10 pixels": png_of_size(100_000, 100_000, with_pixels=False),
    "bomb of 200 million pixels": png_of_size(20_000, 10_000),
    "PNG of no pixels": png_of_size(0, 0),
    "JPEG of noise": b"\xff\xd8\xff\xe0" + bytes(range(256)) * 20,
    "half an MP4": clip()[: len(clip()) // 2],
    "an MP4's beginning": clip()[:40],
    "MP4 without frames": without_frames(),
    "MP4 of 5 frames": clip(5),
    "MP4 of sound alone": sound(),
    "WebM of sound alone": sound("webm"),
    "half a Matroska": b"\x1a\x45\xdf\xa3" + bytes(1000),
    "MP4 of noise": b"\x00\x00\x00\x18ftypisom" + bytes(range(256)) * 20,
    "AVI": clip(kind="avi"),
    "MPEG": clip(kind="mpegts"),
}
"""By what they are; each has to be refused."""
