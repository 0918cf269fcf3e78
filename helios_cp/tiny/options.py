"""What a call of the training command says, and what its stages need of each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

NEEDS: Mapping[str, tuple[str, ...]] = {
    "text": (),
    "encoder": (),
    "decoder": ("encoder",),
    "latents": ("encoder",),
    "judge": (),
    "mid": ("text", "latents"),
    "base": ("text", "latents", "mid"),
    "trajectories": ("text", "latents", "mid"),
    "distilled": ("text", "latents", "mid", "trajectories"),
    "matched": ("text", "latents", "mid", "trajectories", "distilled"),
    "sheet": ("text", "encoder", "decoder", "latents", "judge", "mid"),
    "embed": ("text", "encoder", "decoder", "latents", "judge", "mid"),
}
"""The stages in order, each with those whose results it starts from."""

AMOUNTS: Mapping[str, int] = {
    "text": 300,
    "encoder": 400,
    "decoder": 4000,
    "latents": 1200,
    "judge": 600,
    "mid": 12000,
    "base": 6000,
    "trajectories": 2400,
    "distilled": 6500,
    "matched": 600,
    "sheet": 60,
    "embed": 0,
}
"""How much a stage does unless told otherwise: steps, or scenes, clips, trajectories, prompts."""


@dataclass(frozen=True)
class Options:
    """One call: `output` is the folder that all stages share, `steps` the amount for the stages named, if given.

    `scale` multiplies the sizes of batches and `rate` the learning rates; `init` are weights to start from.
    """

    output: Path
    init: Path | None = None
    steps: int | None = None
    seed: int = 0
    device: str = "cpu"
    height: int = 64
    width: int = 128
    scale: float = 1.0
    rate: float = 1.0

    def state(self, stage: str) -> Path:
        return self.output / stage / "state.safetensors"

    def amount_of(self, stage: str) -> int:
        return self.steps or AMOUNTS[stage]

    def has(self, stage: str) -> bool:
        """Whether a stage has left something."""
        return any((self.output / stage).glob("*.safetensors"))
