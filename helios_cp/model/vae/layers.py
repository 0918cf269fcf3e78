"""The layers of the VAE, with parameters named and shaped as in diffusers. Videos are `[B, T, H, W, C]`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helios_cp.model.vae.kernels import convolve, rms_norm
from helios_cp.model.vae.sweep import PAST, Sweep


class Norm(nn.Module):
    """The scale γ of an RMSNorm over the channels, in a shape with `dims` dims of size 1 behind them."""

    def __init__(self, channels: int, dims: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * dims))

    @property
    def weight(self) -> Tensor:
        return self.gamma.flatten()

    def forward(self, states: Tensor) -> Tensor:
        return rms_norm(states, self.weight)


class CausalConvolution(nn.Conv3d):
    """A 3 × 3 × 3 convolution of which a frame sees itself and the two before it, zeros before the first.

    Its input lies in a buffer with room in front for past frames, and above and below for rows of other ranks. `norm`,
    with a SiLU, writes straight into it, so nothing is padded or joined by a copy.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3)

    def forward(self, states: Tensor, sweep: Sweep, norm: Norm | None = None) -> Tensor:
        return self.convolve(*self.prepare(states, sweep, norm), sweep)

    def prepare(self, states: Tensor, sweep: Sweep, norm: Norm | None) -> tuple[Tensor, int]:
        """The buffer, and how many frames of it are past. After it `states` are needed no more."""
        batch, frames, height, width, channels = states.shape
        past, border = sweep.past(self, frames), sweep.border
        buffer = states.new_empty(batch, past + frames, height + 2 * border, width, channels)
        if past:
            sweep.fill(self, buffer[:, :past])
        own = buffer[:, past:]
        room = own[:, :, border : border + height]
        if norm is None:
            room.copy_(states)
        else:
            sweep.norm_silu(states, norm.weight, room)
        sweep.rows.fetch(own, border, border)
        sweep.keep(self, buffer)
        return buffer, past

    def convolve(self, buffer: Tensor, past: int, sweep: Sweep, onto: Tensor | None = None) -> Tensor:
        """The result of what is in the buffer, added to `onto` where there is that."""
        weight = self.weight[:, :, PAST - past :]  # the rest would see zeros alone, before the video
        return convolve(buffer, weight, self.bias, (0, 1 - sweep.border, 1), onto=onto)


class PointConvolution(nn.Conv3d):
    """A convolution of 1 × 1 × 1."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 1)

    def forward(self, states: Tensor) -> Tensor:
        return convolve(states, self.weight, self.bias)


class ResidualBlock(nn.Module):
    """Two convolutions, each of SiLU(RMSNorm(·)), added to what came in, which is overwritten where it can be.

    With `edge` the result has one more row and column, for the downsampling that follows. The column is zeros; the row
    is not filled.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = Norm(inputs)
        self.conv1 = CausalConvolution(inputs, outputs)
        self.norm2 = Norm(outputs)
        self.conv2 = CausalConvolution(outputs, outputs)
        self.conv_shortcut = PointConvolution(inputs, outputs) if inputs != outputs else None

    def forward(self, states: Tensor, sweep: Sweep, edge: bool = False) -> Tensor:
        buffer, past = self.conv2.prepare(self.conv1(states, sweep, self.norm1), sweep, self.norm2)
        shortcut = states if self.conv_shortcut is None else self.conv_shortcut(states)
        if not edge:
            return self.conv2.convolve(buffer, past, sweep, onto=shortcut)
        inner = self.conv2.convolve(buffer, past, sweep)
        del buffer
        out, room = with_edge(shortcut)
        torch.add(inner, shortcut, out=room)
        return out


def with_edge(states: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for the like of `states` with a further row and a column of zeros, and the part of it without them."""
    batch, frames, height, width, channels = states.shape
    out = states.new_empty(batch, frames, height + 1, width + 1, channels)
    out[:, :, :, width:] = 0
    return out, out[:, :, :height, :width]


class Attention(nn.Module):
    """Attention of one head among the pixels of each frame, added to what came in."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels, dims=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, states: Tensor, sweep: Sweep) -> Tensor:
        batch, frames, height, width, channels = states.shape
        own = self.norm(states)
        if sweep.rows.is_whole:
            query, key, value = self._project(own, 0, 3).chunk(3, dim=-1)
        else:  # the input travels, as keys and values would be twice as much
            query = self._project(own, 0, 1)
            key, value = self._project(sweep.rows.gather(own), 1, 3).chunk(2, dim=-1)
        out = F.scaled_dot_product_attention(query, key, value)  # [B·T, 1, H·W, C]
        out = out.view(batch * frames, height, width, channels)
        return convolve(out, self.proj.weight, self.proj.bias, onto=states.flatten(0, 1)).view(states.shape)

    def _project(self, states: Tensor, first: int, last: int) -> Tensor:
        """Queries, keys and values from the `first` to before the `last` of the three, `[B·T, 1, H·W, ...]`."""
        channels = states.shape[-1]
        own = slice(first * channels, last * channels)
        found = convolve(states.flatten(0, 1), self.to_qkv.weight[own], self.to_qkv.bias[own])
        return found.flatten(1, 2).unsqueeze(1)


class MiddleBlock(nn.Module):
    """What encoder and decoder do at the resolution of the latents."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels) for _ in range(2)])
        self.attentions = nn.ModuleList([Attention(channels)])

    def forward(self, states: Tensor, sweep: Sweep) -> Tensor:
        states = self.resnets[0](states, sweep)
        states = self.attentions[0](states, sweep)
        return self.resnets[1](states, sweep)
