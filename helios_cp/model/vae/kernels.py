"""The norms and convolutions of the VAE, written to move little between memory and the cores.

Tensors are `[..., C]`. RMSNorm here is diffusers' `WanRMS_norm`: x · √C / ‖x‖ · γ over the channels of each pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ON_CPU, ON_CARD = 2**17, 2**22
"""Elements of a block that stays in a cache between two operations on it: that of a core, and that of a card."""


@dataclass
class Sum:
    """`states + addend + bias`, `[B, T, H, W, C]` and `[C]`, not added up yet; addend and bias may be missing.

    A card's convolutions add neither. The norm that follows does it, in its own pass over the memory.
    """

    states: Tensor
    addend: Tensor | None = None
    bias: Tensor | None = None

    def total(self, out: Tensor | None = None) -> Tensor:
        """Add up: over `states`, or into `out`."""
        out = self.states if out is None else out
        if self.addend is None and self.bias is None:
            self.states = self.states if out is self.states else out.copy_(self.states)
            return self.states
        for part, place, *addends in _blocks(self.states, out, self.addend):
            for term in _present(*addends, self.bias):
                part = torch.add(part, term, out=place)
        self.states, self.addend, self.bias = out, None, None
        return self.states


NormSilu = Callable[..., Any]  # with the arguments of `norm_silu`


def rms_norm(states: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm over the channels; half precision is computed in fp32 inside."""
    # diffusers divides by 1e-12 where ‖x‖ is smaller. A name for it would be an input of compiled code.
    return F.rms_norm(states, weight.shape, weight, 1e-24 / weight.shape[0])


def norm_silu(
    states: Tensor,
    weight: Tensor,
    out: Tensor,
    addend: Tensor | None = None,
    bias: Tensor | None = None,
    keep: bool = False,
) -> None:
    """SiLU(RMSNorm(states + addend + bias)), `[B, T, H, W, C]`, into `out`, which may be a part of a buffer.

    With `keep` the sum is written over `states`. Done block by block, so that what is between two operations stays in
    the cache.
    """
    for part, place, *addends in _blocks(states, out, addend):
        for term in _present(*addends, bias):
            part = part.add_(term) if keep else part + term
        torch.ops.aten.silu.out(rms_norm(part, weight), out=place)


def fusible_norm_silu(
    states: Tensor,
    weight: Tensor,
    out: Tensor,
    addend: Tensor | None = None,
    bias: Tensor | None = None,
    keep: bool = False,
) -> None:
    """`norm_silu` for a compiler, which makes one kernel of it."""
    for term in _present(addend, bias):
        states = states.add_(term) if keep else states + term
    out.copy_(F.silu(rms_norm(states, weight)))


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _blocks(states: Tensor, out: Tensor, addend: Tensor | None = None) -> Iterator[Sequence[Tensor]]:
    """Those that are not `None`, in pieces that stay in a cache."""
    return _pieces(_present(states, out, addend), ON_CPU if states.device.type == "cpu" else ON_CARD)


def _pieces(tensors: Sequence[Tensor], most: int, dim: int = 0) -> Iterator[Sequence[Tensor]]:
    """Tensors of one shape in pieces of at most so many elements, or of one pixel, cut along the first dims."""
    first = tensors[0]
    if first.numel() <= most or dim == first.dim() - 1:
        yield tensors
        return
    size = max(most * first.shape[dim] // first.numel(), 1)
    for parts in zip(*(tensor.split(size, dim) for tensor in tensors), strict=True):
        yield from _pieces(parts, most, dim + 1)


def convolve(
    states: Tensor,
    weight: Tensor,
    bias: Tensor,
    padding: Sequence[int] | None = None,
    stride: Sequence[int] | None = None,
) -> Sum:
    """A convolution from `[B, T, H, W, C]` or `[B, H, W, C]` to the like.

    On a CPU oneDNN is called directly, because PyTorch would leave small videos to kernels that are ten times as slow
    and do not keep channels last.
    """
    states, dims = states.movedim(-1, 1), weight.dim() - 2
    padding, stride = list(padding or [0] * dims), list(stride or [1] * dims)
    own, left = (bias, None) if _adds(states) else (None, bias)
    if _runs_on_onednn(states):
        out = torch.mkldnn_convolution(states, weight, own, padding, stride, [1] * dims, 1)
    else:
        out = (F.conv3d if dims == 3 else F.conv2d)(states, weight, own, stride, padding)
    return Sum(out.movedim(1, -1), bias=left)


def convolve_onto(total: Sum, states: Tensor, weight: Tensor, bias: Tensor, padding: Sequence[int] = (0, 0, 0)) -> Sum:
    """A convolution of `[B, T, H, W, C]`, and `total`, which has no addend and is overwritten."""
    if not _adds(states):
        found = convolve(states, weight, bias, padding)
        return Sum(total.states, found.states, bias if total.bias is None else bias + total.bias)
    if not (_runs_on_onednn(states) and total.states.is_contiguous()):
        return Sum(total.states.add_(convolve(states, weight, bias, padding).states))
    onto, states, ones = total.states.movedim(-1, 1), states.movedim(-1, 1), [1, 1, 1]
    torch.ops.mkldnn._convolution_pointwise_.binary(
        onto, states, weight, bias, list(padding), ones, ones, 1, "add", None, None, [], None
    )
    return total


def convolve_transposed(states: Tensor, weight: Tensor, bias: Tensor, padding: Sequence[int], stride: int) -> Sum:
    """A transposed convolution from `[B, H, W, C]` to the like."""
    own, left = (bias, None) if _adds(states) else (None, bias)
    out = F.conv_transpose2d(states.movedim(-1, 1), weight, own, stride, padding)
    return Sum(out.movedim(1, -1), bias=left)


def _adds(states: Tensor) -> bool:
    """Whether convolutions add while they convolve. cuDNN's do not: PyTorch adds a bias in a pass of its own."""
    return states.device.type == "cpu"


def _runs_on_onednn(tensor: Tensor) -> bool:
    if tensor.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return tensor.dtype == torch.float32 or (
        tensor.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
