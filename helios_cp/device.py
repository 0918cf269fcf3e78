"""Devices and dtypes by name."""

from __future__ import annotations

import resource

import torch

from helios_cp.config import DTYPES, RequestError


def pick_device(name: str) -> torch.device:
    """The named device, or the best present one for "auto". Raises `RequestError` if it is not there."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    allowed = ["auto", "cpu"]
    if accelerator is not None:
        allowed += [accelerator.type, *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()))]
    if name not in allowed:
        raise RequestError(f"--device {name}: not present; allowed here are {', '.join(allowed)}")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The named dtype; "auto" is bfloat16 on an accelerator and float32 on a CPU. Raises `RequestError`."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise RequestError(f"--dtype {name}: allowed are {', '.join(DTYPES)} and auto")
    return getattr(torch, name)


def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a CUDA card; `None` for any other device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def peak_memory(device: torch.device) -> int:
    """Most bytes held at once: of the device by PyTorch's allocator, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
