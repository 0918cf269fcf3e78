"""Latents, timestep and text into the width of the model, with parameters named as in diffusers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helios_cp.config.checkpoint import TransformerConfig
from helios_cp.model.layers import gelu_tanh


class PatchEmbedding(nn.Module):
    """Linear embedding of non-overlapping patches; weights in the shape of the equal strided Conv3d."""

    def __init__(self, in_channels: int, dim: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.weight = nn.Parameter(torch.empty(dim, in_channels, *patch_size))
        self.bias = nn.Parameter(torch.empty(dim))
        bound = 1 / math.sqrt(in_channels * math.prod(patch_size))
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def grid(self, latents: Tensor) -> tuple[int, int, int]:
        """Tokens along frame, row and column of `[B, C, T, h, w]`; what a patch does not fill is left out."""
        time, rows, columns = (s // p for s, p in zip(latents.shape[-3:], self.patch_size, strict=True))
        return time, rows, columns

    def patches(self, latents: Tensor) -> Tensor:
        """`[B, C, T, h, w]` to `[B, S, C·p]`, each row in the order of the weight's axes."""
        (time, rows, columns), (pt, ph, pw) = self.grid(latents), self.patch_size
        latents = latents[:, :, : time * pt, : rows * ph, : columns * pw]
        blocks = latents.unflatten(4, (columns, pw)).unflatten(3, (rows, ph)).unflatten(2, (time, pt))
        return blocks.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)

    def forward(self, patches: Tensor) -> Tensor:
        """`[B, S, C·p]` to `[B, S, D]`."""
        return F.linear(patches, self.weight.flatten(1), self.bias)


class ConditionEmbedder(nn.Module):
    """Embeds the timestep into modulation rows, and the text into the width of the model."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.freq_dim = config.freq_dim
        self.time_embedder = TwoLinears(config.freq_dim, config.dim, F.silu)
        self.time_proj = nn.Linear(config.dim, 6 * config.dim)
        self.text_embedder = TwoLinears(config.text_dim, config.dim, gelu_tanh)

    def forward(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """`[R]` to the embedding `[R, dim]` and the six modulation rows `[R, 6, dim]`, both in model dtype.

        The embedding is rounded to model dtype before the projection, as the checkpoints were trained.
        """
        frequencies = sinusoids(timestep, self.freq_dim).to(self.time_embedder.linear_1.weight.dtype)
        temb = self.time_embedder(frequencies).to(self.time_proj.weight.dtype)
        return temb, self.time_proj(F.silu(temb)).unflatten(-1, (6, -1))


class TwoLinears(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, in_features: int, dim: int, activation) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_features, dim)
        self.linear_2 = nn.Linear(dim, dim)
        self.activation = activation

    def forward(self, states: Tensor) -> Tensor:
        return self.linear_2(self.activation(self.linear_1(states)))


def sinusoids(timestep: Tensor, dim: int) -> Tensor:
    """cos, then sin, of t · 10000^(−2j / dim): `[R, dim]` in fp32 (arXiv:1706.03762, section 3.5)."""
    half = dim // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angles = timestep[:, None].float() * exponent.exp()
    return torch.cat([angles.cos(), angles.sin()], -1)
