"""Figures of videos as pictures: numbers about frames `[T, H, W, 3]` in uint8, and of one video against another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from helios_cp.tiny.latents import FRAMES

GREY = np.array([0.299, 0.587, 0.114], np.float32)


def chunks_of(video: np.ndarray) -> list[np.ndarray]:
    return [video[first : first + FRAMES] for first in range(0, len(video), FRAMES)]


def motion(video: np.ndarray) -> float:
    """The mean change from frame to frame inside chunks, in grey levels."""
    return float(np.mean([np.abs(np.diff(chunk.astype(np.float32), axis=0)).mean() for chunk in chunks_of(video)]))


def colour(frames: np.ndarray) -> np.ndarray:
    """The mean of red, green and blue, in grey levels."""
    return frames.astype(np.float32).mean((0, 1, 2))


def contrast(frames: np.ndarray) -> float:
    """The mean over frames of the standard deviation of grey, in grey levels."""
    return float((frames.astype(np.float32) @ GREY).std((1, 2)).mean())


def sharpness(frames: np.ndarray) -> float:
    """The mean difference between neighbours in a row, in grey levels."""
    return float(np.abs(np.diff(frames.astype(np.float32) @ GREY, axis=2)).mean())


def drift(videos: Sequence[np.ndarray]) -> dict[str, float]:
    """The last chunk of long videos against the first: the mean over videos and colours of how far colours went, and
    how much of contrast and sharpness is left."""
    ends = [(chunks_of(video)[0], chunks_of(video)[-1]) for video in videos]
    return {
        "colour": float(np.mean([np.abs(colour(last) - colour(first)).mean() for first, last in ends])),
        "contrast": float(
            np.mean([contrast(last) for _, last in ends]) / np.mean([contrast(first) for first, _ in ends])
        ),
        "sharpness": float(
            np.mean([sharpness(last) for _, last in ends]) / np.mean([sharpness(first) for first, _ in ends])
        ),
    }


def likeness(videos: Sequence[np.ndarray], references: Sequence[np.ndarray]) -> dict[str, float | None]:
    """PSNR in dB, of the mean square error over all videos, and the mean SSIM of every eighth frame; `None` for the
    PSNR of videos that are equal."""
    from skimage.metrics import structural_similarity

    pairs = list(zip(videos, references, strict=True))
    error = float(np.mean([np.square(a.astype(np.float64) - b).mean() for a, b in pairs]))
    similar = [
        structural_similarity(frame, other, channel_axis=-1, data_range=255)
        for a, b in pairs
        for frame, other in zip(a[::8], b[::8], strict=True)
    ]
    return {"psnr": None if error == 0 else 10 * float(np.log10(255**2 / error)), "ssim": float(np.mean(similar))}
