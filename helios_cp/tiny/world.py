"""What a clip of the embedded models' world can show: scenes, and the combinations that are never trained on."""

from __future__ import annotations

import random
from dataclasses import dataclass

GROUNDS = ("sea", "meadow", "desert", "snow")
TIMES = ("day", "sunset", "night")
SUBJECTS = ("ball", "balloon", "boat", "bird", "car", "none")
COLOURS = ("red", "yellow", "green", "blue", "pink", "white")
DIRECTIONS = ("right", "left")

TRAINED_SIZE = (64, 128)
"""Height and width in pixels of the clips that the embedded models were trained on."""

HELD_OUT = frozenset(
    {
        ("red", "balloon", "meadow"),
        ("blue", "ball", "desert"),
        ("yellow", "boat", "sea"),
        ("green", "car", "snow"),
        ("white", "bird", "sea"),
        ("pink", "balloon", "sea"),
        ("pink", "car", "desert"),
        ("yellow", "ball", "snow"),
    }
)
"""(colour, subject, ground) that no training clip shows, so that prompts for them have to be composed."""


@dataclass(frozen=True)
class Scene:
    """All that decides a clip. What a caption does not name is drawn from few values, so that little is left to chance:
    `mirrored` puts sun and clouds on the other side, `x` and `size` move and scale the subject a little.
    """

    ground: str
    time: str
    subject: str
    colour: str
    direction: str
    mirrored: bool
    x: float
    size: float

    @property
    def is_held_out(self) -> bool:
        return (self.colour, self.subject, self.ground) in HELD_OUT

    @property
    def labels(self) -> dict[str, str]:
        """What a caption can name and a classifier must see."""
        return {
            "ground": self.ground,
            "time": self.time,
            "subject": self.subject,
            "colour": self.colour,
            "direction": self.direction,
        }


def grounds_of(subject: str) -> tuple[str, ...]:
    """Where a subject can be: boats at sea, cars on land."""
    return {"boat": ("sea",), "car": GROUNDS[1:]}.get(subject, GROUNDS)


def draw_scene(generator: random.Random, held_out: bool = False) -> Scene:
    """A scene for training, or one of the held-out combinations."""
    while True:
        subject = generator.choices(SUBJECTS, (4, 4, 3, 4, 4, 1))[0]
        scene = Scene(
            ground=generator.choice(grounds_of(subject)),
            time=generator.choice(TIMES),
            subject=subject,
            colour=generator.choice(COLOURS),
            direction=generator.choices(DIRECTIONS, (2, 1))[0],
            mirrored=generator.random() < 0.5,
            x=generator.uniform(-0.06, 0.06),
            size=generator.uniform(0.95, 1.05),
        )
        if scene.is_held_out == held_out:
            return scene
