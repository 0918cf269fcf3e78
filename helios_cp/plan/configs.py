"""Helios-14B as configs alone, and the configs of a checkpoint's VAE and text encoder: what a plan is made from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helios_cp.config.checkpoint import Checkpoint, TransformerConfig
from helios_cp.config.errors import RequestError
from helios_cp.model.vae.config import VaeConfig
from helios_cp.plan.weight_cost import TextEncoderConfig

BUILT_IN = {"14b": "distilled", "14b-mid": "mid", "14b-base": "base"}


@dataclass(frozen=True)
class BuiltInCheckpoint(Checkpoint):
    """Helios-14B as a config alone; there is no folder."""

    @property
    def stages(self) -> int:
        return 3 if self.is_pyramid else 1

    @classmethod
    def named(cls, name: str) -> BuiltInCheckpoint:
        """One of `BUILT_IN`. Only Mid has CFG-Zero*."""
        variant = BUILT_IN[name]
        return cls(Path(name), variant, variant == "mid", TransformerConfig())


def part_configs(checkpoint: Checkpoint) -> tuple[VaeConfig, TextEncoderConfig]:
    """Sizes of the VAE and the text encoder, from their JSON files. Raises `RequestError`."""
    if isinstance(checkpoint, BuiltInCheckpoint):
        return VaeConfig(), TextEncoderConfig()
    return _part(VaeConfig, checkpoint, "vae"), _part(TextEncoderConfig, checkpoint, "text_encoder")


def _part(kind: Any, checkpoint: Checkpoint, part: str) -> Any:
    path = checkpoint.folder / part / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        known = {name: values[name] for name in kind.__dataclass_fields__ if name in values}
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in known.items()})
    except (OSError, ValueError, TypeError) as error:
        raise RequestError(f"--model {checkpoint.folder}: {part}/config.json cannot be read: {error}") from None
