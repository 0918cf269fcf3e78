"""Anti-aliased shapes on arrays of coordinates: signed distances, negative inside, in heights of the picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def paint(image: np.ndarray, colour, cover: np.ndarray) -> None:
    """Blend a colour, `[3]` or `[T, H, W, 3]`, over `image` `[T, H, W, 3]` in place where `cover` `[T, H, W]` is 1."""
    image += (np.asarray(colour, np.float32) - image) * cover[..., None]


def cover(distance: np.ndarray, pixel: float) -> np.ndarray:
    """1 inside, 0 outside, with an edge of 1.3 pixels."""
    return np.clip(0.5 - distance / (1.3 * pixel), 0, 1)


def circle(x, y, radius: float):
    return np.sqrt(x**2 + y**2) - radius


def ellipse(x, y, rx: float, ry: float):
    return (np.sqrt((x / rx) ** 2 + (y / ry) ** 2) - 1) * min(rx, ry)


def box(x, y, rx: float, ry: float, corner: float = 0.0):
    """A rectangle of half sizes `rx` and `ry` with rounded corners."""
    qx, qy = np.abs(x) - rx + corner, np.abs(y) - ry + corner
    outside = np.sqrt(np.maximum(qx, 0) ** 2 + np.maximum(qy, 0) ** 2)
    return np.minimum(np.maximum(qx, qy), 0) + outside - corner


def polygon(x, y, points: Sequence[tuple[float, float]]):
    """A convex polygon with its corners clockwise, y pointing down: the largest distance to one of its edges."""
    distance = None
    for (ax, ay), (bx, by) in zip(points, [*points[1:], points[0]], strict=True):
        nx, ny = by - ay, ax - bx
        edge = ((x - ax) * nx + (y - ay) * ny) / math.hypot(nx, ny)
        distance = edge if distance is None else np.maximum(distance, edge)
    return distance


def soft_spot(x, y, rx: float, ry: float):
    """A shadow: 1 in the middle, fading out."""
    return np.exp(-((x / rx) ** 2 + (y / ry) ** 2))
