"""Weights of 4 bits, two in a byte, with a scale for each group of values in a row. A tensor subclass of torchao.

torchao's own kernels for 4 bits serve the few tokens of a language model's step, and run on CUDA only. Helios has
thousands of tokens, so a product takes far longer than unpacking its weight. Therefore this class unpacks the weight to
the dtype of the activations and multiplies as usual. It runs on every device, with the same bits of the weight on each.
Compiled, unpacking is one kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine
from torchao.utils import TorchAOBaseTensor

LOWEST, HIGHEST = -8, 7


class Int4Weight(TorchAOBaseTensor):
    """A weight `[N, K]`: `qdata` uint8 `[N, K/2]`, the even column in the low bits, and `scale` bf16 `[N, K/g]`."""

    tensor_data_names = ["qdata", "scale"]  # noqa: RUF012 - what torchao reads them as
    tensor_attribute_names = ["dtype"]  # noqa: RUF012

    def __new__(cls, qdata: Tensor, scale: Tensor, dtype: torch.dtype) -> Int4Weight:
        shape = (qdata.shape[0], 2 * qdata.shape[1])
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=qdata.device, requires_grad=False)

    def __init__(self, qdata: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.qdata = qdata
        self.scale = scale

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """`[N, K]`; each value is rounded once, to the dtype."""
        dtype = dtype or self.dtype
        values = torch.stack([self.qdata & 15, self.qdata >> 4], -1).flatten(1).to(dtype) + LOWEST
        return (values.unflatten(1, (self.scale.shape[1], -1)) * self.scale.to(dtype).unsqueeze(-1)).flatten(1)


def quantise_int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """`qdata` and `scale` of a weight `[N, K]` in fp32. `group` values share a scale; K is a multiple of it."""
    block = (1, group)
    bounds = (torch.int8, LOWEST, HIGHEST)
    scale, zero_point = choose_qparams_affine(
        weight, MappingType.SYMMETRIC, block, *bounds, scale_dtype=torch.bfloat16, zero_point_dtype=torch.int8
    )
    values = quantize_affine(weight, block, scale.float(), zero_point, *bounds) - LOWEST
    even, odd = values.to(torch.uint8).unflatten(1, (-1, 2)).unbind(-1)
    return even | odd << 4, scale.reshape(weight.shape[0], -1)


@Int4Weight.implements_torch_function(F.linear)
def _linear(function, types, args, kwargs):
    states, weight, bias = (*args, *kwargs.values(), None)[:3]
    return F.linear(states, weight.dequantize(states.dtype), bias)


@Int4Weight.implements(torch.ops.aten.slice.Tensor)
def _rows(function, types, args, kwargs):
    weight, dim = args[0], args[1] if len(args) > 1 else 0
    if dim != 0:  # two values of a row share a byte, and nothing here cuts rows
        raise NotImplementedError("a weight of 4 bits is sliced by rows only")
    return Int4Weight(*(function(data, *args[1:], **kwargs) for data in (weight.qdata, weight.scale)), weight.dtype)
