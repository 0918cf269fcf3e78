"""Devices and dtypes by name."""

from __future__ import annotations

import resource

import torch

from helios_cp.config import RequestError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def pick_device(name: str) -> torch.device:
    """The named device, or the best present one for "auto". Raises `RequestError` if it is not there."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ModuleNotFoundError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise RequestError(f"--device {name}: not usable here ({reason}); use cpu, or auto for the best") from None
    if device.type == "meta":
        raise RequestError("--device meta: it holds no data; use cpu, or auto for the best")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The named dtype; "auto" is bfloat16 on an accelerator and float32 on a CPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def peak_memory(device: torch.device) -> int:
    """Most bytes held at once: of the device by PyTorch's allocator, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
