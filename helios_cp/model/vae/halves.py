"""The two halves of the VAE: pixels to the mean and log-variance of latents, and latents to pixels."""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from helios_cp.model.vae.config import VaeConfig
from helios_cp.model.vae.kernels import Sum
from helios_cp.model.vae.layers import CausalConvolution, MiddleBlock, Norm, ResidualBlock
from helios_cp.model.vae.resampling import Downsample, Upsample
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


class UpBlock(nn.Module):
    """One level of the decoder, and the upsampling to the next where there is one."""

    def __init__(self, inputs: int, outputs: int, blocks: int, upsample: Upsample | None) -> None:
        super().__init__()
        widths = [inputs, *[outputs] * blocks]
        self.resnets = nn.ModuleList([ResidualBlock(*pair) for pair in itertools.pairwise(widths)])
        self.upsamplers = None if upsample is None else nn.ModuleList([upsample])

    def forward(self, states: Sum, sweep: Sweep) -> Sum:
        for block in self.resnets:
            states = block(states, sweep)
        return states if self.upsamplers is None else self.upsamplers[0](states, sweep)


class Decoder(nn.Module):
    """From `[B, T, h, w, z_dim]` to `[B, T', H, W, out_channels]`."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = [config.decoder_dim * factor for factor in (config.dim_mult[-1], *config.dim_mult[::-1])]
        grows_in_time = (*config.temperal_downsample[::-1], None)
        self.conv_in = CausalConvolution(config.z_dim, widths[0])
        self.mid_block = MiddleBlock(widths[0])
        self.up_blocks = nn.ModuleList()
        for level, (before, after) in enumerate(itertools.pairwise(widths)):
            inputs = before if level == 0 else before // 2
            upsample = Upsample(after, grows_in_time[level]) if level < config.levels - 1 else None
            self.up_blocks.append(UpBlock(inputs, after, config.num_res_blocks + 1, upsample))
        self.norm_out = Norm(widths[-1])
        self.conv_out = CausalConvolution(widths[-1], config.out_channels)

    def forward(self, states: Tensor, sweep: Sweep) -> Tensor:
        states = self.mid_block(self.conv_in(Sum(states), sweep), sweep)
        for block in self.up_blocks:
            states = block(states, sweep)
        return self.conv_out(states, sweep, self.norm_out).total()
