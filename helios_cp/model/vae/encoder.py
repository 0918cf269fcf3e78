"""Pixels to the mean and log-variance of latents."""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from helios_cp.model.vae.config import VaeConfig
from helios_cp.model.vae.layers import CausalConvolution, MiddleBlock, Norm, ResidualBlock, with_edge
from helios_cp.model.vae.resampling import Downsample
from helios_cp.model.vae.sweep import Sweep


class Encoder(nn.Module):
    """From `[B, T, H, W, in_channels]` to `[B, T', h, w, 2 · z_dim]`."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = [config.base_dim * factor for factor in (1, *config.dim_mult)]
        self.conv_in = CausalConvolution(config.in_channels, widths[0])
        self.down_blocks = nn.ModuleList()
        for level, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            layers = [inputs, *[outputs] * config.num_res_blocks]
            self.down_blocks.extend(ResidualBlock(*pair) for pair in itertools.pairwise(layers))
            if level < config.levels - 1:
                self.down_blocks.append(Downsample(outputs, config.temperal_downsample[level]))
        self.mid_block = MiddleBlock(widths[-1])
        self.norm_out = Norm(widths[-1])
        self.conv_out = CausalConvolution(widths[-1], 2 * config.z_dim)

    def forward(self, states: Tensor, sweep: Sweep) -> Tensor:
        states = self.conv_in(states, sweep)
        layers = list(self.down_blocks)
        has_edge = False
        for layer, following in itertools.zip_longest(layers, layers[1:]):
            if isinstance(layer, ResidualBlock):
                has_edge = isinstance(following, Downsample)
                states = layer(states, sweep, has_edge)
                continue
            if not has_edge:  # a level without blocks
                inner = states
                states, room = with_edge(inner)
                room.copy_(inner)
            states, has_edge = layer(states, sweep), False
        return self.conv_out(self.mid_block(states, sweep), sweep, self.norm_out)
