"""The forward of the Helios transformer for training: what `HeliosTransformer` computes, in a form with gradients.

The engine's own forward writes over its activations. This one does not, and leaves out what a short caption does not
need: all padding of the text is the zero vector, so it is one key, with the logarithm of its count added to its scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from helios_cp.model.embedders import sinusoids
from helios_cp.model.layers import MAX_HISTORY_KEY_SCALE
from helios_cp.model.rope import pad_to_multiple
from helios_cp.model.transformer import HeliosTransformer

TEXT_LENGTH = 512
LONG, MID, SHORT, CHUNK = 16, 2, 1, 9
"""Latent frames of a chunk's history and of a chunk."""
HISTORY = LONG + MID + SHORT


@dataclass(frozen=True)
class Past:
    """What a chunk continues: `history` `[B, C, 19, h, w]`, oldest first, and the `anchor` frame `[B, C, 1, h, w]`."""

    history: Tensor
    anchor: Tensor

    def to(self, device: torch.device) -> Past:
        return Past(self.history.to(device), self.anchor.to(device))


def is_matrix(name: str) -> bool:
    """Hidden matrices: the blocks' linear layers."""
    return name.startswith("blocks.") and name.endswith("weight") and "norm" not in name


def embed_text(model: HeliosTransformer, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The text's tokens with one more for all padding, `[B, L+1, D]`, and what is added to scores, `[B, 1, 1, L+1]`."""
    states = F.pad(states * mask[..., None], (0, 0, 0, 1))
    text = model.condition_embedder.text_embedder(states)
    padding = (TEXT_LENGTH - mask.sum(1, keepdim=True)).float().log()
    bias = torch.cat([torch.where(mask.bool(), 0.0, -1e4), padding], 1)
    return text, bias[:, None, None]


def velocity(
    model: HeliosTransformer, noisy: Tensor, timestep: Tensor, text: tuple[Tensor, Tensor], past: Past
) -> Tensor:
    """Velocity of `noisy` `[B, C, 9, h, w]` at times `timestep` `[B]` in 0 … 1000; `text` comes from `embed_text`."""
    states, table, history = _tokens(model, noisy, past)
    cos, sin = torch.view_as_real(table)[:, None].unbind(-1)
    temb, rows = _time(model, timestep)
    _, rows_at_zero = _time(model, torch.zeros(1, device=noisy.device))
    modulation = torch.stack([rows_at_zero.expand_as(rows), rows], 1)  # [B, 2, 6, D]: of history and of noisy tokens
    for block in model.blocks:
        states = _block(block, states, modulation, text, cos, sin, history, last=block is model.blocks[-1])
    shift, scale = (model.norm_out.scale_shift_table + temb[:, None]).chunk(2, 1)
    out = model.proj_out(_norm(states, model.norm_out.eps) * (1 + scale) + shift)
    return model._unpatchify(out.float(), model.patch_embedding.grid(noisy))


def _tokens(model: HeliosTransformer, noisy: Tensor, past: Past) -> tuple[Tensor, Tensor, int]:
    """Tokens `[B, S, D]` in the order long · mid · short · noisy, their rotary table, and how many are history."""
    long, mid, short = past.history.split([LONG, MID, SHORT], 2)
    short = torch.cat([past.anchor, short], 2)
    indices = torch.arange(1 + HISTORY + noisy.shape[2]).tolist()
    parts = (
        (model.patch_long, pad_to_multiple(long, model.patch_long.patch_size), indices[1:17], 4),
        (model.patch_mid, pad_to_multiple(mid, model.patch_mid.patch_size), indices[17:19], 2),
        (model.patch_short, short, [0, 19], 1),
        (model.patch_embedding, noisy, indices[20:], 1),
    )
    _, rows, columns = model.patch_short.grid(short)
    tokens, tables = [], []
    for embedding, latents, frames, pool in parts:
        if embedding is model.patch_embedding:
            _, rows, columns = embedding.grid(latents)
        tokens.append(embedding(embedding.patches(latents)))
        tables.append(model.rotary.table(tuple(frames), rows, columns, noisy.device, pool))
    history = sum(part.shape[1] for part in tokens[:3])
    return torch.cat(tokens, 1).float(), torch.cat(tables), history


def _time(model: HeliosTransformer, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """The embedding `[R, D]` and the modulation rows `[R, 6, D]`, in fp32: they are a few rows."""
    embedder = model.condition_embedder
    with torch.autocast(timestep.device.type, enabled=False):
        temb = embedder.time_embedder(sinusoids(timestep, embedder.freq_dim))
        return temb, embedder.time_proj(F.silu(temb)).unflatten(-1, (6, -1))


def _block(block, states, modulation, text, cos, sin, history: int, last: bool) -> Tensor:
    """One block; the last returns noisy tokens alone, because nobody reads its history."""
    length = states.shape[1]
    counts = torch.tensor([history, length - history], device=states.device)
    per_token = (block.scale_shift_table + modulation).repeat_interleave(counts, 1, output_size=length)  # [B, S, 6, D]
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = per_token.unbind(2)

    normed = _norm(states, block.eps) * (1 + scale) + shift
    update = _self_attention(block.attn1, normed, cos, sin, history, last)
    if last:
        states, gate = states[:, history:], gate[:, history:]
        ffn_shift, ffn_scale, ffn_gate = (rows[:, history:] for rows in (ffn_shift, ffn_scale, ffn_gate))
    states = states + update * gate
    kept = 0 if last else history
    noisy = states[:, kept:]
    noisy = noisy + _cross_attention(block.attn2, block.norm2(noisy), text)
    states = torch.cat([states[:, :kept], noisy], 1) if kept else noisy
    normed = _norm(states, block.eps) * (1 + ffn_scale) + ffn_shift
    return states + block.ffn(normed) * ffn_gate


def _norm(states: Tensor, eps: float) -> Tensor:
    return F.layer_norm(states, states.shape[-1:], eps=eps)


def _self_attention(attention, states: Tensor, cos: Tensor, sin: Tensor, history: int, last: bool) -> Tensor:
    query, key, value = attention.to_qkv(states).chunk(3, -1)
    query = query[:, history:] if last else query
    query, key = (
        _turned(norm(part.float()).unflatten(2, (attention.heads, -1)), cos[-part.shape[1] :], sin[-part.shape[1] :])
        for norm, part in ((attention.norm_q, query), (attention.norm_k, key))
    )
    scale = 1 + torch.sigmoid(attention.history_key_scale) * (MAX_HISTORY_KEY_SCALE - 1)
    key = torch.cat([key[:, :history] * scale[:, None], key[:, history:]], 1)
    return attention.to_out[0](_attend(query, key, value.unflatten(2, (attention.heads, -1))))


def _cross_attention(attention, states: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
    tokens, bias = text
    query = attention.norm_q(attention.to_q(states).float()).unflatten(2, (attention.heads, -1))
    key, value = attention.to_kv(tokens).chunk(2, -1)
    key = attention.norm_k(key.float()).unflatten(2, (attention.heads, -1))
    return attention.to_out[0](_attend(query, key, value.unflatten(2, (attention.heads, -1)), bias))


def _turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channel pairs of `[B, S, H, D]` turned by `[S, 1, D/2]`."""
    a, b = states.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """`[B, S, H, D]` each, to `[B, Sq, H·D]`, in the dtype of `value`."""
    query, key, value = (part.transpose(1, 2).to(value.dtype) for part in (query, key, value))
    mask = None if bias is None else bias.to(value.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
