"""Rendered clips: frames of a scene at any size, for as long as wanted."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from helios_cp.tiny.shapes import circle, paint
from helios_cp.tiny.subjects import PERIOD, paint_subject
from helios_cp.tiny.world import Scene

SKY = {  # zenith, horizon
    "day": ((0.22, 0.50, 0.88), (0.74, 0.88, 0.97)),
    "sunset": ((0.28, 0.20, 0.48), (0.99, 0.60, 0.32)),
    "night": ((0.02, 0.03, 0.12), (0.12, 0.17, 0.36)),
}
GROUND = {  # far, near, in daylight
    "sea": ((0.32, 0.62, 0.78), (0.05, 0.30, 0.52)),
    "meadow": ((0.52, 0.74, 0.32), (0.20, 0.50, 0.14)),
    "desert": ((0.93, 0.80, 0.55), (0.82, 0.60, 0.32)),
    "snow": ((0.88, 0.92, 0.97), (0.97, 0.98, 1.00)),
}
HILLS = {"meadow": (0.34, 0.56, 0.36), "desert": (0.80, 0.58, 0.38), "snow": (0.66, 0.76, 0.88)}
LIGHT = {"day": (1.0, 1.0, 1.0), "sunset": (0.92, 0.66, 0.56), "night": (0.26, 0.31, 0.48)}
SUN = {  # height, radius, disc, glow
    "day": (0.14, 0.07, (1.0, 0.98, 0.80), (1.0, 0.97, 0.85)),
    "sunset": (0.40, 0.11, (1.0, 0.88, 0.52), (1.0, 0.72, 0.38)),
    "night": (0.17, 0.075, (0.95, 0.95, 0.86), (0.42, 0.48, 0.68)),
}
SUN_X = 0.62
CLOUDS = ((-0.62, 0.13, 1.3), (0.25, 0.20, 1.0))  # x, y, size
CLOUD_PUFFS = ((-0.085, 0.012, 0.050), (0.0, -0.012, 0.068), (0.085, 0.014, 0.048))  # x, y, radius
CLOUD_COLOUR = {"day": (1.0, 1.0, 1.0), "sunset": (0.98, 0.58, 0.50)}
STARS = [(0.16 * ((i * 7) % 13) - 0.95, 0.05 + 0.032 * ((i * 5) % 13)) for i in range(18)]
WAVE = 2 * math.pi
"""The scenery's wave number: it repeats after one height of the picture, and the camera passes that in a period. So
everything repeats every two chunks, and what comes next follows from what was."""


def render(scene: Scene, frames: Iterable[int], height: int, width: int) -> np.ndarray:
    """Frames `[T, H, W, 3]` of the given numbers, in fp32 in [−1, 1]. The camera goes along with the subject."""
    frames = np.asarray(list(frames), np.float32)
    x = ((np.arange(width, dtype=np.float32) + 0.5 - width / 2) / height)[None, None, :]
    y = ((np.arange(height, dtype=np.float32) + 0.5) / height)[None, :, None]
    image = np.empty((len(frames), height, width, 3), np.float32)
    image[:] = _sky(scene, x, y)
    _paint_ground(scene, image, x, y, frames)
    paint_subject(scene, image, x, y, frames)
    return np.clip(image, 0, 1, out=image) * 2 - 1


def _sun_x(scene: Scene) -> float:
    return -SUN_X if scene.mirrored else SUN_X


def _horizon(scene: Scene) -> float:
    return 0.56 if scene.ground == "sea" else 0.60


def _sky(scene: Scene, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """`[1, H, W, 3]`: far away, so it stays where it is."""
    shape, pixel = (1, y.shape[1], x.shape[2]), float(y[0, 1, 0] - y[0, 0, 0])
    zenith, low = (np.asarray(colour, np.float32) for colour in SKY[scene.time])
    rise = np.clip(y / _horizon(scene), 0, 1) ** 1.4
    image = np.broadcast_to(zenith + (low - zenith) * rise[..., None], (*shape, 3)).copy()
    height, radius, disc, glow = SUN[scene.time]
    distance = circle(x - _sun_x(scene), y - height, 0.0)
    paint(image, glow, np.exp(-(distance**2) / (2 * (2.4 * radius) ** 2)) * 0.55)
    paint(image, disc, np.clip((radius - distance) / (1.5 * pixel) + 0.5, 0, 1))
    side = -1 if scene.mirrored else 1
    if scene.time == "night":
        for star_x, star_y in STARS:
            paint(image, (1.0, 1.0, 0.95), np.exp(-(circle(x - side * star_x, y - star_y, 0.0) ** 2) / 1.5e-4) * 0.8)
        return image
    for cloud_x, cloud_y, size in CLOUDS:
        puffs = [
            np.clip(
                1.25 - circle((x - side * cloud_x - px * size) / 1.25, y - cloud_y - py * size, 0.0) / (r * size),
                0,
                0.5,
            )
            for px, py, r in CLOUD_PUFFS
        ]
        paint(image, CLOUD_COLOUR[scene.time], np.maximum.reduce(puffs) * 1.6)
    return image


def _paint_ground(scene: Scene, image: np.ndarray, x: np.ndarray, y: np.ndarray, frames: np.ndarray) -> None:
    """Hills and ground, which pass by as the camera moves; over a landscape without a subject it stands still."""
    pixel, horizon = float(y[0, 1, 0] - y[0, 0, 0]), _horizon(scene)
    speed = {"right": 1.0, "left": -1.0}[scene.direction] / PERIOD if scene.subject != "none" else 0.0
    passed = (frames * speed)[:, None, None]
    light, low = np.asarray(LIGHT[scene.time], np.float32), np.asarray(SKY[scene.time][1], np.float32)
    if scene.ground in HILLS:
        ridge = horizon - 0.07 - 0.05 * np.sin(WAVE * (x + passed))
        colour = np.asarray(HILLS[scene.ground], np.float32) * light * 0.8 + low * 0.2
        paint(image, colour, np.clip((y - ridge) / (1.5 * pixel) + 0.5, 0, 1))
    depth = np.clip((y - horizon) / (1 - horizon), 0, 1)
    far, near = (np.asarray(colour, np.float32) * light for colour in GROUND[scene.ground])
    if scene.ground == "sea":
        far = far * 0.75 + low * 0.25
    colour = far + (near - far) * depth[..., None] ** 0.8
    stripes = np.sin(WAVE * (x + 2 * passed) + 9 * depth)  # near ground passes twice as fast as hills
    if scene.ground == "sea":
        ripple = np.sin(22 * np.sqrt(depth + 0.02) + 1.2 * stripes - frames[:, None, None] * (4 * math.pi / PERIOD))
        ripple = ripple * (0.35 + 0.65 * depth)
        colour = colour + (0.07 * ripple)[..., None] * (0.4 + 0.6 * light)
        if scene.time != "day":  # the sun's or moon's path on the water
            path = np.exp(-((x - _sun_x(scene)) ** 2) / (2 * (0.06 + 0.12 * depth) ** 2)) * (0.45 + 0.35 * ripple)
            disc = np.asarray(SUN[scene.time][2], np.float32)
            colour = colour + (disc - colour) * (np.clip(path, 0, 1) * 0.6)[..., None]
    else:
        contrast = {"meadow": 0.16, "desert": 0.12, "snow": 0.09}[scene.ground]
        colour = colour * (1 + contrast * np.tanh(1.5 * stripes) * (0.4 + 0.6 * depth))[..., None]
    paint(image, colour, np.broadcast_to(np.clip((y - horizon) / (1.5 * pixel) + 0.5, 0, 1), image.shape[:3]))
