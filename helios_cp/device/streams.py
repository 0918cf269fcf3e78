"""Work that runs on a device while the host goes on: streams, marks in them, and copies from and to the host."""

from __future__ import annotations

import torch
from torch import Tensor

from helios_cp.device.device import has_streams


def wait_for(device: torch.device) -> None:
    """Wait for what the current stream was given so far; work on other streams goes on."""
    if has_streams(device):
        torch.accelerator.current_stream(device).synchronize()
    elif device.type != "cpu":
        torch.accelerator.synchronize(device)


def mark(device: torch.device) -> torch.Event:
    """A mark behind all that the current stream of a device with streams was given so far."""
    event = torch.Event(device, enable_timing=True)
    event.record(torch.accelerator.current_stream(device))
    return event


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. From the host it goes through pinned memory, so the host does not wait for the copy."""
    if tensor.device.type != "cpu" or not has_streams(device):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """A copy in pinned host memory. It is complete once a later mark is reached; without streams, at once.

    torch gives unused pinned memory to later copies of the same size, and only after the copy itself is done.
    """
    if not has_streams(tensor.device):
        return tensor.cpu()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


class Pace:
    """Keeps the host one step ahead of the device and no more.

    Without it the host could queue a whole chunk in a moment. Its progress would be wrong, a stop would come late, and
    finished frames would wait. One step ahead is enough to keep the device busy.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._last: torch.Event | None = None

    def step(self) -> None:
        """A step was queued; waits for the one before it."""
        if not has_streams(self.device):
            return
        before, self._last = self._last, mark(self.device)
        if before is not None:
            before.synchronize()
