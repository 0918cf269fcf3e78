"""The norms and convolutions of the VAE, written to move little between memory and the cores.

Tensors are `[..., C]`. RMSNorm here is diffusers' `WanRMS_norm`: x · √C / ‖x‖ · γ over the channels of each pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NormSilu = Callable[[Tensor, Tensor, Tensor], Any]
"""`(states [B, T, H, W, C], weight [C], out)`: SiLU(RMSNorm(states)) into `out`, which may be a part of a buffer."""

ON_CPU, ON_CARD = 2**17, 2**22
"""Elements of a block that stays in a cache between two operations on it: that of a core, and that of a card."""


def rms_norm(states: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm over the channels; half precision is computed in fp32 inside."""
    # diffusers divides by 1e-12 where ‖x‖ is smaller. A name for it would be an input of compiled code.
    return F.rms_norm(states, weight.shape, weight, 1e-24 / weight.shape[0])


def norm_silu(states: Tensor, weight: Tensor, out: Tensor) -> None:
    """`NormSilu` without a compiler: block by block, so that what is between the two stays in the cache."""
    for part, place in _blocks(states, out, ON_CPU if states.device.type == "cpu" else ON_CARD):
        torch.ops.aten.silu.out(rms_norm(part, weight), out=place)


def fusible_norm_silu(states: Tensor, weight: Tensor, out: Tensor) -> None:
    """`NormSilu` for a compiler, which makes one kernel of it."""
    out.copy_(F.silu(rms_norm(states, weight)))


def _blocks(states: Tensor, out: Tensor, most: int, dim: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Both tensors in pieces of at most so many elements, or of one pixel, cut along the first dims."""
    if states.numel() <= most or dim == states.dim() - 1:
        yield states, out
        return
    size = max(most * states.shape[dim] // states.numel(), 1)
    for part, place in zip(states.split(size, dim), out.split(size, dim), strict=True):
        yield from _blocks(part, place, most, dim + 1)


def convolve(
    states: Tensor,
    weight: Tensor,
    bias: Tensor,
    padding: Sequence[int] | None = None,
    stride: Sequence[int] | None = None,
    onto: Tensor | None = None,
) -> Tensor:
    """A convolution from `[B, T, H, W, C]` or `[B, H, W, C]` to the like.

    With `onto` the result is added to that tensor, which is overwritten and returned. On a CPU oneDNN is called
    directly: it adds while it convolves, and PyTorch would leave small videos to kernels that are ten times as slow and
    do not keep channels last.
    """
    states, dims = states.movedim(-1, 1), weight.dim() - 2
    padding, stride, ones = list(padding or [0] * dims), list(stride or [1] * dims), [1] * dims
    is_onednn = _runs_on_onednn(states)
    if is_onednn and onto is not None and onto.is_contiguous():
        torch.ops.mkldnn._convolution_pointwise_.binary(
            onto.movedim(-1, 1), states, weight, bias, padding, stride, ones, 1, "add", None, None, [], None
        )
        return onto
    if is_onednn:
        out = torch.mkldnn_convolution(states, weight, bias, padding, stride, ones, 1)
    else:
        out = (F.conv3d if dims == 3 else F.conv2d)(states, weight, bias, stride, padding)
    out = out.movedim(1, -1)
    return out if onto is None else onto.add_(out)


def _runs_on_onednn(tensor: Tensor) -> bool:
    if tensor.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return tensor.dtype == torch.float32 or (
        tensor.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
