"""Bytes of weights on a rank and of what it holds besides, for a layout; counted from configs, without a model."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from helios_cp.config.checkpoint import TransformerConfig
from helios_cp.plan.rank_shares import Share
from helios_cp.weights.sharded import WeightBytes, predicted_bytes
from parallel.mesh import Degrees
from parallel.tensor import shard_sizes


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


def parameters(config: TransformerConfig) -> int:
    """Parameters of the transformer."""
    return sharded_bytes(config, torch.float32, 1).resident // torch.float32.itemsize


@functools.lru_cache(maxsize=512)
def sharded_bytes(config: TransformerConfig, dtype: torch.dtype, ranks: int) -> WeightBytes:
    """As `predicted_bytes`, for any depth at the price of one block and of two: all blocks are alike."""
    one, two = (predicted_bytes(replace(config, num_layers=layers), dtype, ranks) for layers in (1, 2))

    def deeper(one: int, two: int) -> int:
        return one + (config.num_layers - 1) * (two - one)

    return WeightBytes(deeper(one.resident, two.resident), two.gathered, deeper(one.received, two.received))


def transformer_bytes(
    config: TransformerConfig, dtype: torch.dtype, ranks: int, ffn_tp: int, shard: bool
) -> WeightBytes:
    """Weights on the rank that has most, of `ranks` that shard them or `ffn_tp` that split feed-forward layers."""
    if shard:
        return sharded_bytes(config, dtype, ranks)
    whole = sharded_bytes(config, dtype, 1)
    missing = config.ffn_dim - max(shard_sizes(config.ffn_dim, ffn_tp))
    features = 2 * config.dim + 1  # a row of the first weight and its bias, a column of the second
    return replace(whole, resident=whole.resident - config.num_layers * missing * features * dtype.itemsize)


def text_bytes(config: TransformerConfig, dtype: torch.dtype, text_tokens: int) -> int:
    """Cross-attention keys and values of one prompt in all blocks."""
    return 2 * config.num_layers * text_tokens * config.dim * dtype.itemsize


def activation_bytes(config: TransformerConfig, own: Share, degrees: Degrees, dtype: torch.dtype) -> int:
    """Memory that a block holds at most for one sample besides the weights: a model, not a count.

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
