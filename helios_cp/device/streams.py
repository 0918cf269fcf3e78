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
    """The tensor on a device. From the host it goes through pinned memory, so that the host need not wait for it."""
    if tensor.device.type != "cpu" or not has_streams(device):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """A copy in pinned host memory, whole once a later mark is reached; where there are no streams, whole at once.

    torch keeps pinned memory that nothing uses any more, so that later copies of this size take it over. It does so
    only when the copy itself is done, even where its result was dropped before.
    """
    if not has_streams(tensor.device):
        return tensor.cpu()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


class Pace:
    """Keeps the host one step ahead of the device and no more.

    Without it the host could queue a whole chunk in a moment: what it says of steps would not be true, a stop would
    come late, and frames that are ready would wait. The device still always has a step to go on with.
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
