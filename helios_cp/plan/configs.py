"""The configs that a plan is made from: those of Helios-14B, built in, or those of a checkpoint's parts."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helios_cp.config.checkpoint import Checkpoint, TransformerConfig
from helios_cp.config.errors import RequestError
from helios_cp.config.paths import cache_folder
from helios_cp.model.vae.config import VaeConfig

BUILT_IN = {"14b": "distilled", "14b-mid": "mid", "14b-base": "base"}


@dataclass(frozen=True)
class BuiltInCheckpoint(Checkpoint):
    """A model as configs alone, those of Helios-14B unless told otherwise; there is no folder."""

    vae: VaeConfig = field(default_factory=VaeConfig)

    @property
    def stages(self) -> int:
        return 3 if self.is_pyramid else 1

    @classmethod
    def named(cls, name: str) -> BuiltInCheckpoint:
        """One of `BUILT_IN`. Only Mid has CFG-Zero*."""
        variant = BUILT_IN[name]
        return cls(Path(name), variant, variant == "mid", TransformerConfig())


def find_checkpoint(model: str) -> Checkpoint:
    """A built-in config, or a checkpoint as `helios_cp.generate` finds it. Raises `RequestError`."""
    if model in BUILT_IN:
        return BuiltInCheckpoint.named(model)
    from helios_cp.weights.load import resolve  # which imports all of torch's libraries of models

    return resolve(model, cache_folder(os.environ), weights=())


@dataclass(frozen=True)
class TextEncoderConfig:
    """The keys of a UMT5 encoder's `config.json` that decide its size. Defaults are those of UMT5-XXL."""

    vocab_size: int = 256384
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32

    @property
    def parameters(self) -> int:
        """Embedding; each layer's attention, position biases, gated feed-forward and two norms; the last norm."""
        attention = 4 * self.d_model * self.num_heads * self.d_kv
        biases = self.relative_attention_num_buckets * self.num_heads
        layer = attention + biases + 3 * self.d_model * self.d_ff + 2 * self.d_model
        return self.vocab_size * self.d_model + self.num_layers * layer + self.d_model


def part_configs(checkpoint: Checkpoint) -> tuple[VaeConfig, TextEncoderConfig]:
    """Sizes of the VAE and the text encoder, from their JSON files. Raises `RequestError`."""
    if isinstance(checkpoint, BuiltInCheckpoint):
        return checkpoint.vae, TextEncoderConfig()
    return _part(VaeConfig, checkpoint, "vae"), _part(TextEncoderConfig, checkpoint, "text_encoder")


def _part(kind: Any, checkpoint: Checkpoint, part: str) -> Any:
    path = checkpoint.folder / part / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        known = {name: values[name] for name in kind.__dataclass_fields__ if name in values}
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in known.items()})
    except (OSError, ValueError, TypeError) as error:
        raise RequestError(f"--model {checkpoint.folder}: {part}/config.json cannot be read: {error}") from None
