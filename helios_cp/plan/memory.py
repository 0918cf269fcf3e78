"""Memory of one rank, on the card and on the host, by execution and layout.

Weights are counted, on models without memory and by the same cuts that `runtime.offload` and `weights.placement` make.
What a forward, a decoding and the encoding of text need beside them is modelled. The CUDA context is assumed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from helios_cp.config.checkpoint import TransformerConfig
from helios_cp.config.execution import Execution
from helios_cp.config.layout import PLAIN, Layout
from helios_cp.model.transformer import empty_model
from helios_cp.model.vae.autoencoder import Autoencoder
from helios_cp.model.vae.config import VaeConfig
from helios_cp.plan.rank_shares import Share, shares
from helios_cp.plan.vae_cost import FP32, decode_bytes
from helios_cp.plan.workload import TextEncoderConfig, Workload
from helios_cp.runtime.device_weights import SLOTS
from helios_cp.runtime.host_weights import Place, packed_bytes, tensors_at
from helios_cp.runtime.offload import transformer_layers
from helios_cp.weights.placement import WeightBytes, predicted_bytes
from helios_cp.weights.quantize import empty_components
from parallel.mesh import Degrees
from parallel.segments import split
from parallel.tensor import shard_sizes

ALONE = Layout()
CONTEXT = 0.5e9  # bytes of a CUDA context and its libraries
HOST_PROCESS = 4e9  # bytes of Python, torch and CUDA on the host: assumed
FITTING_SHARE = 0.95
"""Of a card's memory that is planned with: for communicators, for what the allocator cannot use, and because the model
of what a decoding needs may say 2 % too little."""

# Weights, counted


@dataclass(frozen=True)
class TransformerBytes:
    """Weights of a transformer: all of them, the largest layer that passes through each buffer of `--offload group`,
    what stays on the card then, and what each forward brings there."""

    whole: int
    slots: tuple[int, ...]
    rest: int
    streamed: int


@functools.lru_cache(maxsize=64)
def transformer_bytes(
    config: TransformerConfig, dtype: torch.dtype, quantize: str | None = None, ffn_tp: int = 1
) -> TransformerBytes:
    """On the rank that has most, where `ffn_tp` ranks split feed-forward layers. All blocks are alike: one is built."""
    model = empty_model(replace(config, num_layers=1, ffn_dim=max(shard_sizes(config.ffn_dim, ffn_tp))), dtype)
    linear = {id(module.weight) for module in model.blocks.modules() if isinstance(module, nn.Linear)}

    def size(found: Iterable[Place]) -> int:
        total = 0
        for tensor in tensors_at(found):
            parts = [tensor]
            if quantize is not None and id(tensor) in linear:
                parts = empty_components(*tensor.shape, quantize, tensor.device).values()
            total += packed_bytes(parts)
        return total

    layers, others = transformer_layers(model)
    text, keys_values, block = map(size, layers)
    sizes = [text, *[keys_values] * config.num_layers, *[block] * config.num_layers]
    slots = tuple(max(sizes[slot::SLOTS]) for slot in range(SLOTS))
    rest = size(others)
    return TransformerBytes(sum(sizes) + rest, slots, rest, config.num_layers * block)


@functools.lru_cache(maxsize=512)
def sharded_bytes(config: TransformerConfig, dtype: torch.dtype, ranks: int) -> WeightBytes:
    """As `predicted_bytes`, for any depth at the price of one block and of two: all blocks are alike."""
    one, two = (predicted_bytes(replace(config, num_layers=layers), dtype, ranks) for layers in (1, 2))

    def deeper(one: int, two: int) -> int:
        return one + (config.num_layers - 1) * (two - one)

    return WeightBytes(deeper(one.resident, two.resident), two.gathered, deeper(one.received, two.received))


def transformer_parameters(config: TransformerConfig) -> int:
    return sharded_bytes(config, torch.float32, 1).resident // FP32


@functools.lru_cache(maxsize=64)
def vae_parameters(config: VaeConfig) -> dict[str, int]:
    """Of the encoder, of the decoder, and of the layers between each of them and the latents."""
    with torch.device("meta"):
        parts = Autoencoder(config).named_children()
    return {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts}


def decoder_parameters(config: VaeConfig) -> int:
    """Of the VAE without its encoder."""
    parameters = vae_parameters(config)
    return parameters["decoder"] + parameters["post_quant_conv"]


def text_encoder_bytes(config: TextEncoderConfig, dtype: torch.dtype, offload: str) -> int:
    """Weights of the text encoder on the device. With `offload` its table of words stays on the host."""
    table = config.vocab_size * config.d_model
    layers = config.parameters - table - config.d_model
    if offload == "none":
        return config.parameters * dtype.itemsize
    if offload == "model":
        return (config.parameters - table) * dtype.itemsize
    return (min(SLOTS, config.num_layers) * layers // config.num_layers + config.d_model) * dtype.itemsize


# What is needed beside weights, modelled


def activation_bytes(config: TransformerConfig, own: Share, degrees: Degrees, dtype: torch.dtype) -> int:
    """Memory that a block holds at most for one sample: a model, not a count.

    In attention: the residual stream and its norm, q, k, v before and after their rotation, one of them in fp32 twice,
    and what is packed and received, or the ring's blocks and its results in fp32. In the feed-forward: the stream, its
    norm and what comes out, the hidden features before and after the GELU, and what is gathered and sent.
    """
    itemsize = dtype.itemsize
    exchanged = 6 * itemsize * (degrees.ulysses > 1)
    if degrees.ring > 1:
        exchanged = 4 * itemsize + 8 + 2 * itemsize * (degrees.ulysses > 1)
    exchanged = exchanged * own.heads * degrees.ulysses // config.num_attention_heads  # more where heads are uneven
    attention = own.tokens * config.dim * (8 * itemsize + 8 + exchanged)
    feed_forward = 3 * own.tokens * config.dim + 2 * own.gathered_tokens * own.hidden
    feed_forward += 3 * own.gathered_tokens * config.dim * (degrees.ffn_tp > 1)
    return max(attention, feed_forward * itemsize)


def working_bytes(workload: Workload, degrees: Degrees, vae_itemsize: int = FP32) -> dict[str, int]:
    """What each part of the model needs beside its weights, on the rank that needs most."""
    core = replace(degrees, vae=1)
    denoising = max(
        activation_bytes(workload.config, own, core, workload.dtype)
        for stage in workload.stages
        for own in dict.fromkeys(shares(workload.config, stage.lengths, core))
    )
    rows, columns = workload.latent_size
    decoding = decode_bytes(workload.vae, workload.latent_frames, max(split(rows, degrees.vae)), columns, 1)
    text = workload.text_encoder
    # A feed-forward layer's features before and after its gate; scores of attention in fp32, and normalised.
    encoding = workload.text_tokens * 3 * text.d_ff * workload.dtype.itemsize
    encoding += 3 * text.num_heads * workload.text_tokens**2 * FP32
    return {
        "text encoder": workload.batch * encoding,
        "transformer": workload.batch * denoising,
        "decoder": workload.batch * decoding * vae_itemsize // FP32,
    }


# All of it together


@dataclass(frozen=True)
class CardMemory:
    """Bytes by what they are, in each phase of making a video."""

    phases: Mapping[str, Mapping[str, float]]

    @property
    def largest(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def parts(self) -> Mapping[str, float]:
        """Of that phase."""
        return self.phases[self.largest]

    @property
    def bytes(self) -> float:
        """As the driver counts it, at most."""
        return sum(self.parts.values())


def card_memory(
    workload: Workload,
    execution: Execution = PLAIN,
    layout: Layout = ALONE,
    *,
    transformer_stays: bool = False,
    has_decoders: bool = False,
) -> CardMemory:
    """Of rank 0, which has a text encoder and a VAE beside its part of the transformer.

    Where weights are sharded, text is encoded on the CPU. With `transformer_stays` the transformer is on the card while
    a chunk is decoded too, as `--offload model` leaves it where it fits. With `has_decoders` other workers hold text
    encoder and VAE, and the decoding phase is theirs.
    """
    degrees, shard = layout.degrees, layout.shard_weights
    vae_dtype = getattr(torch, execution.vae_dtype)
    text = text_encoder_bytes(workload.text_encoder, workload.dtype, execution.offload)
    working = working_bytes(workload, degrees, vae_dtype.itemsize)
    transformer = transformer_bytes(workload.config, workload.dtype, execution.quantize, degrees.ffn_tp)
    prompts = workload.batch * (workload.branches if shard or degrees.cfg == 1 else 1)
    config = workload.config
    keys_values = prompts * 2 * config.num_layers * workload.text_tokens * config.dim * workload.dtype.itemsize
    common = {"context": CONTEXT, "text keys and values": keys_values}
    if execution.offload != "none":
        weights = transformer.whole if execution.offload == "model" else transformer.rest + sum(transformer.slots)
        decoder = decoder_parameters(workload.vae) * vae_dtype.itemsize
        decode = {**common, "VAE": decoder, "working": working["decoder"]}
        return CardMemory(
            {
                "text": {"context": CONTEXT, "text encoder": text, "working": working["text encoder"]},
                "denoise": {**common, "transformer": weights, "working": working["transformer"]},
                "decode": {**decode, "transformer": weights} if transformer_stays else decode,
            }
        )
    weights = transformer.whole
    if shard:
        sharded = sharded_bytes(workload.config, workload.dtype, degrees.world)
        weights = sharded.resident + sharded.gathered
    denoiser = {**common, "transformer": weights}
    vae = sum(vae_parameters(workload.vae).values()) * vae_dtype.itemsize
    if has_decoders:
        decode = {"context": CONTEXT, "text encoder": text, "VAE": vae, "working": working["decoder"]}
        return CardMemory({"denoise": {**denoiser, "working": working["transformer"]}, "decode": decode})
    held = {**denoiser, "text encoder": 0 if shard and degrees.world > 1 else text, "VAE": vae}
    if degrees.vae == 1:  # a chunk is decoded while the next is denoised
        beside = working["transformer"] + working["decoder"]
        return CardMemory({"denoise and decode": {**held, "working": beside}})
    phases = {"denoise": working["transformer"], "decode": working["decoder"]}
    return CardMemory({name: {**held, "working": size} for name, size in phases.items()})


def host_bytes(workload: Workload, execution: Execution = PLAIN) -> float:
    """Host memory of a process with one card, at most: what its weights take there, and the process itself. Modelled.

    With `--offload` all weights rest in pinned memory. Without, only the text encoder passes through the host as a
    whole; other weights go to the card one tensor at a time, from files that are mapped and not held.
    """
    text = workload.text_encoder.parameters * workload.dtype.itemsize
    if execution.offload == "none":
        return HOST_PROCESS + text
    transformer = transformer_bytes(workload.config, workload.dtype, execution.quantize).whole
    vae = sum(vae_parameters(workload.vae).values()) * getattr(torch, execution.vae_dtype).itemsize
    return HOST_PROCESS + text + transformer + vae
