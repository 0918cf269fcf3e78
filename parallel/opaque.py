"""Communication and foreign kernels as single operators of a compiled graph.

A compiler must not look into a collective, drop it, copy it or move it past another. Nor may it look into a ring,
because a ring overlaps messages with attention. Operators take tensors and ints, so each group and attention gets an
id. Ids count up in the order of creation, so all ranks agree, and a later run finds its graphs in a cache.

PyTorch's functional collectives do not serve: their all-gather takes equal parts alone, they do not stage CUDA tensors
for gloo, and in compiled code nothing would count their calls.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from parallel.attention import Attention

_numbers = itertools.count()
_named: WeakValueDictionary[int, Any] = WeakValueDictionary()


def name(thing: Any) -> int:
    """The number by which operators of this module know a thing for as long as it lives."""
    number = next(_numbers)
    _named[number] = thing
    return number


class OpaqueAttention:
    """An attention that is one operator of a compiled graph. Outside of compiled code it is the attention itself.

    The output must be `[B, Sq, H, D]` in the dtype of the query, which is that of every `Attention`.
    """

    def __init__(self, attention: Attention) -> None:
        self.attention = attention
        self.number = name(self)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.ops.helios_parallel.attention(query, key, value, self.number)
        return self.attention(query, key, value)


# Schemas are written out, as those that PyTorch reads from annotations depend on its version.
@torch.library.custom_op(
    "helios_parallel::attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, int number) -> Tensor",
)
def _attention(query: Tensor, key: Tensor, value: Tensor, number: int) -> Tensor:
    return _named[number].attention(query, key, value).contiguous()


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, number: int) -> Tensor:
    return query.new_empty(query.shape)


@torch.library.custom_op(
    "helios_parallel::all_to_all",
    mutates_args=(),
    schema="(Tensor tensor, int[] send_sizes, int[] receive_sizes, str kind, int number) -> Tensor",
)
def all_to_all(
    tensor: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], kind: str, number: int
) -> Tensor:
    """`Group.all_to_all` of the group of that number."""
    return _named[number].all_to_all(tensor, send_sizes, receive_sizes, kind)


@all_to_all.register_fake
def _(tensor: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], kind: str, number: int) -> Tensor:
    return tensor.new_empty(sum(receive_sizes))


@torch.library.custom_op(
    "helios_parallel::all_gather",
    mutates_args=(),
    schema="(Tensor tensor, int[] lengths, int dim, int number) -> Tensor",
)
def all_gather(tensor: Tensor, lengths: Sequence[int], dim: int, number: int) -> Tensor:
    """`Group.all_gather` of the group of that number, the parts joined along `dim`."""
    return torch.cat(_named[number].all_gather(tensor, lengths, dim), dim)


@all_gather.register_fake
def _(tensor: Tensor, lengths: Sequence[int], dim: int, number: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = sum(lengths)
    return tensor.new_empty(shape)
