"""Between the levels of the VAE: twice or half as many rows and columns, and frames where the level says so.

Parameters are named as in diffusers' `WanResample`, whose `resample` is a pair of which the second has weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from helios_cp.model.vae.kernels import Sum, convolve, convolve_transposed
from helios_cp.model.vae.sweep import PAST, Sweep


class Upsample(nn.Module):
    """Each pixel becomes four by a nearest upsampling and a 3 × 3 convolution.

    With `in_time` frames are doubled before. Frame 0 stays single, and is not in the past of the convolution that makes
    two frames of each of the others.
    """

    def __init__(self, channels: int, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), FoldedUpsampling(channels, channels // 2))
        self.time_conv = nn.Conv3d(channels, 2 * channels, (3, 1, 1)) if in_time else None

    def forward(self, states: Sum, sweep: Sweep) -> Sum:
        total = states.total()
        if self.time_conv is not None:
            total = self._double(total, sweep)
        return self.resample[1](total, sweep)

    def _double(self, states: Tensor, sweep: Sweep) -> Tensor:
        """Pairs of frames, of which each is half of the channels of one frame of `time_conv`."""
        single = 1 if sweep.is_first else 0
        batch, frames, height, width, channels = states.shape
        frames -= single
        if not frames:
            return states
        past = states.new_empty(batch, PAST, height, width, channels)
        sweep.fill(self, past)
        seen = torch.cat([past, states[:, single:]], 1)  # at a sixteenth of the largest tensors, so the copy is cheap
        sweep.keep(self, seen)
        pairs = convolve(seen, self.time_conv.weight, self.time_conv.bias).total()
        out = states.new_empty(batch, single + 2 * frames, height, width, channels)
        out[:, :single] = states[:, :single]
        out[:, single:].unflatten(1, (frames, 2)).copy_(pairs.unflatten(-1, (2, channels)).movedim(-2, 2))
        return out


class FoldedUpsampling(nn.Conv2d):
    """A nearest upsampling by two and a 3 × 3 convolution, as one transposed convolution on the small picture.

    Of the nine pixels that the convolution reads many are copies of one. A pixel of an even row reads two rows, i − 1
    by k₀ and i by k₁ + k₂; one of an odd row reads i by k₀ + k₁ and i + 1 by k₂; and columns likewise. These four 2 × 2
    convolutions, one for each parity of row and column, are the transposed convolution of stride 2 whose 4 × 4 kernel
    is `folded`: 4 products in place of 9, and the upsampled picture is never written. `folded` is made when weights are
    loaded, from sums in fp64, and is no part of a state dict.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3)
        self.register_buffer("folded", fold(self.weight.detach()), persistent=False)
        self.register_load_state_dict_post_hook(FoldedUpsampling.fold)

    def fold(self, *_: Any) -> None:
        """Make `folded` of the weight."""
        self.folded = fold(self.weight.detach())

    def forward(self, states: Tensor, sweep: Sweep) -> Sum:
        batch, border = states.shape[0], sweep.border
        if border:
            own, states = states, states.new_empty(*states.shape[:2], states.shape[2] + 2, *states.shape[3:])
            states[:, :, 1:-1] = own
            sweep.rows.fetch(states, 1, 1)
        # What rows of others make of rows outside of these two is cut off like what columns make beside the picture.
        padding = (1 + 2 * border, 1)
        out = convolve_transposed(states.flatten(0, 1), self.folded, self.bias, padding, stride=2)
        return Sum(out.states.unflatten(0, (batch, -1)), bias=out.bias)


def fold(weight: Tensor) -> Tensor:
    """`[O, I, 3, 3]` of a convolution after a nearest upsampling to `[I, O, 4, 4]` of the transposed convolution."""
    if weight.is_meta:  # for a product of these torch would import sympy, a third of a second
        return weight.new_empty(weight.shape[1], weight.shape[0], 4, 4).to(memory_format=torch.channels_last)
    sums = weight.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.float64)
    folded = torch.einsum("oiab,pa,qb->iopq", weight.double(), sums, sums)
    return folded.to(weight.dtype).contiguous(memory_format=torch.channels_last)


class Downsample(nn.Module):
    """A 3 × 3 convolution of stride 2, which sees zeros below the last row and to the right of the last column.

    With `in_time` the like among frames follows: frame 0 stays as it is, and is the past of the frames after it.
    """

    def __init__(self, channels: int, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if in_time else None

    def forward(self, states: Sum, sweep: Sweep) -> Sum:
        batch, frames, height, width, channels = states.states.shape
        buffer = states.states.new_empty(batch, frames, height + 1, width + 1, channels)
        buffer[:, :, :, width:] = 0
        states.total(out=buffer[:, :, :height, :width])
        sweep.rows.fetch(buffer, 0, 1)
        convolution = self.resample[1]
        out = convolve(buffer.flatten(0, 1), convolution.weight, convolution.bias, stride=(2, 2))
        out = Sum(out.states.unflatten(0, (batch, -1)), bias=out.bias)
        return out if self.time_conv is None else Sum(self._halve(out.total(), sweep))

    def _halve(self, states: Tensor, sweep: Sweep) -> Tensor:
        single = 1 if sweep.is_first else 0
        seen = states
        if not single:
            past = states.new_empty(states.shape[0], 1, *states.shape[2:])
            sweep.fill(self, past)
            seen = torch.cat([past, states], 1)  # an eighth of the layer before, so the copy is cheap
        sweep.keep(self, seen, frames=1)
        if seen.shape[1] < 3:
            return states[:, :single]
        halved = convolve(seen, self.time_conv.weight, self.time_conv.bias, stride=(2, 1, 1)).total()
        return torch.cat([states[:, :single], halved], 1) if single else halved
