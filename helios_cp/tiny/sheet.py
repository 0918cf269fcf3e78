"""Contact sheets: a row a video, frames spread over it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def write_sheet(videos: Sequence[np.ndarray], columns: int, path: Path, scale: int = 1) -> None:
    """Write a picture of videos `[T, H, W, 3]` in uint8 of one size, `scale` times as large as they are."""
    from PIL import Image

    rows = [
        np.concatenate(list(video[np.linspace(0, len(video) - 1, columns).round().astype(int)]), 1) for video in videos
    ]
    picture = Image.fromarray(np.concatenate(rows))
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC).save(path, quality=90)


def write_sheet_of_files(
    paths: Sequence[Path], columns: int, path: Path, size: tuple[int, int], scale: int = 1
) -> None:
    """The same for clips on disk, read at `size` (height, width)."""
    from helios_cp.files.clips import read_video

    clips = [((read_video(each, *size)[0] + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy() for each in paths]
    write_sheet(clips, columns, path, scale)
