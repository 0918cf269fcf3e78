"""Pictures that users give: checked before any model is loaded, and read as tensors in [-1, 1].

They are brought to the size of the video by diffusers' `VideoProcessor`: the numbers are diffusers' own. "stretch"
scales both sides and may change the shape, as diffusers' pipelines do. "crop" fills the video and cuts off the rest of
the picture. "fit" shows the whole picture and fills the rest of the video from its border.
"""

from __future__ import annotations

import contextlib
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from helios_cp.config.checkpoint import VAE_SPATIAL
from helios_cp.config.errors import RequestError

if TYPE_CHECKING:
    import torch

PathLike = str | os.PathLike[str]

DIFFUSERS_MODES = {"stretch": "default", "crop": "crop", "fit": "fill"}
VISIBLE_STRETCH = 1.1
"""From here on people see that a shape is wrong."""
MOST_PIXELS = 2**28
"""Of a picture: 16384 × 16384. It takes 0.8 GB as RGB."""
MOST_TEXT = 2**28
"""Bytes of a PNG's texts and colour profile, unpacked. Programs store whole workflows there."""


def read_image(path: PathLike, height: int, width: int, mode: str = "stretch") -> torch.Tensor:
    """Read a picture as fp32 `[1, 3, height, width]` in [-1, 1]; `mode` as above.

    EXIF orientation is honoured; grey, palette, CMYK and 16-bit pictures become RGB, and transparent ones are laid over
    white. Of an animation the first picture counts. Raises `RequestError`.
    """
    return resize(open_picture(path), height, width, mode)


def picture_remarks(path: PathLike, height: int, width: int, mode: str) -> list[str]:
    """What to tell of a picture that was checked, before it becomes a video of this size."""
    picture = open_picture(path)
    return stretch_remark("--image", path, (picture.height, picture.width), height, width) if mode == "stretch" else []


def open_picture(path: PathLike) -> Image.Image:
    """A picture as people see it, in RGB with 8 bits a colour. Raises `RequestError`."""
    check_readable("--image", path)
    try:
        with _own_limits(), Image.open(path) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                raise ValueError(f"{picture.width} × {picture.height} pixels; at most {MOST_PIXELS} are allowed")
            return to_rgb(picture)
    except Exception as error:  # what Pillow raises for broken files differs from format to format
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RequestError(f"--image {path}: this cannot be read as a picture ({reason}); give a PNG or JPEG") from None


@contextmanager
def _own_limits() -> Iterator[None]:
    """Lift Pillow's limits inside, because they refuse large photographs, and texts of a megabyte."""
    before = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = None, MOST_TEXT, MOST_TEXT
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of broken EXIF, which is not the picture
            yield
    finally:
        Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = before


def to_rgb(picture: Image.Image) -> Image.Image:
    """Any picture as people see it, with 8 bits a colour. Raises `RequestError` for pixels of unknown range."""
    picture.load()
    with contextlib.suppress(Exception):  # EXIF that cannot be read, which viewers ignore
        picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        pixels = np.asarray(picture).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise RequestError("image with 32-bit pixels: save it with 8 or 16 bits")
        picture = Image.fromarray(((pixels + 128) // 257).astype(np.uint8))  # Pillow would clip 16-bit grey to white
    elif picture.mode == "F":
        raise RequestError("image with floating-point pixels: their range is unknown; save it with 8 or 16 bits")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def resize(picture: Image.Image, height: int, width: int, mode: str = "stretch") -> torch.Tensor:
    """An RGB picture as fp32 `[1, 3, height, width]` in [-1, 1], by Lanczos."""
    from diffusers.video_processor import VideoProcessor  # seconds, which most videos need not wait for

    processor = VideoProcessor(vae_scale_factor=VAE_SPATIAL)
    return processor.preprocess(picture, height=height, width=width, resize_mode=DIFFUSERS_MODES[mode])


def stretch_remark(flag: str, path: PathLike, shape: tuple[float, float], height: int, width: int) -> list[str]:
    """What to tell of a picture of `shape` (height, width) that is stretched visibly; at most one line."""
    by = (width / height) / (shape[1] / shape[0])
    if max(by, 1 / by) < VISIBLE_STRETCH:
        return []
    change = f"{by:.1f} times as wide" if by > 1 else f"{1 / by:.1f} times as high"
    return [
        f"{flag} {path}: {shape[1]:g} × {shape[0]:g} is stretched to {width} × {height}, {change} as it should be; "
        "--resize-mode crop or fit keeps its shape"
    ]


def check_readable(flag: str, path: PathLike) -> None:
    """Raise `RequestError` unless the path is that of a regular file that is not empty."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RequestError(f"{flag} {path}: {reason}; give the path of a local file") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise RequestError(f"{flag} {path}: this is {kind}; give the path of a file")
    if not status.st_size:
        raise RequestError(f"{flag} {path}: the file is empty")
