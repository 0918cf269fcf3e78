"""Bytes on a device and on the host: how many are held, how many are free, and how PyTorch's allocator takes them."""

from __future__ import annotations

import contextlib
import os
import resource
import weakref

import torch
from torch import Tensor

MARGIN = 1.1
"""Free memory lies in pieces, so work must have this factor more than it needs."""


def allocated_memory(device: torch.device) -> int:
    """Bytes of live tensors, as PyTorch's allocator counts them; 0 on a CPU, where nothing counts them."""
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    return 0 if device.type == "cpu" else torch.accelerator.memory_allocated(device)


def free_memory(device: torch.device) -> int:
    """Bytes that PyTorch could still allocate on a CUDA card; 0 elsewhere, because nobody can tell."""
    if device.type != "cuda":
        return 0
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def free_host_memory() -> int:
    """Bytes that programs could still get without swapping, as Linux estimates them; elsewhere half of the memory."""
    try:
        with open("/proc/meminfo") as file:
            line = next(line for line in file if line.startswith("MemAvailable:"))
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return int(line.split()[1]) * 1024


def peak_memory(device: torch.device) -> int:
    """Most bytes held at once: of the device by PyTorch's allocator, of the process on a CPU.

    mps counts no peak. There this is what the driver has given to PyTorch, which keeps it, so it rarely falls.
    """
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return torch.accelerator.max_memory_allocated(device)


def reset_peak_memory(device: torch.device) -> None:
    """Count the peak from now on, where one is counted that can be reset: not on cpu and mps."""
    if device.type not in ("cpu", "mps"):
        torch.accelerator.reset_peak_memory_stats(device)


def grow_segments(device: torch.device) -> None:
    """Have PyTorch's allocator grow its pieces of a CUDA card's memory from now on, in place of adding more.

    The next part of a model can then use in one piece what another part freed in many. Settings that the user gave, by
    PYTORCH_ALLOC_CONF or PYTORCH_CUDA_ALLOC_CONF, stay. This calls a private function, because PyTorch reads the
    variables before a resumed run knows its flags, and has no public name for a later change.
    """
    if device.type == "cuda" and not _allocator_settings():
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def _allocator_settings() -> str:
    if hasattr(torch._C, "_accelerator_getAllocatorSettings"):
        return torch._C._accelerator_getAllocatorSettings()
    found = torch.cuda.memory._snapshot()["allocator_settings"]
    return found.get("PYTORCH_CUDA_ALLOC_CONF") or found.get("PYTORCH_ALLOC_CONF", "")


def pin(memory: Tensor, device: torch.device) -> int:
    """Let a CUDA card copy from host memory `[N]`, whole pages of uint8, while that lives; returns CUDA's error or 0.

    CUDA reports a failure once more to whoever asks next. PyTorch asks after each kernel and would blame that kernel.
    So this launches a kernel that nobody needs, to take the blame.
    """
    runtime = torch.cuda.cudart()
    with torch.cuda.device(device):  # else the context of another card could be made for it
        failure = int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if failure:
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device=device)
    else:
        weakref.finalize(memory, runtime.cudaHostUnregister, memory.data_ptr()).atexit = False
    return failure


class MemoryMeter:
    """Bytes that work takes on a device beyond those held when it begins, as PyTorch's allocator counts them.

    It measures one piece of work at a time. On a CPU it counts nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held = self._before = 0

    def begin(self) -> None:
        self._before = self.largest
        reset_peak_memory(self.device)
        self._held = allocated_memory(self.device)

    def needed(self) -> int:
        """Most bytes since `begin`, beside those held then."""
        return peak_memory(self.device) - self._held

    @property
    def largest(self) -> int:
        """Most bytes held at once so far. Each `begin` resets PyTorch's own peak, so this remembers the ones before."""
        return max(self._before, peak_memory(self.device))

    def free(self) -> int | None:
        """Bytes that PyTorch could still allocate; `None` where nobody can tell."""
        return free_memory(self.device) if self.device.type == "cuda" else None
