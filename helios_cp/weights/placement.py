"""Which parts of the transformer's weights a rank holds, and in which memory they lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from helios_cp.files.tensor_files import Slices
from helios_cp.model.fused import stored_names
from helios_cp.model.transformer import HeliosTransformer
from helios_cp.weights.quantize import Components, components, is_block_linear, is_quantised
from helios_cp.weights.sharded import chunk_rows, shard_weights, stacked_rows
from parallel.collectives import Group
from parallel.tensor import shard_slice

Moved = Mapping[str, Tensor]
"""The memory of parameters that do not lie in the model just now, by the parameter's name in it."""

ALONE = Group(None)


@dataclass(frozen=True)
class Destination:
    """Where `part` of the stored tensor `name` goes: rows of a parameter, or of the components of a quantised one."""

    name: str
    part: Slices
    memory: Tensor | Components


@dataclass(frozen=True)
class Placement:
    """What a rank holds; by default all.

    Of the feed-forward layers it holds its hidden features among `ffn_tp`, of the blocks' weights its rows among
    `shards`, which are all ranks (`weights.sharded`). One of the two groups may have several ranks.
    """

    ffn_tp: Group = ALONE
    shards: Group = ALONE

    @property
    def is_sharded(self) -> bool:
        return self.shards.size > 1

    def shrink(self, model: HeliosTransformer, device: torch.device) -> None:
        """Make parameters of a model on the meta device smaller, before memory is allocated on `device`."""
        narrow_feed_forward(model, self.ffn_tp)
        if self.is_sharded:
            shard_weights(model, self.shards, device)

    def destinations(self, model: HeliosTransformer, moved: Moved) -> Iterator[Destination]:
        """Where stored tensors go once memory is there, without those of which this rank holds nothing."""
        parts = feed_forward_parts(model, self.ffn_tp)
        for path, module in model.named_modules():
            for kind, parameter in module.named_parameters(recurse=False):
                names = stored_names(path, module, kind)
                memory, first = moved.get(f"{path}.{kind}", parameter).detach(), 0
                heights = [memory.shape[0] // len(names)] * len(names)
                is_part = self.is_sharded and is_block_linear(path, module)
                if is_part:
                    first, memory = self.shards.rank * chunk_rows(memory.shape[0], self.shards.size), memory.to_local()
                for index, rows, place in stacked_rows(heights, first, first + memory.shape[0]):
                    part = (rows,) if is_part else parts.get(names[index], ())
                    yield Destination(names[index], part, _rows(memory, place))


def _rows(memory: Tensor, rows: slice) -> Tensor | Components:
    if not is_quantised(memory):
        return memory[rows]
    return {name: values[rows] for name, values in components(memory).items()}


def narrow_feed_forward(model: HeliosTransformer, group: Group) -> None:
    """Leave each feed-forward layer of a model on the meta device this rank's hidden features only."""
    if group.size == 1:
        return
    own = shard_slice(model.config.ffn_dim, group.size, group.rank)
    size = own.stop - own.start
    for block in model.blocks:
        first, last = block.ffn.net[0].proj, block.ffn.net[2]
        options = {"device": "meta", "dtype": last.weight.dtype}
        block.ffn.net[0].proj = nn.Linear(first.in_features, size, **options)
        block.ffn.net[2] = nn.Linear(size, last.out_features, **options)


def feed_forward_parts(model: HeliosTransformer, group: Group) -> dict[str, Slices]:
    """Which part of a stored tensor a rank of `group` holds, by the names of those that it does not hold whole.

    The second layer's bias stays whole, because it is added once, to the sum.
    """
    parts: dict[str, Slices] = {}
    if group.size == 1:
        return parts
    own = shard_slice(model.config.ffn_dim, group.size, group.rank)
    for index in range(len(model.blocks)):
        parts[f"blocks.{index}.ffn.net.0.proj.weight"] = (own,)
        parts[f"blocks.{index}.ffn.net.0.proj.bias"] = (own,)
        parts[f"blocks.{index}.ffn.net.2.weight"] = (slice(None), own)
    return parts
