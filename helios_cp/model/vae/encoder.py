"""Pixels to the mean and log-variance of latents."""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from helios_cp.model.vae.config import VaeConfig
from helios_cp.model.vae.kernels import Sum
from helios_cp.model.vae.layers import CausalConvolution, MiddleBlock, Norm, ResidualBlock
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
        states = self.conv_in(Sum(states), sweep)
        for layer in self.down_blocks:
            states = layer(states, sweep)
        return self.conv_out(self.mid_block(states, sweep), sweep, self.norm_out).total()
