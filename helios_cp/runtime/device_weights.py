"""Weights that rest on the host, on the device where they work: as a whole, or layer by layer in two buffers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from helios_cp.device.device import has_streams
from helios_cp.runtime.host_weights import HostWeights

SLOTS = 2


class Copies:
    """Copies beside the computation, on a stream of the device's own. Without streams they take turns with it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.Stream(device) if has_streams(device) else None

    def start(self, target: Tensor, source: Tensor) -> torch.Event | None:
        """Copy after all that has been computed so far; returns a ticket. The host does not wait for a stream."""
        if self.stream is None:
            target.copy_(source)
            return None
        self.stream.wait_stream(torch.accelerator.current_stream(self.device))
        with self.stream:
            target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def wait(self, ticket: torch.Event | None) -> None:
        """What is computed from now on sees the copy."""
        if ticket is not None:
            torch.accelerator.current_stream(self.device).wait_event(ticket)


class DeviceMemory:
    """Bytes on a device, given back and taken anew while tensors stay views of them. Counted in `counter`.

    On a CPU there is nothing to save, and reading a view of freed memory would end the process. So there the bytes are
    kept, and filled with NaN.
    """

    def __init__(self, size: int, device: torch.device, counter: MemoryCounter) -> None:
        self.size = size
        self.tensor = torch.empty(size, dtype=torch.uint8, device=device)
        self.counter = counter
        self._is_held = True
        counter.add(size)

    def take(self) -> None:
        if not self._is_held:
            if self.tensor.device.type != "cpu":
                self.tensor.untyped_storage().resize_(self.size)
            self._is_held = True
            self.counter.add(self.size)

    def give_back(self) -> None:
        """To PyTorch's allocator; nobody may read a view then."""
        if self._is_held:
            if self.tensor.device.type != "cpu":
                self.tensor.untyped_storage().resize_(0)
            else:
                self.tensor.fill_(255)  # not a number, in every dtype of floats
            self._is_held = False
            self.counter.add(-self.size)


@dataclass
class MemoryCounter:
    """Bytes of weights on the device, now and at most; and how often each piece of weights was brought."""

    bytes: int = 0
    peak_bytes: int = 0
    brought: Counter[int] = field(default_factory=Counter)

    def add(self, size: int) -> None:
        self.bytes += size
        self.peak_bytes = max(self.peak_bytes, self.bytes)


class Resident:
    """Weights that are on the device as a whole, or not at all."""

    def __init__(self, weights: HostWeights, device: torch.device, counter: MemoryCounter) -> None:
        self.weights = (weights,)
        self.device_bytes = weights.nbytes
        self._memory = DeviceMemory(weights.nbytes, device, counter)
        weights.bind(self._memory.tensor)
        self._memory.give_back()

    def enter(self) -> None:
        self._memory.take()
        self._memory.tensor.copy_(self.weights[0].memory[: self.device_bytes], non_blocking=True)
        self._memory.counter.brought[id(self.weights[0])] += 1

    def leave(self) -> None:
        self._memory.give_back()


class Streamed:
    """Weights of layers that run one after the other, in two buffers. Each layer always uses the same buffer.

    `following[i]` is the layer that most likely runs after layer i; it is brought while layer i computes. Any other
    order gives the same results, but waits.
    """

    def __init__(
        self,
        weights: Sequence[HostWeights],
        following: Sequence[int],
        device: torch.device,
        counter: MemoryCounter,
        copies: Copies,
    ) -> None:
        self.weights = tuple(weights)
        self.following = tuple(following)
        self.copies = copies
        self.counter = counter
        self._slots = []
        for slot in range(SLOTS):
            own = self.weights[slot::SLOTS]
            memory = DeviceMemory(max((each.nbytes for each in own), default=0), device, counter)
            for each in own:
                each.bind(memory.tensor)
            memory.give_back()
            self._slots.append(memory)
        self.device_bytes = sum(slot.size for slot in self._slots)
        self._content: list[tuple[int, object] | None] = [None] * SLOTS

    def enter(self) -> None:
        for slot in self._slots:
            slot.take()

    def leave(self) -> None:
        for slot, content in enumerate(self._content):
            if content is not None:
                self.copies.wait(content[1])  # else memory would go to others while it is still written to
                self._content[slot] = None
        for slot in self._slots:
            slot.give_back()

    def fetch(self, layer: int) -> None:
        """What is computed from now on finds the layer's weights in place; all layers before have been computed."""
        self._bring(layer)
        self.copies.wait(self._content[layer % SLOTS][1])
        following = self.following[layer]
        if following % SLOTS != layer % SLOTS:
            self._bring(following)

    def _bring(self, layer: int) -> None:
        slot = layer % SLOTS
        if self._content[slot] is None or self._content[slot][0] != layer:
            self._content[slot] = None  # should the copy fail
            source = self.weights[layer].memory[: self.weights[layer].nbytes]
            ticket = self.copies.start(self._slots[slot].tensor[: len(source)], source)
            self._content[slot] = layer, ticket
            self.counter.brought[id(self.weights[layer])] += 1
