"""Brings pictures of any size to the size of the video, by diffusers' `VideoProcessor`: the numbers are diffusers' own.

"stretch" scales both sides and may change the shape, as diffusers' pipelines do. "crop" fills the video and cuts off
the rest of the picture. "fit" shows the whole picture and fills the rest of the video from its border.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from PIL import Image

from helios_cp.config.checkpoint import VAE_SPATIAL
from helios_cp.config.errors import RequestError

if TYPE_CHECKING:
    import torch

PathLike = str | os.PathLike[str]

DIFFUSERS_MODES = {"stretch": "default", "crop": "crop", "fit": "fill"}
VISIBLE_STRETCH = 1.1
"""From here on people see that a shape is wrong."""


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
