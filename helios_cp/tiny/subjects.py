"""The five subjects of the embedded models' world, painted over a scenery."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from helios_cp.tiny.shapes import box, circle, cover, ellipse, paint, polygon, soft_spot
from helios_cp.tiny.world import Scene

COLOURS = {
    "red": (0.90, 0.10, 0.10),
    "yellow": (1.00, 0.86, 0.08),
    "green": (0.05, 0.62, 0.20),
    "blue": (0.10, 0.25, 0.95),
    "pink": (1.00, 0.35, 0.78),
    "white": (0.97, 0.97, 0.97),
}
LIGHT = {"day": (1.0, 1.0, 1.0), "sunset": (0.97, 0.88, 0.84), "night": (0.80, 0.82, 0.90)}
SHADOW = (0.05, 0.06, 0.10)
WOOD, BASKET, BEAK = (0.42, 0.26, 0.15), (0.50, 0.33, 0.18), (0.98, 0.70, 0.15)
PERIOD = 66
"""Frames after which everything repeats: two chunks."""


@dataclass(frozen=True)
class Brush:
    """Where a subject is painted and in what light: `x` and `y` from its middle, facing right, `turn` `[T, 1, 1]` its
    phase in radians, 0 at frame 0 and 2π a period later."""

    image: np.ndarray
    x: np.ndarray
    y: np.ndarray
    turn: np.ndarray
    pixel: float
    base: np.ndarray
    light: np.ndarray

    @property
    def dark(self) -> np.ndarray:
        return self.base * 0.6

    @property
    def bright(self) -> np.ndarray:
        return self.base + (1 - self.base) * 0.25

    def fill(self, colour, distance) -> None:
        shape = self.image.shape[:3]
        paint(self.image, colour, np.broadcast_to(cover(distance, self.pixel), shape))

    def shade(self, strength) -> None:
        paint(self.image, SHADOW, np.broadcast_to(strength, self.image.shape[:3]))

    def shaded(self, amount) -> np.ndarray:
        """The base colour from dark (0) to bright (1)."""
        return self.dark + (self.bright - self.dark) * np.clip(amount, 0, 1)[..., None]


def paint_subject(scene: Scene, image: np.ndarray, x: np.ndarray, y: np.ndarray, frames: np.ndarray) -> None:
    """Paint the scene's subject over `image` `[T, H, W, 3]` in [0, 1], at `x` `[1, 1, W]` and `y` `[1, H, 1]`."""
    if scene.subject == "none":
        return
    way = 1 if scene.direction == "right" else -1
    light = np.asarray(LIGHT[scene.time], np.float32)
    turn = (frames * (2 * math.pi / PERIOD))[:, None, None].astype(np.float32)
    x = (x - scene.x) * way / scene.size
    pixel = float(y[0, 1, 0] - y[0, 0, 0]) / scene.size
    base = np.asarray(COLOURS[scene.colour], np.float32) * light
    PAINTERS[scene.subject](Brush(image, x, y, turn, pixel, base, light))


def _ball(brush: Brush) -> None:
    radius, ground = 0.21, 0.88
    hop = np.abs(np.cos(brush.turn))
    x, y = brush.x, brush.y - (ground - radius - 0.34 * hop)
    brush.shade(soft_spot(x, brush.y - ground, radius * 1.1, radius * 0.25) * (0.5 - 0.3 * hop))
    brush.fill(brush.shaded(0.62 + (x * 0.5 - y * 0.8) / radius * 0.4), circle(x, y, radius))


def _balloon(brush: Brush) -> None:
    radius = 0.25
    x, y = brush.x, brush.y - (0.33 + 0.03 * np.sin(brush.turn))
    taper = np.clip(1 - np.maximum(y, 0) / (1.45 * radius) * 0.62, 0.3, 1)
    envelope = (np.sqrt((x / taper) ** 2 + np.where(y > 0, y / 1.3, y) ** 2) - radius) * 0.8
    stripes = 0.10 * np.sign(np.cos(7.5 * x / (taper * radius)))
    brush.fill(brush.shaded(0.62 - 0.5 * x / radius - 0.2 * y / radius + stripes), envelope)
    for side in (-0.03, 0.03):
        brush.fill(np.asarray(WOOD) * brush.light, box(x - side, y - 1.4 * radius, 0.005, 0.05))
    brush.fill(np.asarray(BASKET) * brush.light, box(x, y - 1.4 * radius - 0.075, 0.055, 0.042, 0.01))


def _boat(brush: Brush) -> None:
    tilt = 0.08 * np.sin(brush.turn)
    x, y = brush.x / 1.45, (brush.y - (0.74 + 0.012 * np.cos(brush.turn))) / 1.45
    x, y = x * np.cos(tilt) + y * np.sin(tilt), y * np.cos(tilt) - x * np.sin(tilt)
    brush.shade(soft_spot(x, y - 0.075, 0.19, 0.03) * 0.35)
    brush.fill(np.asarray(WOOD) * 0.7 * brush.light, box(x, y + 0.19, 0.008, 0.21))
    brush.fill((brush.bright + brush.base) / 2, polygon(x, y, [(0.015, -0.40), (0.20, -0.045), (0.015, -0.045)]))
    brush.fill(brush.base * 0.85, polygon(x, y, [(-0.012, -0.36), (-0.012, -0.045), (-0.14, -0.045)]))
    hull = np.maximum(ellipse(x, y + 0.03, 0.21, 0.11), -(y + 0.025))
    brush.fill(np.asarray(WOOD) * brush.light, hull)


def _bird(brush: Brush) -> None:
    scale = 1.9
    x, y = brush.x / scale, (brush.y - (0.36 + 0.03 * np.cos(brush.turn))) / scale
    flap = np.sin(4 * brush.turn)  # four beats a period, else a latent frame holds half a beat
    brush.fill(np.asarray(BEAK) * brush.light, polygon(x, y, [(0.14, -0.045), (0.19, -0.022), (0.14, -0.008)]))
    brush.fill(brush.dark, polygon(x, y, [(-0.18, 0.03), (-0.19, -0.045), (-0.08, -0.005)]))
    brush.fill(brush.base, np.minimum(ellipse(x, y, 0.115, 0.052), circle(x - 0.105, y + 0.028, 0.044)))
    brush.fill(SHADOW, circle(x - 0.118, y + 0.036, 0.010))
    rise = 0.15 * flap  # the wing's tip, above or below the body
    up = np.where(rise >= 0, -1.0, 1.0)
    reach = (y + 0.015) * up
    along = np.clip(reach / (np.abs(rise) + 0.02), 0, 1)
    wing = np.maximum(
        np.abs(x + 0.015 + 0.05 * along) - (0.062 * (1 - along) + 0.012),
        np.maximum(reach - np.abs(rise) - 0.02, -reach - 0.012),
    )
    brush.fill(brush.bright * 0.6 + brush.base * 0.4, wing)


def _car(brush: Brush) -> None:
    scale = 1.75
    x, y = brush.x / scale, (brush.y - (0.76 + 0.008 * np.sin(4 * brush.turn))) / scale
    brush.shade(soft_spot(x, y - 0.105, 0.22, 0.03) * 0.5)
    body = box(x, y - 0.02, 0.21, 0.058, 0.035)
    cabin = polygon(x, y, [(-0.105, -0.125), (0.035, -0.125), (0.115, -0.03), (-0.135, -0.03)])
    brush.fill(brush.shaded(0.55 - y / 0.2), np.minimum(body, cabin))
    glass = polygon(x, y, [(-0.09, -0.108), (0.028, -0.108), (0.09, -0.036), (-0.11, -0.036)])
    brush.fill(np.asarray((0.62, 0.80, 0.90)) * (0.3 + 0.7 * brush.light), glass)
    brush.fill(brush.base, box(x + 0.025, y + 0.07, 0.009, 0.045))
    brush.fill((1.0, 0.95, 0.6), ellipse(x - 0.195, y - 0.01, 0.014, 0.018))
    for wheel in (-0.115, 0.115):
        hub = circle(x - wheel, y - 0.078, 0.0)
        brush.fill((0.08, 0.08, 0.09), hub - 0.048)
        brush.fill(np.asarray((0.75, 0.75, 0.78)) * brush.light, hub - 0.020)


PAINTERS = {"ball": _ball, "balloon": _balloon, "boat": _boat, "bird": _bird, "car": _car}
