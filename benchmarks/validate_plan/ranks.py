"""Chunks of a random model in one layout of gloo ranks, made by the engine itself and timed as a user sees them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from benchmarks.ranks.groups import pinned
from helios_cp.config.checkpoint import Checkpoint, TransformerConfig
from helios_cp.config.layout import Layout
from helios_cp.config.request import Request
from helios_cp.model.vae.config import VaeConfig
from helios_cp.pipeline.parallelize import load_parallel
from helios_cp.weights.presets import PRESETS, TEXT_ENCODER
from parallel.collectives import Group
from parallel.mesh import Mesh

TEXT_TOKENS = 64
WARM_UP = 1
"""Chunks made before those that are timed, which fill tables and caches."""


@dataclass(frozen=True)
class Model:
    """A Helios of a size of its own: `variant` is "base", "mid" or "distilled"."""

    variant: str
    transformer: TransformerConfig
    vae: VaeConfig

    def write(self, folder: Path) -> None:
        """Write it as a checkpoint of random weights, in the layout of diffusers."""
        torch.manual_seed(0)
        preset = PRESETS[f"random-{self.variant}"]
        vae = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self.vae).items()}
        pipeline = getattr(diffusers, preset.pipeline)(
            tokenizer=ByT5Tokenizer(),
            text_encoder=UMT5EncoderModel(UMT5Config(**TEXT_ENCODER)),
            vae=diffusers.AutoencoderKLWan(**vae),
            transformer=diffusers.HeliosTransformer3DModel(**asdict(self.transformer)),
            scheduler=getattr(diffusers, preset.scheduler)(**preset.scheduler_config),
            **preset.flags,
        )
        pipeline.register_to_config(random_weights=True)
        pipeline.save_pretrained(folder, safe_serialization=True)


def make_request(size: tuple[int, int], steps: tuple[int, ...], variant: str, chunks: int) -> Request:
    """A video of `size` (height, width) pixels; `steps` are those of each stage. Every chunk has as many."""
    name = "num_inference_steps" if variant == "base" else "pyramid_num_inference_steps_list"
    return Request(
        prompt=("a fox",),
        height=size[0],
        width=size[1],
        num_frames=33 * chunks,
        max_sequence_length=TEXT_TOKENS,
        is_amplify_first_chunk=False,
        **{name: steps[0] if variant == "base" else steps},
    )


@dataclass(frozen=True)
class ChunkTimes:
    """Seconds of each timed chunk on rank 0, whole and by the engine's own stages."""

    seconds: tuple[float, ...]
    stages: tuple[Mapping[str, float], ...]


def time_chunks(rank: int, folder: str, layout: Layout, request: Request, dtype: torch.dtype) -> ChunkTimes:
    """Called on every rank of the layout at once. Raises `RuntimeError` where the video is no finite number."""
    checkpoint = Checkpoint.read(Path(folder))
    mesh = Mesh.build(layout.degrees)
    pipeline = load_parallel(checkpoint, mesh, dtype=dtype, shard_weights=layout.shard_weights)
    seconds: list[float] = []
    stages: list[dict[str, float]] = []
    with pinned(rank, layout.degrees.world):
        _meet(mesh.world)
        start = time.perf_counter()
        for chunk in pipeline.stream(request):
            _meet(mesh.world)
            seconds.append(time.perf_counter() - start)
            stages.append(chunk.seconds)
            if not math.isfinite(chunk.latents.sum().item()):
                raise RuntimeError(f"chunk {chunk.index} in {layout.degrees} is not finite")
            _meet(mesh.world)
            start = time.perf_counter()
    return ChunkTimes(tuple(seconds[WARM_UP:]), tuple(stages[WARM_UP:]))


def _meet(world: Group) -> None:
    """All ranks get here before any goes on."""
    world.broadcast_object(None)


def as_json(times: ChunkTimes) -> dict[str, Any]:
    return {"seconds": times.seconds, "stages": [dict(each) for each in times.stages]}
