"""The layers of the VAE, with parameters named and shaped as in diffusers. Videos are `[B, T, H, W, C]`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helios_cp.model.vae.kernels import Sum, convolve, convolve_onto, rms_norm
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

    def forward(self, states: Sum, sweep: Sweep, norm: Norm | None = None, keep: bool = False) -> Sum:
        return convolve(*self.prepare(states, sweep, norm, keep))

    def prepare(
        self, states: Sum, sweep: Sweep, norm: Norm | None, keep: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, tuple[int, int, int]]:
        """The buffer, weight, bias and padding to convolve with. Only with `keep` can `states` be used afterwards."""
        batch, frames, height, width, channels = states.states.shape
        past, border = sweep.past(self, frames), sweep.border
        buffer = states.states.new_empty(batch, past + frames, height + 2 * border, width, channels)
        if past:
            sweep.fill(self, buffer[:, :past])
        own = buffer[:, past:]
        room = own[:, :, border : border + height]
        if norm is None:
            states.total(out=room)
        else:
            keep = keep and states.addend is not None  # a bias alone can wait for the sum that comes
            sweep.norm_silu(states.states, norm.weight, room, states.addend, states.bias, keep=keep)
            states.addend, states.bias = None, None if keep else states.bias
        sweep.rows.fetch(own, border, border)
        sweep.keep(self, buffer)
        weight = self.weight[:, :, PAST - past :]  # the rest would see zeros alone, before the video
        return buffer, weight, self.bias, (0, 1 - border, 1)


class PointConvolution(nn.Conv3d):
    """A convolution of 1 × 1 × 1."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 1)

    def forward(self, states: Tensor) -> Sum:
        return convolve(states, self.weight, self.bias)


class ResidualBlock(nn.Module):
    """Two convolutions, each of SiLU(RMSNorm(·)), added to what came in, which is overwritten where it can be."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = Norm(inputs)
        self.conv1 = CausalConvolution(inputs, outputs)
        self.norm2 = Norm(outputs)
        self.conv2 = CausalConvolution(outputs, outputs)
        self.conv_shortcut = PointConvolution(inputs, outputs) if inputs != outputs else None

    def forward(self, states: Sum, sweep: Sweep) -> Sum:
        inner = self.conv2.prepare(self.conv1(states, sweep, self.norm1, keep=True), sweep, self.norm2)
        shortcut = states if self.conv_shortcut is None else self.conv_shortcut(states.total())
        return convolve_onto(shortcut, *inner)


class Attention(nn.Module):
    """Attention of one head among the pixels of each frame, added to what came in."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels, dims=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, states: Sum, sweep: Sweep) -> Sum:
        total = states.total()
        own = self.norm(total)
        if sweep.rows.is_whole:
            query, key, value = self._project(own, 0, 3).chunk(3, dim=-1)
        else:  # the input travels, as keys and values would be twice as much
            query = self._project(own, 0, 1)
            key, value = self._project(sweep.rows.gather(own), 1, 3).chunk(2, dim=-1)
        out = F.scaled_dot_product_attention(query, key, value)  # [B·T, 1, H·W, C]
        return convolve_onto(states, out.view(total.shape), self.proj.weight.unsqueeze(2), self.proj.bias)

    def _project(self, states: Tensor, first: int, last: int) -> Tensor:
        """Queries, keys and values from the `first` to before the `last` of the three, `[B·T, 1, H·W, ...]`."""
        channels = states.shape[-1]
        own = slice(first * channels, last * channels)
        found = convolve(states, self.to_qkv.weight[own].unsqueeze(2), self.to_qkv.bias[own]).total()
        return found.flatten(0, 1).flatten(1, 2).unsqueeze(1)


class MiddleBlock(nn.Module):
    """What encoder and decoder do at the resolution of the latents."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels) for _ in range(2)])
        self.attentions = nn.ModuleList([Attention(channels)])

    def forward(self, states: Sum, sweep: Sweep) -> Sum:
        states = self.resnets[0](states, sweep)
        states = self.attentions[0](states, sweep)
        return self.resnets[1](states, sweep)
