"""Device memory of one rank while text is encoded, a step is denoised and a chunk is decoded, by execution.

Weights are counted from configs, by the same cuts that `helios_cp.offload` makes; what a forward and a decoding need
beside them is modelled, as in `helios_cp.predict`. Memory of the CUDA context is assumed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from helios_cp import vae_cost, weight_cost
from helios_cp.config import Checkpoint, Request, TransformerConfig
from helios_cp.cost import shares
from helios_cp.device_weights import SLOTS
from helios_cp.execution import Execution
from helios_cp.host_weights import Place, packed_bytes, tensors_at
from helios_cp.offload import transformer_layers
from helios_cp.predict import Workload
from helios_cp.quantize import empty_components
from helios_cp.transformer import HeliosTransformer
from helios_cp.vae_cost import VaeConfig
from helios_cp.weight_cost import TextEncoderConfig
from parallel.mesh import Degrees
from parallel.segments import split
from parallel.tensor import shard_sizes

CONTEXT = 0.5e9  # bytes of a CUDA context and its libraries
GROUP = 128  # weights that share a scale and a zero point in int4

QUANTIZED_BITS: Mapping[str, float] = {"fp8": 8, "int8": 8, "int4": 4 + 2 * 16 / GROUP}
"""Bits of a weight of a block's linear layer. A scale for each row of thousands is left out."""


@dataclass(frozen=True)
class TransformerBytes:
    """Weights of a transformer: of all, of the largest layer that passes through each buffer, and what never passes."""

    whole: int
    slots: tuple[int, ...]
    rest: int
    streamed: int


@functools.lru_cache(maxsize=64)
def transformer_bytes(
    config: TransformerConfig, dtype: torch.dtype, quantize: str | None = None, ffn_tp: int = 1
) -> TransformerBytes:
    """Counted on a model without memory. `streamed` is what a forward brings with `--offload group`."""
    own = replace(config, ffn_dim=max(shard_sizes(config.ffn_dim, ffn_tp)))
    with torch.device("meta"):
        model = HeliosTransformer(own).cast(dtype)
    modules = [module for block in model.blocks for module in block.modules()]
    linear = {id(module.weight) for module in modules if isinstance(module, nn.Linear)}
    layers, rest, first_block = transformer_layers(model)

    def size(found: Iterable[Place]) -> int:
        total = 0
        for tensor in tensors_at(found):
            is_quantised = quantize is not None and id(tensor) in linear
            total += quantised_bytes(*tensor.shape, quantize) if is_quantised else packed_bytes([tensor])
        return total

    sizes = [size(layer) for layer in layers]
    slots = tuple(max(sizes[slot::SLOTS], default=0) for slot in range(SLOTS))
    return TransformerBytes(sum(sizes) + size(rest), slots, size(rest), sum(sizes[first_block:]))


def quantised_bytes(rows: int, columns: int, kind: str) -> int:
    """Of a weight of a block's linear layer."""
    return packed_bytes(empty_components(rows, columns, kind, torch.device("meta")).values())


def text_encoder_bytes(config: TextEncoderConfig, dtype: torch.dtype, offload: str) -> int:
    """Weights of the text encoder on the device. With `offload` its table of words stays on the host."""
    table = config.vocab_size * config.d_model
    layers = config.parameters - table - config.d_model
    if offload == "none":
        return config.parameters * dtype.itemsize
    if offload == "model":
        return (config.parameters - table) * dtype.itemsize
    return (min(SLOTS, config.num_layers) * layers // config.num_layers + config.d_model) * dtype.itemsize


def working_bytes(workload: Workload, degrees: Degrees, batch: int = 1, vae_itemsize: int = 4) -> dict[str, int]:
    """What each part of the model needs beside its weights, on the rank that needs most. Modelled."""
    core = Degrees(degrees.cfg, degrees.ring, degrees.ulysses, degrees.ffn_tp)
    denoising = max(
        weight_cost.activation_bytes(workload.config, own, core, workload.dtype)
        for stage in workload.stages
        for own in dict.fromkeys(shares(workload.config, stage.lengths, core))
    )
    rows, columns = workload.latent_size
    decoding = vae_cost.decode_bytes(workload.vae, workload.latent_frames, max(split(rows, degrees.vae)), columns)
    text = workload.text_encoder
    # A feed-forward layer's features before and after its gate; scores of attention in fp32, and normalised.
    encoding = workload.text_tokens * 3 * text.d_ff * workload.dtype.itemsize
    encoding += 3 * text.num_heads * workload.text_tokens**2 * torch.float32.itemsize
    return {
        "text encoder": batch * encoding,
        "transformer": batch * denoising,
        "encoder": batch * decoding * vae_itemsize // vae_cost.FP32,
        "decoder": batch * decoding * vae_itemsize // vae_cost.FP32,
    }


def expected_bytes(
    checkpoint: Checkpoint, request: Request, transformer: HeliosTransformer, vae: nn.Module | None, degrees: Degrees
) -> dict[str, int]:
    """As `working_bytes`, of loaded parts and a resolved request."""
    workload = Workload.of(checkpoint, request, transformer.dtype)
    itemsize = vae_cost.FP32
    if vae is not None:
        sizes = {name: getattr(vae.config, name) for name in VaeConfig.__dataclass_fields__}
        sizes = {name: tuple(size) if isinstance(size, list) else size for name, size in sizes.items()}
        workload, itemsize = replace(workload, vae=VaeConfig(**sizes)), vae.dtype.itemsize
    return working_bytes(workload, degrees, request.batch_size, itemsize)


@dataclass(frozen=True)
class CardMemory:
    """Bytes by what they are, in each phase of making a video."""

    phases: Mapping[str, Mapping[str, float]]

    @property
    def largest(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def bytes(self) -> float:
        """As the driver counts it, at most."""
        return sum(self.phases[self.largest].values())


def card_memory(
    workload: Workload, execution: Execution, degrees: Degrees | None = None, together: Iterable[str] = ()
) -> CardMemory:
    """Of rank 0, which has a text encoder and a VAE beside its part of the transformer.

    `together` are phases in which the transformer stays on the card with `--offload model`, where it fits.
    """
    degrees = degrees or Degrees()
    vae_dtype = getattr(torch, execution.vae_dtype)
    transformer = transformer_bytes(workload.config, workload.dtype, execution.quantize, degrees.ffn_tp)
    text = text_encoder_bytes(workload.text_encoder, workload.dtype, execution.offload)
    vae = vae_cost.parameters(workload.vae) * vae_dtype.itemsize
    decoder = vae_cost.decoder_parameters(workload.vae) * vae_dtype.itemsize
    prompts = workload.branches if degrees.cfg == 1 else 1
    keys_values = prompts * weight_cost.text_bytes(workload.config, workload.dtype, workload.text_tokens)
    working = working_bytes(workload, degrees, vae_itemsize=vae_dtype.itemsize)
    common = {"context": CONTEXT, "text keys and values": keys_values}
    if execution.offload == "none":
        weights = {"transformer": transformer.whole, "text encoder": text, "VAE": vae}
        beside = working["transformer"] + working["decoder"]  # a chunk is decoded while the next is denoised
        return CardMemory({"denoise and decode": {**common, **weights, "working": beside}})
    denoiser = transformer.whole if execution.offload == "model" else transformer.rest + sum(transformer.slots)
    kept = set(together) if execution.offload == "model" else set()
    phases = {
        "text": {"context": CONTEXT, "text encoder": text, "working": working["text encoder"]},
        "denoise": {**common, "transformer": denoiser, "working": working["transformer"]},
        "decode": {**common, "VAE": decoder, "working": working["decoder"]},
    }
    return CardMemory(
        {name: {**parts, **({"transformer": denoiser} if name in kept else {})} for name, parts in phases.items()}
    )
