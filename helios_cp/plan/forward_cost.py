"""What one forward of the transformer costs one rank: products, attention, memory passes, kernels and messages.

This is integer arithmetic on the config and on the engine's own cut of the sequence; no model is built. `itemsize` is
bytes an element of the model's dtype. Tests compare it with running code: FLOPs, kernels and messages are equal, memory
passes differ by the few rows that do not grow with the tokens.
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
"""Kinds of passes over memory. "copy" stands for all that is as simple: sums, casts, joins. A GPU waits for the memory
in each kind. A CPU reads faster than it computes the other three."""

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
    """One forward on one rank. `passes`: bytes by kind. `traffic`: messages by axis of the mesh."""

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
        """The cost of so many samples at once: products, passes and messages get larger, not more."""
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


@dataclass(frozen=True)
class Blocks:
    """`times` blocks in which as many tokens of a rank take part.

    `queries` ask in self-attention, `row_queries` are those of its Ulysses group together, `text_queries` ask the text,
    and `fed` pass its feed-forward layer.
    """

    times: int
    queries: int
    row_queries: int
    text_queries: int
    fed: int


def _blocks(config: TransformerConfig, own: Share) -> tuple[Blocks, Blocks]:
    """All blocks but the last, and the last, in which history tokens are keys only."""
    asking = own.noisy if config.guidance_cross_attn else own.tokens
    return (
        Blocks(config.num_layers - 1, own.tokens, own.row_tokens, asking, own.gathered_tokens),
        Blocks(1, own.noisy, own.row_noisy, own.noisy, own.gathered_noisy),
    )


def _products(config: TransformerConfig, own: Share) -> Iterator[Product]:
    dim, patch = config.dim, math.prod(config.patch_size)
    inner, last = _blocks(config, own)
    # The timestep's embedding keeps its weights in fp32.
    yield from (Product(1, config.freq_dim, dim, in_fp32=True), Product(1, dim, dim, in_fp32=True))
    yield Product(1, dim, 6 * dim)
    yield Product(own.noisy, config.in_channels * patch, dim)
    yield Product(own.tokens, dim, 3 * dim, inner.times)
    yield Product(own.noisy, dim, dim)
    yield Product(own.tokens, dim, 2 * dim)
    for each in (inner, last):
        yield Product(each.queries, dim, dim, each.times)
        yield Product(each.text_queries, dim, dim, 2 * each.times)
        yield Product(each.fed, dim, own.hidden, each.times)
        yield Product(each.fed, own.hidden, dim, each.times)
    yield Product(own.noisy, dim, config.out_channels * patch)


def _attentions(config: TransformerConfig, own: Share, text_tokens: int) -> Iterator[AttentionCall]:
    for each in _blocks(config, own):
        for keys, steps in own.blocks:
            yield AttentionCall(each.row_queries, keys, own.heads, config.attention_head_dim, each.times * steps)
        heads = config.num_attention_heads
        yield AttentionCall(each.text_queries, text_tokens, heads, config.attention_head_dim, each.times)


def _passes(config: TransformerConfig, own: Share, degrees: Degrees, itemsize: int) -> Counter[str]:
    """Bytes read and written by all that is neither a product nor attention, in eager PyTorch, by kind of `PASSES`."""
    total: Counter[str] = Counter()
    for each in _blocks(config, own):
        for kind, moved in _block_passes(config, own, degrees, itemsize, each).items():
            total[kind] += each.times * moved
    joined = own.tokens * (2 * itemsize * config.dim + 2 * FP32 * config.attention_head_dim)  # with the rotary table
    # patches, cut, joined, put back
    ends = config.in_channels + (2 if degrees.sequence > 1 else 1) * config.out_channels
    joined += own.all_noisy * 2 * itemsize * ends * math.prod(config.patch_size)
    total["copy"] += joined + own.noisy * config.dim * (_cast(itemsize) + FP32 + itemsize)
    total["norm"] += own.noisy * _norm(config.dim)
    return total


def _block_passes(
    config: TransformerConfig, own: Share, degrees: Degrees, itemsize: int, block: Blocks
) -> dict[str, int]:
    """Of one of the blocks."""
    dim, cast = config.dim, _cast(itemsize)
    normed = own.tokens + block.queries
    norms = normed * _norm(dim)
    norms += (normed + block.text_queries) * 2 * itemsize * dim  # RMSNorms of q, k and cross-attention's q
    copies = normed * dim * (cast + FP32 + itemsize)  # cast to fp32 before LayerNorm, copied into place after
    if config.cross_attn_norm:
        norms += block.text_queries * _norm(dim)
        copies += block.text_queries * dim * 2 * cast
    rotated = normed * (dim * 2 * FP32 + FP32 * config.attention_head_dim)
    copies += normed * dim * 2 * cast
    copies += own.history * 2 * itemsize * dim if config.is_amplify_history else 0
    copies += (2 * block.queries + block.text_queries) * 3 * itemsize * dim
    width = own.heads * config.attention_head_dim
    if degrees.ulysses > 1:  # packed and put in order, on the way in and out
        copies += 2 * itemsize * dim * (2 * block.queries + 2 * own.tokens)
        copies += 2 * itemsize * width * (2 * block.row_queries + 2 * own.row_tokens)
    if degrees.ring > 1:  # keys and values stacked, partial results merged in fp32
        copies += 4 * itemsize * width * own.row_tokens
        copies += block.row_queries * width * ((degrees.ring - 1) * (cast + 3 * FP32) + 2 * cast)
        copies += block.row_queries * own.heads * (degrees.ring - 1) * LSE_BYTES
    if degrees.ffn_tp > 1:  # gathered, then summed in fp32, with a bias
        copies += block.fed * 2 * itemsize * dim
        copies += block.queries * dim * (2 * cast + (degrees.ffn_tp - 1) * (2 * FP32 + itemsize) + 2 * FP32)
    return {"copy": copies, "norm": norms, "rotation": rotated, "activation": block.fed * 2 * itemsize * own.hidden}


def _norm(dim: int) -> int:
    """Bytes a token for LayerNorm in fp32 with its mean and deviation."""
    return 2 * FP32 * dim + 2 * FP32


def _cast(itemsize: int) -> int:
    """Bytes an element for a cast to or from fp32, which there is none of in fp32."""
    return itemsize + FP32 if itemsize < FP32 else 0


def _kernels(config: TransformerConfig, own: Share, degrees: Degrees, itemsize: int) -> int:
    """Kernels of a forward in eager PyTorch, products and attention included, messages not.

    Below fp32 casts are kernels of their own. History tokens are normed, scaled and added to apart from noisy ones, but
    for most of the last block.
    """
    casts = int(itemsize < FP32)
    block, ends = 23 + 6 * casts, 26 + 4 * casts
    if own.history > 0:
        block += 6 + 2 * casts + 4 * config.is_amplify_history
        ends -= 4 + casts
    if config.cross_attn_norm:
        block += 1 + 2 * casts
    if degrees.ulysses > 1:
        uneven_heads = config.num_attention_heads % degrees.ulysses > 0
        block += 8 + 3 * uneven_heads
    if degrees.ring > 1:
        block += 1 + (7 + casts) * (degrees.ring - 1) + 2 * casts
    if degrees.ffn_tp > 1:
        block += 1 + degrees.ffn_tp + 2 * casts
    if degrees.sequence > 1:
        ends += 1
    return config.num_layers * block + ends


def forward_traffic(config: TransformerConfig, own: Share, degrees: Degrees, itemsize: int) -> dict[str, Traffic]:
    """Messages of one forward of one sample, by axis; what guidance exchanges after it is `guidance_traffic`."""
    dim, head_dim, layers = config.dim, config.attention_head_dim, config.num_layers
    width, others = own.heads * head_dim, (config.num_attention_heads - own.heads) * head_dim
    blocks = _blocks(config, own)
    queries = sum(each.times * each.queries for each in blocks)
    row_queries = sum(each.times * each.row_queries for each in blocks)
    fed = sum(each.times * each.fed for each in blocks)
    found = {}
    if degrees.ulysses > 1:
        sent = (queries + 2 * layers * own.tokens) * others + (row_queries - queries) * width
        found["ulysses"] = Traffic(2 * layers, sent * itemsize)
    if degrees.ring > 1:
        found["ring"] = Traffic(layers * (degrees.ring - 1), 2 * layers * own.passed_tokens * width * itemsize)
    if degrees.ffn_tp > 1:
        sent = queries * dim * (degrees.ffn_tp - 1) + (fed - queries) * dim
        found["ffn_tp"] = Traffic(2 * layers, sent * itemsize)
    if degrees.sequence > 1:
        velocity = guidance_traffic(config, own.noisy, itemsize)
        found["sequence"] = Traffic(1, velocity.sent_bytes * (degrees.sequence - 1))
    return found


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
