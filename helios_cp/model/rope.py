"""Three-axis rotary position embedding over (frame, row, column)."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


class RotaryTables:
    """Builds and keeps rotary tables; each is computed once per frame indices, size and device.

    The head dim is divided over the three axes by `rope_dim`; channel pair `j` of an axis of width `d` turns with the
    frequency `theta ** (-2j / d)` (RoFormer, arXiv:2104.09864, section 3.2, once per axis).
    """

    def __init__(self, rope_dim: tuple[int, int, int], theta: float) -> None:
        self.rope_dim = rope_dim
        self.theta = theta
        self.table = functools.lru_cache(maxsize=64)(self._table)

    def _table(
        self, frame_indices: tuple[int, ...], height: int, width: int, device: torch.device, pool: int = 1
    ) -> Tensor:
        """Complex table `[S, D/2]` for a grid of T · height · width tokens, in fp32.

        `pool` > 1 gives the table of tokens that each cover `pool`³ grid cells: the mean of cos and of sin over the
        cells, the grid replicated at its end where `pool` does not divide it. Such entries are shorter than 1.
        """
        axes = (
            torch.tensor(frame_indices, dtype=torch.float32, device=device),
            torch.arange(height, dtype=torch.float32, device=device),
            torch.arange(width, dtype=torch.float32, device=device),
        )
        grid = torch.meshgrid(*axes, indexing="ij")
        # On the CPU first: pow rounds differently on an accelerator, and angles reach thousands of radians.
        exponents = [torch.arange(0, dim, 2, dtype=torch.float32) / dim for dim in self.rope_dim]
        frequencies = [(1.0 / self.theta**exponent).to(device).view(-1, 1, 1, 1) for exponent in exponents]
        angles = torch.cat(
            [each * positions for each, positions in zip(frequencies, grid, strict=True)]
        )  # [D/2, T, h, w]
        table = torch.stack([angles.cos(), angles.sin()])
        if pool > 1:
            table = F.avg_pool3d(pad_to_multiple(table, (pool, pool, pool)), pool)
        cos, sin = table.flatten(2).transpose(1, 2)
        return torch.complex(cos.contiguous(), sin.contiguous())


def rotate_(states: Tensor, table: Tensor) -> Tensor:
    """Turn each channel pair (2j, 2j+1) of `states` `[B, S, H, D]` by `table` `[S, D/2, 2]` of cos and sin.

    The product is taken in fp32 and stored in the dtype of `states`; fp32 states are changed in place, unless it is
    compiled.
    """
    pairs = states.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # compilers do not fuse complex numbers
        cos, sin = table[:, None].unbind(-1)
        signs = 2 * torch.arange(2, device=table.device) - 1  # (a, b) to (a·cos − b·sin, b·cos + a·sin)
        turned = pairs * cos.unsqueeze(-1) + pairs.flip(-1) * (signs * sin.unsqueeze(-1))
        return turned.flatten(-2).to(states.dtype)
    turned = torch.view_as_complex(pairs)
    turned.mul_(torch.view_as_complex(table).unsqueeze(1))
    return torch.view_as_real(turned).flatten(-2).to(states.dtype)


def pad_to_multiple(volume: Tensor, multiple: tuple[int, int, int]) -> Tensor:
    """Replicate the last frame, row and column of `[B, C, T, h, w]` until `multiple` divides each."""
    padding = [(-size) % step for size, step in zip(volume.shape[-3:], multiple, strict=True)]
    if not any(padding):
        return volume
    time, rows, columns = padding
    return F.pad(volume, (0, columns, 0, rows, 0, time), mode="replicate")
