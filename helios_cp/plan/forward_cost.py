"""What one forward of the transformer asks of one rank: products, attention, memory passes, kernels and messages.

Everything is integer arithmetic on the config and on the cut of the sequence that the engine itself makes; no model is
built. `itemsize` is bytes an element of the model's dtype. The tests hold FLOPs and messages to what is counted in
running code exactly, memory passes to within the few rows that do not grow with the tokens.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from helios_cp.config.checkpoint import TransformerConfig
from helios_cp.plan.rank_shares import Share, whole
from parallel.mesh import Degrees

FP32 = 4
PASSES = ("copy", "norm", "rotation", "activation")
"""Kinds of passes over memory. Copies stand for all that is as simple: sums, casts, joins. A GPU waits for the memory
in each of them; a CPU computes the others more slowly than it reads."""

LSE_BYTES = 54  # of a query's scores in one merge: log-add, difference, exponential, mask and weight


@dataclass(frozen=True)
class Product:
    """`times` matrix products `[rows, inner] · [inner, columns]`, each with its own weights."""

    rows: int
    inner: int
    columns: int
    times: int = 1
    in_fp32: bool = False

    @property
    def flops(self) -> int:
        """A multiply-add is two."""
        return 2 * self.rows * self.inner * self.columns * self.times

    def moved_bytes(self, itemsize: int) -> int:
        """Input, weights and bias read once, output written once."""
        elements = self.rows * self.inner + (self.inner + 1) * self.columns + self.rows * self.columns
        return elements * (FP32 if self.in_fp32 else itemsize) * self.times


@dataclass(frozen=True)
class AttentionCall:
    """`times` calls of `heads` heads, `queries` × `keys` each."""

    queries: int
    keys: int
    heads: int
    head_dim: int
    times: int = 1

    @property
    def flops(self) -> int:
        return 4 * self.queries * self.keys * self.heads * self.head_dim * self.times

    def moved_bytes(self, itemsize: int) -> int:
        return 2 * (self.queries + self.keys) * self.heads * self.head_dim * itemsize * self.times


@dataclass(frozen=True)
class Traffic:
    """Collectives that a rank takes part in, and the bytes that it sends to other ranks in them."""

    calls: int = 0
    sent_bytes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.calls + other.calls, self.sent_bytes + other.sent_bytes)

    def __mul__(self, batch: int) -> Traffic:
        """The messages of one sample with those of so many in them."""
        return Traffic(self.calls, batch * self.sent_bytes)


@dataclass(frozen=True)
class ForwardCost:
    """One forward on one rank. `passes` are bytes by kind, `traffic` is by the axis of the mesh that it crosses."""

    products: tuple[Product, ...]
    attentions: tuple[AttentionCall, ...]
    passes: Mapping[str, int]
    kernels: int
    traffic: Mapping[str, Traffic]

    @property
    def elementwise_bytes(self) -> int:
        return sum(self.passes.values())

    @property
    def flops(self) -> int:
        return sum(part.flops for part in (*self.products, *self.attentions))

    def matrix_bytes(self, itemsize: int) -> int:
        """Bytes that products and attention read and write."""
        return sum(part.moved_bytes(itemsize) for part in (*self.products, *self.attentions))

    @property
    def total_traffic(self) -> Traffic:
        return sum(self.traffic.values(), Traffic())

    def of_batch(self, samples: int) -> ForwardCost:
        """That of so many samples at once: larger products, passes and messages, and no more of them."""
        if samples == 1:
            return self
        return ForwardCost(
            products=tuple(replace(each, rows=samples * each.rows) for each in self.products),
            attentions=tuple(replace(each, times=samples * each.times) for each in self.attentions),
            passes={kind: samples * moved for kind, moved in self.passes.items()},
            kernels=self.kernels,
            traffic={axis: each * samples for axis, each in self.traffic.items()},
        )


@functools.lru_cache(maxsize=4096)
def forward_cost(
    config: TransformerConfig, own: Share, degrees: Degrees, text_tokens: int, itemsize: int
) -> ForwardCost:
    """One forward of one sample, with text and history encoded before."""
    return ForwardCost(
        products=tuple(_products(config, own)),
        attentions=tuple(_attentions(config, own, text_tokens)),
        passes=_passes(config, own, degrees, itemsize),
        kernels=_kernels(config, own, degrees, itemsize),
        traffic=forward_traffic(config, own, degrees, itemsize),
    )


def _products(config: TransformerConfig, own: Share) -> Iterator[Product]:
    dim, inner, patch = config.dim, config.num_layers - 1, math.prod(config.patch_size)
    # The timestep's embedding keeps its weights in fp32.
    yield from (Product(1, config.freq_dim, dim, in_fp32=True), Product(1, dim, dim, in_fp32=True))
    yield Product(1, dim, 6 * dim)
    yield Product(own.noisy, config.in_channels * patch, dim)
    asking = own.noisy if config.guidance_cross_attn else own.tokens
    yield from (Product(own.tokens, dim, 3 * dim, inner), Product(own.tokens, dim, dim, inner))
    yield Product(asking, dim, dim, 2 * inner)
    yield from _feed_forward(own.gathered_tokens, dim, own.hidden, inner)
    # History tokens of the last block are keys only.
    yield from (Product(own.noisy, dim, dim, 4), Product(own.tokens, dim, 2 * dim))
    yield from _feed_forward(own.gathered_noisy, dim, own.hidden, 1)
    yield Product(own.noisy, dim, config.out_channels * patch)


def _feed_forward(tokens: int, dim: int, hidden: int, times: int) -> tuple[Product, Product]:
    return Product(tokens, dim, hidden, times), Product(tokens, hidden, dim, times)


def _attentions(config: TransformerConfig, own: Share, text_tokens: int) -> Iterator[AttentionCall]:
    inner, head_dim = config.num_layers - 1, config.attention_head_dim
    asking = own.noisy if config.guidance_cross_attn else own.tokens
    for block, steps in own.blocks:
        yield AttentionCall(own.row_tokens, block, own.heads, head_dim, inner * steps)
        yield AttentionCall(own.row_noisy, block, own.heads, head_dim, steps)
    for queries, times in ((asking, inner), (own.noisy, 1)):
        yield AttentionCall(queries, text_tokens, config.num_attention_heads, head_dim, times)


def _passes(config: TransformerConfig, own: Share, degrees: Degrees, itemsize: int) -> Counter[str]:
    """Bytes read and written by all that is neither a product nor attention, in eager PyTorch, by kind of `PASSES`."""
    asking = own.noisy if config.guidance_cross_attn else own.tokens
    block = functools.partial(_block_passes, config, own, degrees, itemsize)
    inner = block(own.tokens, own.row_tokens, asking, own.gathered_tokens)
    last = block(own.noisy, own.row_noisy, own.noisy, own.gathered_noisy)
    total = Counter({kind: (config.num_layers - 1) * inner[kind] + last[kind] for kind in PASSES})
    joined = own.tokens * (2 * itemsize * config.dim + 2 * FP32 * config.attention_head_dim)  # with the rotary table
    # patches, cut, joined, put back
    ends = config.in_channels + (2 if degrees.sequence > 1 else 1) * config.out_channels
    joined += own.all_noisy * 2 * itemsize * ends * math.prod(config.patch_size)
    total["copy"] += joined + own.noisy * config.dim * (_cast(itemsize) + FP32 + itemsize)
    total["norm"] += own.noisy * _norm(config.dim)
    return total


def _block_passes(
    config: TransformerConfig,
    own: Share,
    degrees: Degrees,
    itemsize: int,
    queries: int,
    row_queries: int,
    asking: int,
    fed: int,
) -> dict[str, int]:
    dim, cast = config.dim, _cast(itemsize)
    normed = own.tokens + queries
    norms = normed * _norm(dim) + (normed + asking) * 2 * itemsize * dim  # RMSNorms of q, k and cross-attention's q
    copies = normed * dim * (cast + FP32 + itemsize)  # cast to fp32 before LayerNorm, copied into place after
    if config.cross_attn_norm:
        norms += asking * _norm(dim)
        copies += asking * dim * 2 * cast
    rotated = normed * (dim * 2 * FP32 + FP32 * config.attention_head_dim)
    copies += normed * dim * 2 * cast
    copies += own.history * 2 * itemsize * dim if config.is_amplify_history else 0
    copies += (2 * queries + asking) * 3 * itemsize * dim
    width = own.heads * config.attention_head_dim
    if degrees.ulysses > 1:  # packed and put in order, on the way in and out
        copies += 2 * itemsize * dim * (2 * queries + 2 * own.tokens)
        copies += 2 * itemsize * width * (2 * row_queries + 2 * own.row_tokens)
    if degrees.ring > 1:  # keys and values stacked, partial results merged in fp32
        copies += 4 * itemsize * width * own.row_tokens
        copies += row_queries * width * ((degrees.ring - 1) * (cast + 3 * FP32) + 2 * cast)
        copies += row_queries * own.heads * (degrees.ring - 1) * LSE_BYTES
    if degrees.ffn_tp > 1:  # gathered, then summed in fp32, with a bias
        copies += fed * 2 * itemsize * dim
        copies += queries * dim * (2 * cast + (degrees.ffn_tp - 1) * (2 * FP32 + itemsize) + 2 * FP32)
    return {"copy": copies, "norm": norms, "rotation": rotated, "activation": fed * 2 * itemsize * own.hidden}


def _norm(dim: int) -> int:
    """Bytes a token for LayerNorm in fp32 with its mean and deviation."""
    return 2 * FP32 * dim + 2 * FP32


def _cast(itemsize: int) -> int:
    """Bytes an element for a cast to or from fp32, which there is none of in fp32."""
    return itemsize + FP32 if itemsize < FP32 else 0


def _kernels(config: TransformerConfig, own: Share, degrees: Degrees, itemsize: int) -> int:
    """Kernels of a forward in eager PyTorch, products and attention included, messages not.

    Casts are kernels of their own below fp32, and history tokens are normed, scaled and added to apart from noisy ones.
    """
    casts, history = itemsize < FP32, own.history > 0
    block = 23 + 6 * casts + (6 + 2 * casts) * history
    block += (1 + 2 * casts) * config.cross_attn_norm + 4 * (history and config.is_amplify_history)
    uneven_heads = config.num_attention_heads % degrees.ulysses > 0
    block += (3 * (1 + uneven_heads) + 5) * (degrees.ulysses > 1)
    block += (1 + (7 + casts) * (degrees.ring - 1) + 2 * casts) * (degrees.ring > 1)
    block += (1 + degrees.ffn_tp + 2 * casts) * (degrees.ffn_tp > 1)
    pruned = 1 - (4 + casts) * history
    return config.num_layers * block + pruned + 25 + 4 * casts + (degrees.sequence > 1)


def forward_traffic(config: TransformerConfig, own: Share, degrees: Degrees, itemsize: int) -> dict[str, Traffic]:
    """Messages of one forward of one sample, by axis; what guidance exchanges after it is `guidance_traffic`."""
    dim, layers, inner = config.dim, config.num_layers, config.num_layers - 1
    others, width = config.num_attention_heads - own.heads, own.heads * config.attention_head_dim
    asked = inner * own.tokens + own.noisy  # queries of all blocks
    row_asked = inner * own.row_tokens + own.row_noisy
    ulysses = (asked + 2 * layers * own.tokens) * others * config.attention_head_dim + (row_asked - asked) * width
    fed = inner * own.gathered_tokens + own.gathered_noisy
    feed_forward = asked * dim * (degrees.ffn_tp - 1) + (fed - asked) * dim
    velocity = own.noisy * config.out_channels * math.prod(config.patch_size)
    found = {
        "ulysses": (2 * layers, ulysses) if degrees.ulysses > 1 else None,
        "ring": (layers * (degrees.ring - 1), 2 * layers * own.passed_tokens * width) if degrees.ring > 1 else None,
        "ffn_tp": (2 * layers, feed_forward) if degrees.ffn_tp > 1 else None,
        "sequence": (1, velocity * (degrees.sequence - 1)) if degrees.sequence > 1 else None,
    }
    return {axis: Traffic(each[0], each[1] * itemsize) for axis, each in found.items() if each is not None}


def guidance_traffic(config: TransformerConfig, noisy_tokens: int, itemsize: int) -> Traffic:
    """The velocity of one sample that each branch of guidance sends to the other in a step."""
    return Traffic(1, noisy_tokens * config.out_channels * math.prod(config.patch_size) * itemsize)


def repeated_flops(config: TransformerConfig, lengths: tuple[int, ...], text_tokens: int) -> int:
    """FLOPs of diffusers' forward of one sample, which does again in each step what the engine does once.

    These are the embeddings of text, history and t = 0, cross-attention keys and values, and the last block's history.
    """
    alone = whole(config, lengths)
    dim, noisy, history = config.dim, alone.noisy, alone.history
    text = 2 * text_tokens * (config.text_dim * dim + dim * dim) + config.num_layers * 4 * text_tokens * dim * dim
    patch = config.in_channels * math.prod(config.patch_size)
    pools = (4, 2, 1)  # long, mid, short
    patches = sum(2 * dim * patch * pool**3 * count for pool, count in zip(pools, lengths[:-1], strict=True))
    zero_timestep = 2 * (config.freq_dim * dim + dim * dim + 6 * dim * dim)
    last = history * (4 * dim * dim + 4 * dim * config.ffn_dim) + 4 * history * (history + noisy) * dim
    if not config.guidance_cross_attn:
        last += history * 4 * dim * (dim + text_tokens)
    ours = forward_cost(config, alone, Degrees(), text_tokens, FP32).flops
    return ours + text + patches + last + (zero_timestep if config.zero_history_timestep else 0)
