"""Counts what a program makes a GPU do: kernels, bytes moved and FLOPs, on any device and on meta tensors.

An operation reads each of its input tensors once in full and writes its results once: what it needs of the memory when
nothing stays in a cache from one operation to the next and nothing is fetched twice. Matrix products, convolutions and
attention, those that have a FLOP formula, are told apart from the rest, which only wait for the memory.

Composite operations are taken apart as eager PyTorch takes them apart on a CUDA device: attention is one kernel
everywhere, whatever stands in for it on this device, and so is an RMSNorm whose weight has the dtype of its input.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry

aten = torch.ops.aten

_ATTENTION = (aten.scaled_dot_product_attention, aten._scaled_dot_product_flash_attention_for_cpu)


def _convolution_flops(*arguments: Any, out_val: Tensor) -> int:
    """A transposed one by its outputs: of rows that are cut off again nothing need be computed."""
    states, weight, _, stride, _, _, is_transposed, *_ = arguments
    if not is_transposed:
        return flop_registry[aten.convolution](*arguments, out_val=out_val)
    return 2 * out_val.numel() * states.shape[1] * math.prod(weight.shape[2:]) // math.prod(stride)


def _onednn_flops(states: Tensor, weight: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    return conv_flop_count(states.shape, weight.shape, out_val.shape)


def _onednn_sum_flops(total: Tensor, states: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return conv_flop_count(states.shape, weight.shape, total.shape)


FLOP_FORMULAS = {
    **flop_registry,
    **dict.fromkeys(_ATTENTION, flop_registry[aten._scaled_dot_product_flash_attention]),
    aten.convolution: _convolution_flops,
    aten.mkldnn_convolution: _onednn_flops,
    torch.ops.mkldnn._convolution_pointwise_: _onednn_sum_flops,
}

# They give out memory, or a second name for it, and touch none. All other views are known by their schema.
_FREE = {
    aten._unsafe_view,
    aten.empty,
    aten.empty_like,
    aten.empty_permuted,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
}
_OVERWRITING = {aten.copy_, aten.fill_, aten.zero_}  # in place, without a look at what was there


@dataclass(frozen=True)
class Counts:
    """Kernels, bytes read and written, FLOPs (a multiply-add is two)."""

    kernels: int = 0
    elementwise_bytes: int = 0
    matrix_bytes: int = 0
    flops: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __sub__(self, other: Counts) -> Counts:
        return Counts(*(a - b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __mul__(self, times: int) -> Counts:
        return Counts(*(times * value for value in dataclasses.astuple(self)))


def count(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Counts:
    """What `function(*args, **kwargs)` costs."""
    with torch.inference_mode(), Counter() as counter:
        function(*args, **kwargs)
    return counter.total


class Counter(TorchDispatchMode):
    """Adds up the operations inside a `with` block, by name: `operations["aten.add.Tensor"]`.

    Raises `RuntimeError` outside `torch.inference_mode()`, where attention comes in as the pieces of this device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: dict[str, Counts] = {}

    @property
    def total(self) -> Counts:
        return sum(self.operations.values(), Counts())

    def __enter__(self) -> Counter:
        if not torch.is_inference_mode_enabled():
            raise RuntimeError("Counter works under torch.inference_mode() only; enter that first, or call count()")
        return super().__enter__()

    def __torch_dispatch__(self, function: OpOverload, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _is_taken_apart(function, args, kwargs):
            with self:
                return function._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        result = _run(function, args, kwargs)
        if not (function.is_view or function.overloadpacket in _FREE):
            name = str(function)
            self.operations[name] = self.operations.get(name, Counts()) + _cost(function, args, kwargs, result)
        return result


def _is_taken_apart(function: OpOverload, args: tuple, kwargs: dict[str, Any]) -> bool:
    if function.overloadpacket is aten.rms_norm:
        states, weight = args[0], _arguments(function, args, kwargs).get("weight")
        return weight is not None and weight.dtype != states.dtype
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd")
    return composite and function.overloadpacket not in FLOP_FORMULAS


def _run(function: OpOverload, args: tuple, kwargs: dict[str, Any]) -> Any:
    if function.overloadpacket is aten.scaled_dot_product_attention and args[0].is_meta:
        # Fused kernels lay their result out as [B, S, H, D]; the stand-in for meta tensors does not, and a copy that
        # never happens would follow.
        query, value = args[0], args[2]
        shape = (*query.shape[:-1], value.shape[-1])
        return query.new_empty(shape).transpose(-3, -2).contiguous().transpose(-3, -2)
    return function(*args, **kwargs)


def _cost(function: OpOverload, args: tuple, kwargs: dict[str, Any], result: Any) -> Counts:
    moved = _traffic(function, args, kwargs, result)
    formula = FLOP_FORMULAS.get(function.overloadpacket)
    if formula is None:
        return Counts(kernels=1, elementwise_bytes=moved)
    return Counts(kernels=1, matrix_bytes=moved, flops=formula(*args, **kwargs, out_val=result))


def _traffic(function: OpOverload, args: tuple, kwargs: dict[str, Any], result: Any) -> int:
    """Bytes read and written."""
    values = _arguments(function, args, kwargs)
    read, written = [], _tensors(result)
    for argument in function._schema.arguments:
        tensors = _tensors(values.get(argument.name))
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        if is_written:
            written += tensors
        if not (is_written and (argument.is_out or function.overloadpacket in _OVERWRITING)):
            read += tensors
    return _bytes(read) + _bytes(written)


def _arguments(function: OpOverload, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    return {argument.name: value for argument, value in zip(function._schema.arguments, args, strict=False)} | kwargs


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _bytes(tensors: Iterable[Tensor]) -> int:
    """A tensor given twice counts once, and so do elements that an expanded tensor repeats."""
    distinct = {id(tensor): tensor for tensor in tensors}.values()
    return sum(tensor.element_size() * _elements(tensor) for tensor in distinct)


def _elements(tensor: Tensor) -> int:
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride or size == 0 else 1
    return elements
