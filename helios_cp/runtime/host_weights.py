"""Weights that rest in host memory, laid end to end, and are brought to a device by one copy.

A parameter is a view of the same device memory for good; only the content of that memory changes. So compiled code sees
the same tensors whenever a layer runs. Quantised weights, which consist of several tensors, need no special care.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass, transform_subclass

from helios_cp.device.memory import free_host_memory, pin

ALIGNMENT = 256  # bytes, as CUDA's allocator gives; kernels may count on 16
PAGE = 4096


@dataclass(frozen=True)
class Place:
    """A parameter or buffer by the module that holds it."""

    module: nn.Module
    name: str

    @property
    def tensor(self) -> Tensor:
        return getattr(self.module, self.name)


def places(modules: Iterable[nn.Module], without: Iterable[Tensor] = ()) -> list[Place]:
    """All parameters and buffers of some modules and their children, each tensor once."""
    seen = {id(tensor) for tensor in without}
    found = []
    for module in itertools.chain.from_iterable(module.modules() for module in modules):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                found.append(Place(module, name))
    return found


def tensors_at(found: Iterable[Place]) -> list[Tensor]:
    return [place.tensor for place in found]


class HostWeights:
    """Tensors moved into one piece of host memory, pinned where the device is a CUDA card.

    `bind` makes them views of device memory, after which their values are whatever is copied there.
    """

    def __init__(self, found: Iterable[Place], device: torch.device) -> None:
        self.places = list(found)
        plain = [part for place in self.places for part in _parts(place.tensor)]
        sizes = [_aligned(part) for part in plain]
        self._offsets = list(itertools.accumulate(sizes, initial=0))
        self.nbytes = self._offsets.pop()
        self.memory = _host_memory(self.nbytes, device)
        for part, offset in zip(plain, self._offsets, strict=True):
            _view(self.memory, offset, part).copy_(part)

    def bind(self, memory: Tensor) -> None:
        """Make the tensors views of the first `nbytes` bytes of `memory` `[N]`, uint8, on the device."""
        for place, tensor in self._tensors(memory):
            if torch._has_compatible_shallow_copy_type(place.tensor, tensor) and not _is_composite(tensor):
                place.tensor.data = tensor
            elif place.name in place.module._parameters:
                place.module._parameters[place.name] = nn.Parameter(tensor, requires_grad=False)
            else:
                place.module._buffers[place.name] = tensor

    def stored(self) -> Iterator[tuple[Place, Tensor]]:
        """Where each tensor rests on the host; what is written there is what comes to the device next."""
        return self._tensors(self.memory)

    def _tensors(self, memory: Tensor) -> Iterator[tuple[Place, Tensor]]:
        offsets = iter(self._offsets)
        for place in self.places:
            yield place, _rebuilt(place.tensor, lambda part: _view(memory, next(offsets), part))


def _is_composite(tensor: Tensor) -> bool:
    """Whether it is made of other tensors, as one that is quantised."""
    return is_traceable_wrapper_subclass(tensor)


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor is made of: those inside, or itself."""
    if not _is_composite(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, name))


def _rebuilt(tensor: Tensor, replace: Callable[[Tensor], Tensor]) -> Tensor:
    """The same kind of tensor with its plain tensors replaced, in the order of `_parts`."""
    if not _is_composite(tensor):
        return replace(tensor)
    return transform_subclass(tensor, lambda _, inner: _rebuilt(inner, replace))


def _view(memory: Tensor, offset: int, like: Tensor) -> Tensor:
    """Part of `memory` as a tensor like another, its order of elements in memory included, if it fills its place."""
    flat = memory[offset : offset + like.numel() * like.element_size()].view(like.dtype)
    return flat.as_strided(like.shape, torch.empty_like(like, device="meta").stride())


def packed_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors laid end to end."""
    return sum(_aligned(part) for tensor in tensors for part in _parts(tensor))


def _aligned(part: Tensor) -> int:
    return -(-part.numel() * part.element_size() // ALIGNMENT) * ALIGNMENT


def _host_memory(size: int, device: torch.device) -> Tensor:
    """`[size]` bytes that a copy engine can read.

    PyTorch rounds its own pinned memory up to a power of two: 40 GB for the 24 GB of these blocks. This memory is
    registered as it is. It has pages of its own, because no page can be registered twice.
    """
    if device.type != "cuda" or not size:
        return torch.empty(size, dtype=torch.uint8)
    pages = -(-size // PAGE) * PAGE
    whole = torch.empty(pages + PAGE, dtype=torch.uint8)
    first = -whole.data_ptr() % PAGE
    memory = whole[first : first + pages]
    if failure := pin(memory, device):
        warnings.warn(
            f"{pages / 1e9:.1f} GB of host memory cannot be pinned (CUDA error {failure}; "
            f"{free_host_memory() / 1e9:.1f} GB are free): offloading will be slow",
            stacklevel=2,
        )
    return memory
