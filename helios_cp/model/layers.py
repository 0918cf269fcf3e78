"""The layers of a Helios block, with parameters named as in diffusers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helios_cp.config.checkpoint import TransformerConfig
from helios_cp.model.fused import FusedLinear
from helios_cp.model.rope import rotate_

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(query [B, Sq, H, D], key [B, Sk, H, D], value [B, Sk, H, D]) -> [B, Sq, H, D]`, unmasked."""

MAX_HISTORY_KEY_SCALE = 10.0


@dataclass(frozen=True)
class TokenOperations:
    """The operations of a block that may look beyond the tokens or weights at hand, injected for each forward."""

    attention: Attention
    feed_forward: Callable[[FeedForward, Tensor], Tensor]


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention to keys and values that are all at hand, by PyTorch's fused kernels."""
    out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return out.transpose(1, 2)


def modulated_norm(states: Tensor, shift: Tensor, scale: Tensor, history: int, eps: float) -> Tensor:
    """LayerNorm in fp32, then · scale + shift, for two kinds of tokens.

    `states` is `[B, S, D]`, its first `history` tokens take row 0 and the others row 1 of `shift` and `scale`
    `[R, 2, D]`, where R is 1, or B if samples differ. One row a kind is enough: the affine part of a LayerNorm is the
    same computation.
    """
    if torch.compiler.is_compiling():
        normed = F.layer_norm(states.float(), states.shape[-1:], eps=eps)
        length = states.shape[1]
        return (normed * _per_token(scale, length, history) + _per_token(shift, length, history)).to(states.dtype)
    out = torch.empty_like(states)
    for samples, tokens, row, kind in _parts(shift, states.shape[1], history):
        weight, bias = scale[row, kind], shift[row, kind]
        out[samples, tokens] = F.layer_norm(states[samples, tokens].float(), weight.shape, weight, bias, eps)
    return out


def gated_add_(states: Tensor, update: Tensor, gate: Tensor, history: int) -> Tensor:
    """`states + update · gate`, written over `states` unless it is compiled; arguments as in `modulated_norm`.

    The fp32 gate promotes the computation to fp32, so that it is rounded once, to the dtype of `states`.
    """
    if torch.compiler.is_compiling():
        return (states + update * _per_token(gate, states.shape[1], history)).to(states.dtype)
    for samples, tokens, row, kind in _parts(gate, states.shape[1], history):
        states[samples, tokens].addcmul_(update[samples, tokens], gate[row, kind])
    return states


def add_to_last_(states: Tensor, update: Tensor) -> Tensor:
    """Add `update` `[B, N, D]` to the last N tokens of `states` `[B, S, D]`, in place unless it is compiled."""
    before = states.shape[1] - update.shape[1]
    if torch.compiler.is_compiling():
        return states + F.pad(update, (0, 0, before, 0))
    states[:, before:].add_(update)
    return states


def _per_token(rows: Tensor, length: int, history: int) -> Tensor:
    """Rows `[R, 2, D]` as a selection `[R, length, D]` that a compiler computes where it is read, and never stores."""
    if not 0 < history < length:
        return rows[:, :1] if history else rows[:, 1:]
    is_history = torch.arange(length, device=rows.device).unsqueeze(-1) < history
    return torch.where(is_history, rows[:, :1], rows[:, 1:])


def _parts(rows: Tensor, length: int, history: int) -> list[tuple[slice, slice, int, int]]:
    samples = [slice(None)] if rows.shape[0] == 1 else [slice(b, b + 1) for b in range(rows.shape[0])]
    kinds = [(slice(0, history), 0), (slice(history, length), 1)]
    return [
        (sample, tokens, row, kind)
        for row, sample in enumerate(samples)
        for tokens, kind in kinds
        if tokens.start < tokens.stop
    ]


class SelfAttention(nn.Module):
    """Attention among all tokens, history keys amplified if the checkpoint says so."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim, heads = config.dim, config.num_attention_heads
        self.heads = heads
        self.to_qkv = FusedLinear(dim, dim, ("to_q", "to_k", "to_v"))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q = nn.RMSNorm(dim, config.eps)
        self.norm_k = nn.RMSNorm(dim, config.eps)
        self.history_key_scale = None
        if config.is_amplify_history:
            self.history_key_scale = nn.Parameter(torch.ones(heads if config.history_scale_mode == "per_head" else 1))
        self.register_load_state_dict_pre_hook(FusedLinear.gather_parts)

    def forward(
        self, states: Tensor, rotary: Tensor, history: int, attention: Attention, *, prune_history: bool = False
    ) -> Tensor:
        """`[B, S, dim]` to the same, or to the tokens after the first `history` if `prune_history`.

        `rotary` is the table `[S, D/2, 2]` of cos and sin. History tokens still serve as keys when they are pruned.
        """
        if prune_history:
            query = self.to_qkv.project(states[:, history:], 0, 1)
            key, value = self.to_qkv.project(states, 1, 3).chunk(2, dim=-1)
        else:
            query, key, value = self.to_qkv(states).chunk(3, dim=-1)
        query = self.norm_q(query).unflatten(2, (self.heads, -1))
        key = self.norm_k(key).unflatten(2, (self.heads, -1))
        value = value.unflatten(2, (self.heads, -1))
        query = rotate_(query, rotary[-query.shape[1] :])
        key = rotate_(key, rotary)
        if self.history_key_scale is not None and history:
            scale = 1 + torch.sigmoid(self.history_key_scale) * (MAX_HISTORY_KEY_SCALE - 1)
            key = scale_first_(key, scale, history)
        return self.to_out[0](attention(query, key, value).flatten(2))


def scale_first_(key: Tensor, scale: Tensor, history: int) -> Tensor:
    """Multiply the first `history` tokens of `key` `[B, S, H, D]` by a fp32 factor a head, in place unless compiled."""
    if torch.compiler.is_compiling():
        is_history = torch.arange(key.shape[1], device=key.device).view(-1, 1, 1) < history
        return (key * torch.where(is_history, scale.unsqueeze(-1), 1.0)).to(key.dtype)
    key[:, :history].mul_(scale.unsqueeze(-1))
    return key


class CrossAttention(nn.Module):
    """Attention to the text, whose keys and values are computed once per prompt."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.num_attention_heads
        self.to_q = nn.Linear(dim, dim)
        self.to_kv = FusedLinear(dim, dim, ("to_k", "to_v"))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q = nn.RMSNorm(dim, config.eps)
        self.norm_k = nn.RMSNorm(dim, config.eps)
        self.register_load_state_dict_pre_hook(FusedLinear.gather_parts)

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, L, H, D]` of the embedded text `[B, L, dim]`."""
        key, value = self.to_kv(text).chunk(2, dim=-1)
        key = self.norm_k(key).unflatten(2, (self.heads, -1))
        return key, value.unflatten(2, (self.heads, -1)).contiguous()

    def forward(self, states: Tensor, keys_values: tuple[Tensor, Tensor]) -> Tensor:
        """`[B, S, dim]` to the same."""
        query = self.norm_q(self.to_q(states)).unflatten(2, (self.heads, -1))
        return self.to_out[0](attend(query, *keys_values).flatten(2))


class FeedForward(nn.Module):
    """Linear, GELU (tanh form), linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        first = nn.Module()
        first.proj = nn.Linear(dim, hidden)
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(hidden, dim)])

    def forward(self, states: Tensor) -> Tensor:
        return self.net[2](gelu_tanh(self.net[0].proj(states)))


def gelu_tanh(states: Tensor) -> Tensor:
    return F.gelu(states, approximate="tanh")


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward, each on a modulated or plain norm of the residual stream."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.eps = config.eps
        self.guidance_cross_attn = config.guidance_cross_attn
        self.attn1 = SelfAttention(config)
        self.attn2 = CrossAttention(config)
        self.norm2 = nn.LayerNorm(dim, config.eps) if config.cross_attn_norm else None
        self.ffn = FeedForward(dim, config.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        states: Tensor,
        modulation: Tensor,
        keys_values: tuple[Tensor, Tensor],
        rotary: Tensor,
        history: int,
        operations: TokenOperations,
        *,
        prune_history: bool = False,
    ) -> Tensor:
        """The residual stream `states` `[B, S, dim]` after this block, in place of the one before it.

        It is changed in place, unless the block is compiled; use what is returned.

        `modulation` `[R, 2, 6, dim]` in fp32 holds the rows of history and noisy tokens. With `prune_history` only the
        tokens after the first `history` are updated and returned: the last block's history rows are never read.
        """
        rows = self.scale_shift_table + modulation
        rows[:, :, 1::3].add_(1)  # the two scales are stored as what they add to 1
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = rows.unbind(2)

        normed = modulated_norm(states, shift, scale, history, self.eps)
        update = self.attn1(normed, rotary, history, operations.attention, prune_history=prune_history)
        if prune_history:
            states, history = states[:, history:], 0
        states = gated_add_(states, update, gate, history)

        queries = states[:, history:] if self.guidance_cross_attn else states
        normed = queries if self.norm2 is None else self.norm2(queries.float()).to(queries.dtype)
        states = add_to_last_(states, self.attn2(normed, keys_values))

        normed = modulated_norm(states, ffn_shift, ffn_scale, history, self.eps)
        return gated_add_(states, operations.feed_forward(self.ffn, normed), ffn_gate, history)
