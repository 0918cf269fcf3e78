"""Which parts of the transformer's weights a rank holds, and in which memory they lie.

With `--shard-weights` each rank holds rows of the blocks' weights, and gathers them one block ahead of their use, by
FSDP2 (`torch.distributed.fsdp.fully_shard`). It shards the linear layers of the blocks, 98 % of the 14B model; norms,
tables, embeddings and the output layer are on every rank. The layer that makes the cross-attention keys and values is
gathered apart from the rest of its block: `encode_text` needs it alone, and a forward never does. A gather needs all
ranks, so all must call `encode_text` and `forward` in the same order.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from helios_cp.config.checkpoint import TransformerConfig
from helios_cp.files.tensor_files import Slices
from helios_cp.model.fused import stored_names
from helios_cp.model.transformer import HeliosTransformer, empty_model
from helios_cp.weights.quantize import Components, components, is_block_linear, is_quantised
from parallel.collectives import Group
from parallel.tensor import shard_slice

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

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
    `shards`, which are all ranks. One of the two groups may have several ranks.
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
                    first, memory = self.shards.rank * _chunk_rows(memory.shape[0], self.shards.size), memory.to_local()
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


def shard_weights(transformer: HeliosTransformer, group: Group, device: torch.device) -> None:
    """Leave this rank's rows of the blocks' weights in a model on the meta device, in its final dtype.

    `group` is that of all ranks, which all call this.
    """
    # Imported here, because they take a second, and the planner counts bytes without them.
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # A communicator of their own, because gathers in the world's would hold up the exchanges of attention.
    process_group = dist.new_group(list(group.ranks), timeout=group.timeout)
    mesh = DeviceMesh.from_group(process_group, device.type)
    text_units, block_units = _units(transformer)
    for unit in (*text_units, *block_units):  # inner ones first
        linear = set(_linear_parameters(unit))
        others = {parameter for parameter in unit.parameters() if parameter not in linear}
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=others)
    # The root shards nothing itself. FSDP needs it, because otherwise the unit that runs first would be the root.
    fully_shard(transformer, mesh=mesh, ignored_params=set(transformer.parameters()))
    register_fsdp_forward_method(transformer, "encode_text")
    _gather_ahead(text_units)
    _gather_ahead(block_units)
    if hasattr(transformer, "reset_iter_state"):
        # FSDP notes 2 KB of every forward for a backward pass that never comes. PyTorch 2.11 cannot forget them.
        transformer.register_forward_hook(lambda *_: transformer.reset_iter_state())


def _units(transformer: HeliosTransformer) -> tuple[list[nn.Module], list[nn.Module]]:
    """What is gathered together: of each block, the layer that `encode_text` needs, and the block without it."""
    return [block.attn2.to_kv for block in transformer.blocks], list(transformer.blocks)


def _linear_parameters(unit: nn.Module) -> Iterator[nn.Parameter]:
    for module in unit.modules():
        if isinstance(module, nn.Linear):
            yield from module.parameters()


def _gather_ahead(units: Sequence[nn.Module]) -> None:
    """Start each unit's gather just before the unit ahead of it computes, and the first one's before its own work.

    FSDP can prefetch by itself, but then it holds three units at once: it keeps what it received of one unit until the
    next is in place. A gather that starts here is freed together with its weights.
    """
    units[0].register_forward_pre_hook(functools.partial(_start_gather, units[0]), prepend=True)  # before FSDP's own
    for unit, following in itertools.pairwise(units):
        unit.register_forward_pre_hook(functools.partial(_start_gather, following))


def _start_gather(unit: FSDPModule, *_: Any) -> None:
    unit.unshard(async_op=True)


def stacked_rows(heights: Sequence[int], first: int, last: int) -> Iterator[tuple[int, slice, slice]]:
    """Which tensors of a stack rows `first` to `last` (exclusive) come from; `heights` are the rows of each tensor.

    Yields the index of a tensor, its rows among these, and where they are, counted from `first`.
    """
    for index, (top, bottom) in enumerate(itertools.pairwise(itertools.accumulate(heights, initial=0))):
        start, stop = max(first, top), min(last, bottom)
        if start < stop:
            yield index, slice(start - top, stop - top), slice(start - first, stop - first)


def _chunk_rows(rows: int, ranks: int) -> int:
    """Rows of each rank, as FSDP shards: all but the last have as many, and the last ones may have none."""
    return -(-rows // ranks)  # rounded up


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of weights on one rank, the same on every rank.

    `resident`: held all the time. `gathered`: held besides while the blocks run, at most. `received`: from other ranks,
    in one forward.
    """

    resident: int
    gathered: int
    received: int


def predicted_bytes(config: TransformerConfig, dtype: torch.dtype, ranks: int) -> WeightBytes:
    """Counted from the shapes of a model on the meta device, with its blocks sharded over `ranks`.

    Ranks with fewer rows hold as much as the others, as FSDP pads them. Two units are gathered at most: one that
    computes, and the next as it arrives (or one as it arrives and as it is put in place).
    """
    transformer = empty_model(config, dtype)
    text_units, block_units = _units(transformer)
    texts, blocks = ({p for unit in units for p in _linear_parameters(unit)} for units in (text_units, block_units))

    def shard(parameters: set[nn.Parameter]) -> int:
        return sum(_chunk_rows(p.shape[0], ranks) * p[0].numel() * p.element_size() for p in parameters)

    resident = shard(blocks) + sum(p.nbytes for p in transformer.parameters() if p not in blocks)
    if ranks == 1:
        return WeightBytes(resident, 0, 0)
    units = [set(_linear_parameters(unit)) for unit in text_units]
    units += [set(_linear_parameters(unit)) - texts for unit in block_units]
    return WeightBytes(resident, 2 * ranks * max(map(shard, units)), (ranks - 1) * shard(blocks - texts))
