"""The work of one chunk, whatever it runs on, from configs alone: those built in, or those of a checkpoint's parts."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from helios_cp.config.checkpoint import Checkpoint, TransformerConfig
from helios_cp.config.errors import RequestError
from helios_cp.config.layout import segment_lengths
from helios_cp.config.paths import cache_folder
from helios_cp.config.request import Request
from helios_cp.config.sampling_plan import SamplingPlan
from helios_cp.model.vae.config import VaeConfig
from helios_cp.plan import vae_cost
from helios_cp.plan.forward_cost import ForwardCost, forward_cost
from helios_cp.plan.rank_shares import Share, whole
from parallel.degrees import Degrees

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


ALONE = Degrees()


@dataclass(frozen=True)
class PyramidStage:
    """Tokens of a pyramid stage (long · mid · short · noisy), and how many forwards a branch of guidance has there."""

    lengths: tuple[int, ...]
    forwards: int

    @property
    def noisy(self) -> int:
        return self.lengths[-1]


@dataclass(frozen=True)
class Workload:
    """The work of a chunk other than the first, of `batch` videos at once."""

    config: TransformerConfig
    vae: VaeConfig
    text_encoder: TextEncoderConfig
    stages: tuple[PyramidStage, ...]
    is_guided: bool
    dtype: torch.dtype
    text_tokens: int
    latent_frames: int
    latent_size: tuple[int, int]
    frames: int
    batch: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, request: Request, dtype: torch.dtype) -> Workload:
        """Of a resolved request; steps that CFG-Zero* zeroes need no forward.

        Raises `RequestError` where the configs of the checkpoint's parts cannot be read.
        """
        plan = SamplingPlan.of(request, checkpoint)
        vae, text_encoder = part_configs(checkpoint)
        lengths = segment_lengths(request, checkpoint)
        forwards = [
            sum(not plan.is_zeroed(stage, step) for step in range(steps)) for stage, steps in enumerate(plan.steps)
        ]
        return cls(
            config=checkpoint.transformer,
            vae=vae,
            text_encoder=text_encoder,
            stages=tuple(PyramidStage(tuple(each), count) for each, count in zip(lengths, forwards, strict=True)),
            is_guided=plan.is_guided,
            dtype=dtype,
            text_tokens=request.max_sequence_length,
            latent_frames=request.num_latent_frames_per_chunk,
            latent_size=request.latent_size,
            frames=request.frames_per_chunk,
            batch=request.batch_size,
        )

    def forward_cost(self, stage: PyramidStage, own: Share | None = None, degrees: Degrees = ALONE) -> ForwardCost:
        """What one forward of one sample costs a rank with a share of the tokens, or one that is alone."""
        own = own or whole(self.config, stage.lengths)
        return forward_cost(self.config, own, degrees, self.text_tokens, self.dtype.itemsize)

    @property
    def branches(self) -> int:
        return 2 if self.is_guided else 1

    @property
    def forwards(self) -> int:
        """Of a chunk, all branches together."""
        return sum(stage.forwards for stage in self.stages) * self.branches

    @property
    def flops(self) -> int:
        """Of a chunk, on one rank."""
        forwards = sum(stage.forwards * self.forward_cost(stage).flops for stage in self.stages)
        return self.batch * (self.branches * forwards + self.decode_flops)

    @property
    def decode_flops(self) -> int:
        """Of one video."""
        return vae_cost.decode_flops(self.vae, self.latent_frames, *self.latent_size)
