"""Which parts of the transformer's weights a rank holds, and in which memory they lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from helios_cp.files.tensor_files import Slices
from helios_cp.model.fused import stored_names
from helios_cp.model.transformer import HeliosTransformer
from helios_cp.weights.quantize import Components, components, is_quantised
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


class Placement(Protocol):
    """What a rank holds. `takes_quantised` says whether weights can be quantised too."""

    @property
    def takes_quantised(self) -> bool: ...

    def shrink(self, model: HeliosTransformer, device: torch.device) -> None:
        """Make parameters of a model on the meta device smaller, before memory is allocated on `device`."""

    def destinations(self, model: HeliosTransformer, moved: Moved) -> Iterator[Destination]:
        """Where stored tensors go once memory is there, without those of which this rank holds nothing."""


@dataclass(frozen=True)
class Replicated:
    """All weights on every rank. The ranks of `ffn_tp` share the hidden features of the feed-forward layers."""

    ffn_tp: Group = ALONE
    takes_quantised: ClassVar[bool] = True

    def shrink(self, model: HeliosTransformer, device: torch.device) -> None:
        narrow_feed_forward(model, self.ffn_tp)

    def destinations(self, model: HeliosTransformer, moved: Moved) -> Iterator[Destination]:
        parts = feed_forward_parts(model, self.ffn_tp)
        for path, module in model.named_modules():
            for kind, parameter in module.named_parameters(recurse=False):
                tensor = moved.get(f"{path}.{kind}", parameter).detach()
                names = stored_names(path, module, kind)
                height = tensor.shape[0] // len(names)
                for index, name in enumerate(names):
                    rows = slice(index * height, (index + 1) * height)
                    if is_quantised(tensor):
                        memory = {component: values[rows] for component, values in components(tensor).items()}
                    else:
                        memory = tensor[rows]
                    yield Destination(name, parts.get(name, ()), memory)


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
