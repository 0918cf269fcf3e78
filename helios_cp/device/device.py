"""Devices by name: which there are, what they can do, and which one a rank uses.

cpu and cuda are tested. mps, xpu and npu (of the package torch_npu) go through the same generic interface of torch and
are untested. Code that only CUDA can run, such as graphs and NCCL, names CUDA itself. Nothing autocasts, because the
model writes out every rounding. Random numbers come from CPU generators, so every device starts from the same noise.
"""

from __future__ import annotations

import importlib
import platform

import torch

from helios_cp.config.checkpoint import DTYPES
from helios_cp.config.errors import RequestError

KINDS = ("cpu", "cuda", "mps", "xpu", "npu")
TESTED = ("cpu", "cuda")
CARDS = ("cuda", "xpu", "npu")
"""Kinds of which a machine can have several, each with streams of work."""
WITHOUT_FLOAT64 = ("mps", "npu")


def pick_device(name: str) -> torch.device:
    """The named device, or the best present one for "auto". Raises `RequestError` if it is not there."""
    kind = name.partition(":")[0]
    if kind == "npu":
        _import_npu(name)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    allowed = ["auto", "cpu"]
    if accelerator is not None:
        allowed += [accelerator.type, *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()))]
    if name not in allowed:
        reason = "not present" if kind in KINDS else f"no kind of device (those are {', '.join(KINDS)})"
        raise RequestError(f"--device {name}: {reason}; allowed here are {', '.join(allowed)}")
    return torch.device(name)


def _import_npu(name: str) -> None:
    """Load the package that tells torch of Ascend cards, because some installations of torch do not load it."""
    try:
        importlib.import_module("torch_npu")
    except Exception as error:  # without its drivers it fails in ways of its own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise RequestError(
            f"--device {name}: it needs the package torch_npu, whose import fails ({reason}); install the one for this "
            f"torch {torch.__version__}, or use --device cpu"
        ) from None


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The named dtype; "auto" is bfloat16 where an accelerator has it, else float32. Raises `RequestError`."""
    if name == "auto":
        is_old_mac = device.type == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0)
        return torch.float32 if device.type == "cpu" or is_old_mac else torch.bfloat16
    if name not in DTYPES:
        raise RequestError(f"--dtype {name}: allowed are {', '.join(DTYPES)} and auto")
    return getattr(torch, name)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def has_float64(device: torch.device) -> bool:
    return device.type not in WITHOUT_FLOAT64


def has_streams(device: torch.device) -> bool:
    """Whether work can run beside other work on the device."""
    return device.type in CARDS


def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a CUDA card; `None` for any other device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def has_tf32(device: torch.device) -> bool:
    """Whether convolutions in fp32 can run on TF32 tensor cores: CUDA cards from Ampere on."""
    found = capability(device)
    return found is not None and found >= (8, 0)


def device_name(device: torch.device) -> str:
    """For a reader: the name of the card, or what the CPU is."""
    if device.type in CARDS:
        return torch.get_device_module(device).get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def card_of_rank(device: torch.device, local_rank: int) -> torch.device:
    """One card a rank, in turn, where the device has several and none is named."""
    if device.index is not None or device.type not in CARDS:
        return device
    return torch.device(device.type, local_rank % card_count(device))


def card_count(device: torch.device) -> int:
    """Devices of this kind on the machine."""
    return 1 if device.type == "cpu" else torch.get_device_module(device).device_count()


def make_current(device: torch.device) -> None:
    """Make this device the one for whatever names no index, such as a communicator."""
    if device.index is not None and device.type != "cpu":
        torch.accelerator.set_device_index(device)
