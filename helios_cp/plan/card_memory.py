"""Device memory of one rank while text is encoded, a step is denoised and a chunk is decoded, by execution.

Weights are counted from configs, by the same cuts that `runtime.offload` and `weights.sharded` make; what a
forward and a decoding need beside them is modelled. Memory of the CUDA context is assumed. The planner and the table of
cards both rest on it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from helios_cp.config.checkpoint import TransformerConfig
from helios_cp.config.execution import Execution
from helios_cp.config.layout import PLAIN
from helios_cp.model.transformer import empty_model
from helios_cp.plan import vae_cost, weight_cost
from helios_cp.plan.rank_shares import shares
from helios_cp.plan.weight_cost import TextEncoderConfig
from helios_cp.plan.workload import Workload
from helios_cp.runtime.device_weights import SLOTS
from helios_cp.runtime.host_weights import Place, packed_bytes, tensors_at
from helios_cp.runtime.offload import transformer_layers
from helios_cp.weights.quantize import empty_components
from parallel.mesh import Degrees
from parallel.segments import split
from parallel.tensor import shard_sizes

ALONE = Degrees()
CONTEXT = 0.5e9  # bytes of a CUDA context and its libraries
HOST_PROCESS = 4e9  # bytes of Python, torch and CUDA on the host: assumed
FITTING_SHARE = 0.95
"""Of a card's memory that is planned with: for communicators, for what the allocator cannot use, and because the model
of what a decoding needs may say 2 % too little."""


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
    model = empty_model(own, dtype)
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


def working_bytes(workload: Workload, degrees: Degrees, vae_itemsize: int = 4) -> dict[str, int]:
    """What each part of the model needs beside its weights, on the rank that needs most. Modelled."""
    batch = workload.batch
    core = Degrees(degrees.cfg, degrees.ring, degrees.ulysses, degrees.ffn_tp)
    denoising = max(
        weight_cost.activation_bytes(workload.config, own, core, workload.dtype)
        for stage in workload.stages
        for own in dict.fromkeys(shares(workload.config, stage.lengths, core))
    )
    rows, columns = workload.latent_size
    decoding = vae_cost.decode_bytes(workload.vae, workload.latent_frames, max(split(rows, degrees.vae)), columns, 1)
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
    workload: Workload,
    execution: Execution = PLAIN,
    degrees: Degrees = ALONE,
    together: Iterable[str] = (),
    *,
    shard: bool = False,
    has_decoders: bool = False,
) -> CardMemory:
    """Of rank 0, which has a text encoder and a VAE beside its part of the transformer.

    With `shard`, weights are spread over the ranks and text is encoded on the CPU. With `has_decoders` other workers
    hold text encoder and VAE, and the decoding phase is theirs. `together` are phases in which the transformer stays on
    the card with `--offload model`, where it fits.
    """
    vae_dtype = getattr(torch, execution.vae_dtype)
    text = text_encoder_bytes(workload.text_encoder, workload.dtype, execution.offload)
    vae = vae_cost.parameters(workload.vae) * vae_dtype.itemsize
    decoder = vae_cost.decoder_parameters(workload.vae) * vae_dtype.itemsize
    prompts = workload.batch * (workload.branches if shard or degrees.cfg == 1 else 1)
    keys_values = prompts * weight_cost.text_bytes(workload.config, workload.dtype, workload.text_tokens)
    working = working_bytes(workload, degrees, vae_itemsize=vae_dtype.itemsize)
    common = {"context": CONTEXT, "text keys and values": keys_values}
    if execution.offload == "none":
        denoiser = {**common, "transformer": _resident(workload, execution, degrees, shard)}
        coders = {"text encoder": 0 if shard and degrees.world > 1 else text, "VAE": vae}
        if has_decoders:
            decode = {"context": CONTEXT, **coders, "text encoder": text, "working": working["decoder"]}
            return CardMemory({"denoise": {**denoiser, "working": working["transformer"]}, "decode": decode})
        if degrees.vae == 1:  # a chunk is decoded while the next is denoised
            beside = working["transformer"] + working["decoder"]
            return CardMemory({"denoise and decode": {**denoiser, **coders, "working": beside}})
        parts = {"denoise": working["transformer"], "decode": working["decoder"]}
        return CardMemory({name: {**denoiser, **coders, "working": size} for name, size in parts.items()})
    transformer = transformer_bytes(workload.config, workload.dtype, execution.quantize, degrees.ffn_tp)
    weights = transformer.whole if execution.offload == "model" else transformer.rest + sum(transformer.slots)
    kept = set(together) if execution.offload == "model" else set()
    phases = {
        "text": {"context": CONTEXT, "text encoder": text, "working": working["text encoder"]},
        "denoise": {**common, "transformer": weights, "working": working["transformer"]},
        "decode": {**common, "VAE": decoder, "working": working["decoder"]},
    }
    return CardMemory(
        {name: {**parts, **({"transformer": weights} if name in kept else {})} for name, parts in phases.items()}
    )


def host_bytes(workload: Workload, execution: Execution = PLAIN) -> float:
    """Host memory of a process with one card, at most: what its weights take there, and the process itself. Modelled.

    With `--offload` all weights rest in pinned memory. Without, only the text encoder passes through the host as a
    whole; other weights go to the card one tensor at a time, from files that are mapped and not held.
    """
    text = workload.text_encoder.parameters * workload.dtype.itemsize
    if execution.offload == "none":
        return HOST_PROCESS + text
    transformer = transformer_bytes(workload.config, workload.dtype, execution.quantize).whole
    vae = vae_cost.parameters(workload.vae) * getattr(torch, execution.vae_dtype).itemsize
    return HOST_PROCESS + text + transformer + vae


def _resident(workload: Workload, execution: Execution, degrees: Degrees, shard: bool) -> int:
    """Weights of the transformer that stay on the card, and those gathered for a block."""
    if execution.quantize is not None:
        return transformer_bytes(workload.config, workload.dtype, execution.quantize, degrees.ffn_tp).whole
    found = weight_cost.transformer_bytes(workload.config, workload.dtype, degrees.world, degrees.ffn_tp, shard)
    return found.resident + found.gathered
