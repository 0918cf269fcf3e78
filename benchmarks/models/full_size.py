"""Helios of any size from its configs alone: random weights, made on the device, and diffusers' pipeline over the same.

How long a forward takes does not depend on the weights, so that the real figures can be had without a download. Weights
are random and never zero, as a card computes zeros faster. There is no text encoder: prompts are random embeddings.

All pipelines over one model share the memory of the transformer's weights, diffusers' among them, so that 14B in
bfloat16 takes 28.6 GB however many are compared. What quantises or compiles one of them leaves the others alone. Each
has a VAE of its own, of the same weights.
"""

from __future__ import annotations

import contextlib
import copy
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import torch
from diffusers import HeliosTransformer3DModel
from torch import Tensor, nn

from benchmarks.models.peer_vae import peer_vae
from helios_cp.config.checkpoint import Checkpoint, TransformerConfig
from helios_cp.config.errors import RequestError
from helios_cp.config.execution import Execution
from helios_cp.config.request import Request
from helios_cp.config.sampling_plan import SamplingPlan
from helios_cp.model.transformer import HeliosTransformer, empty_model
from helios_cp.model.vae.autoencoder import Autoencoder
from helios_cp.model.vae.config import VaeConfig
from helios_cp.pipeline.parallelize import ParallelPipeline, load_parallel
from helios_cp.pipeline.start import Inputs
from helios_cp.plan.workload import BuiltInCheckpoint
from helios_cp.weights import presets
from helios_cp.weights.loader import Loader
from helios_cp.weights.placement import Placement
from helios_cp.weights.quantize import assemble, is_block_linear, is_quantised, quantise
from parallel.mesh import Mesh

SUFFIXES = {"distilled": "", "mid": "-mid", "base": "-base"}


@dataclass(frozen=True)
class Size:
    """The configs that decide how large a model is, and the video (height, width in pixels) and text that suit it."""

    transformer: TransformerConfig
    vae: VaeConfig
    video: tuple[int, int]
    text_tokens: int


_SMALL_VAE = VaeConfig(base_dim=8, dim_mult=(1, 1, 1, 1), num_res_blocks=0)
SIZES: Mapping[str, Size] = {
    "14b": Size(TransformerConfig(), VaeConfig(), (384, 640), 512),
    # For two cores, where convolutions of few channels are slow: decoding takes as long as denoising at [1, 1, 1].
    "small": Size(
        TransformerConfig(
            num_attention_heads=8,
            attention_head_dim=64,
            rope_dim=(24, 20, 20),
            ffn_dim=1408,
            text_dim=416,
            num_layers=12,
        ),
        _SMALL_VAE,
        (128, 128),
        56,
    ),
    "tiny": Size(TransformerConfig.from_dict(presets.TRANSFORMER), _SMALL_VAE, (64, 64), 8),
}
NAMES = {f"{size}{suffix}": (size, variant) for size in SIZES for variant, suffix in SUFFIXES.items()}


def named_checkpoint(name: str) -> BuiltInCheckpoint:
    """One of `NAMES`, as a checkpoint without a folder. Raises `RequestError`."""
    if name not in NAMES:
        raise RequestError(f"--random-weights {name}: allowed are {', '.join(NAMES)}")
    size, variant = NAMES[name]
    transformer, vae = SIZES[size].transformer, SIZES[size].vae
    return BuiltInCheckpoint(Path(name), variant, variant == "mid", transformer, random_weights=True, vae=vae)


def size_of(checkpoint: BuiltInCheckpoint) -> Size:
    return SIZES[NAMES[checkpoint.folder.name][0]]


def build_random(
    checkpoint: BuiltInCheckpoint,
    mesh: Mesh,
    *,
    dtype: torch.dtype,
    device: torch.device,
    like: HeliosTransformer | None = None,
    execution: Execution | None = None,
    **options: Any,
) -> ParallelPipeline:
    """`load_parallel` of a checkpoint without a folder: the same pipeline over the same ranks, of random weights.

    With `like` the transformer's weights lie in the memory of that one's. `options` are further ones of
    `load_parallel`. Ranks that hold the same parameter hold the same values.
    """
    parts = RandomParts(device, like)
    return load_parallel(checkpoint, mesh, dtype=dtype, device=device, execution=execution, parts=parts, **options)


@dataclass(frozen=True)
class RandomParts(Loader):
    """Random weights, drawn on `device`. With `like` the transformer's weights lie in the memory of that one's."""

    device: torch.device
    like: HeliosTransformer | None = None

    def transformer(
        self,
        checkpoint: BuiltInCheckpoint,
        dtype: torch.dtype,
        device: torch.device,
        execution: Execution,
        placement: Placement,
    ) -> tuple[HeliosTransformer, None]:
        if execution.lora:
            raise RequestError(f"--lora {execution.lora[0].path}: these weights came from no checkpoint")
        if self.like is not None:
            model = twin(self.like)
        else:
            home = torch.device(execution.home(device))
            model = random_transformer(checkpoint.transformer, dtype, home, device, placement)
        if execution.quantize is not None:
            quantize_blocks(model, execution.quantize)
        return model, None

    def text_encoder(self, *_: object) -> tuple[None, None]:
        return None, None

    def vae(self, checkpoint: BuiltInCheckpoint, home: torch.device) -> Autoencoder:
        return random_vae(checkpoint.vae, home, self.device)

    def scheduler(self, checkpoint: BuiltInCheckpoint):
        return random_scheduler(checkpoint.variant)


def random_transformer(
    config: TransformerConfig,
    dtype: torch.dtype,
    home: torch.device,
    device: torch.device,
    placement: Placement = Placement(),
) -> HeliosTransformer:
    """Weights lie on `home`, and are drawn on `device`. The rest is as for `weights.transformer.load_adaptable`."""
    model = empty_model(config, dtype)
    placement.shrink(model, home)
    model.to_empty(device=home)
    fill({to.name: to.memory for to in placement.destinations(model, {})}, device)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def quantize_blocks(transformer: nn.Module, kind: str) -> None:
    """Quantise the blocks of a loaded model in place; layers that are quantised already stay as they are."""
    for path, module in transformer.named_modules():
        if is_block_linear(path, module) and not is_quantised(module.weight):
            weight = assemble(quantise(module.weight, kind), kind, module.weight.dtype)
            module.weight = nn.Parameter(weight, requires_grad=False)


def random_vae(config: VaeConfig, home: str | torch.device, device: torch.device) -> Autoencoder:
    """In fp32."""
    with torch.device("meta"):
        vae = Autoencoder(config)
    vae.to_empty(device=home)
    fill(vae.state_dict(), device)
    vae.fold()
    return vae.eval().requires_grad_(False)


def random_scheduler(variant: str):
    """The scheduler of a variant; a scheduler has no weights."""
    preset = presets.PRESETS[f"random-{variant}"]
    return getattr(diffusers, preset.scheduler)(**preset.scheduler_config)


@torch.no_grad()
def fill(tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Draw parameters on `device` and put them where they lie: activations stay near unit variance, none is neutral.

    Each parameter has a seed of its own, its name, so that its values do not depend on what else a rank holds.
    """
    for name, tensor in tensors.items():
        kind = name.rpartition(".")[2]
        # In place, so that 14B in bfloat16 takes no byte more than that; elsewhere for weights that rest on the host.
        drawn = tensor if tensor.device.type == device.type else torch.empty_like(tensor, device=device)
        drawn.normal_(generator=torch.Generator(drawn.device).manual_seed(zlib.crc32(name.encode())))
        if kind == "weight" and tensor.ndim > 1:
            drawn.mul_(presets.GAINS.get(name, 1.0) / math.sqrt(tensor[0].numel()))
        elif kind in ("bias", "scale_shift_table"):
            drawn.mul_(0.1 if kind == "bias" else 0.3)
        elif kind != "history_key_scale":  # scales of norms
            drawn.mul_(0.1).add_(1)
        if drawn is not tensor:
            tensor.copy_(drawn)


def twin(model: HeliosTransformer) -> HeliosTransformer:
    """Another model over the same memory of weights. Exchanging a parameter of one leaves the other as it is."""
    with torch.device("meta"):
        other = HeliosTransformer(model.config)
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        setattr(other.get_submodule(module), kind, nn.Parameter(parameter.detach(), requires_grad=False))
    return other.eval()


def random_inputs(checkpoint: Checkpoint, request: Request, dtype: torch.dtype) -> Inputs:
    """Embeddings of a prompt, and of a negative one where there is guidance; the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, request.max_sequence_length, checkpoint.transformer.text_dim)
    prompt, negative = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    is_guided = SamplingPlan.of(request, checkpoint).is_guided
    return Inputs(prompt_embeds=prompt, negative_prompt_embeds=negative if is_guided else None)


def build_peer(pipeline: ParallelPipeline) -> diffusers.DiffusionPipeline:
    """diffusers' own pipeline over the weights of an untouched one of ours on one rank; it has no text encoder."""
    checkpoint, ours = pipeline.checkpoint, pipeline.transformer
    with accelerate.init_empty_weights():  # which leaves buffers alone: a state dict has none
        transformer = HeliosTransformer3DModel(**asdict(checkpoint.transformer))
    transformer.load_state_dict(ours.state_dict(), assign=True)
    parts: dict[str, Any] = {
        "tokenizer": None,
        "text_encoder": None,
        "vae": peer_vae(pipeline.codec.vae),
        "scheduler": copy.deepcopy(pipeline.scheduler),
        "transformer": transformer.to(ours.device).eval().requires_grad_(False),
    }
    kind = diffusers.HeliosPipeline
    if checkpoint.is_pyramid:
        kind = diffusers.HeliosPyramidPipeline
        parts |= {"is_cfg_zero_star": checkpoint.is_cfg_zero_star, "is_distilled": checkpoint.is_distilled}
    with _quiet():
        peer = kind(**parts)
    peer.set_progress_bar_config(disable=True)
    return peer


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """diffusers says that it has no text encoder."""
    verbosity = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers.logging.set_verbosity(verbosity)
