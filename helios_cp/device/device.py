"""Devices by name, and what every kind of them is asked: streams, memory, dtypes, cards.

cpu and cuda are tested. mps, xpu and npu (of the package torch_npu) go through the same generic interface of torch,
untested. What only CUDA has, such as graphs and NCCL, names it where it is. Nothing autocasts, for the model writes out
every rounding; and random numbers come from CPU generators, so that every device starts from the same noise.
"""

from __future__ import annotations

import contextlib
import importlib
import platform
import resource
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from helios_cp.config.checkpoint import DTYPES
from helios_cp.config.errors import RequestError
from helios_cp.config.execution import Target

KINDS = ("cpu", "cuda", "mps", "xpu", "npu")
TESTED = ("cpu", "cuda")
WITH_STREAMS = ("cuda", "xpu", "npu")
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
    """torch learns of Ascend cards from this package, which some installations of torch do not load by themselves."""
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
        return torch.bfloat16 if device.type != "cpu" and has_bfloat16(device) else torch.float32
    if name not in DTYPES:
        raise RequestError(f"--dtype {name}: allowed are {', '.join(DTYPES)} and auto")
    return getattr(torch, name)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def has_bfloat16(device: torch.device) -> bool:
    """Apple's GPUs know it from macOS 14 on."""
    return device.type != "mps" or torch.backends.mps.is_macos_or_newer(14, 0)


def has_float64(device: torch.device) -> bool:
    return device.type not in WITHOUT_FLOAT64


def has_streams(device: torch.device) -> bool:
    """Whether work can run beside other work on the device."""
    return device.type in WITH_STREAMS


def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a CUDA card; `None` for any other device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def target(kind: str) -> Target:
    """The device of a kind on this machine, for a machine that has none to check a call for it."""
    return Target(kind, capability(torch.device(kind)))


def has_tf32(device: torch.device) -> bool:
    """Whether convolutions in fp32 can run on TF32 tensor cores: CUDA cards from Ampere on."""
    found = capability(device)
    return found is not None and found >= (8, 0)


def device_name(device: torch.device) -> str:
    """For a reader: the name of the card, or what the CPU is."""
    if device.type in ("cuda", "xpu", "npu"):
        return torch.get_device_module(device).get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def card_of_rank(device: torch.device, local_rank: int) -> torch.device:
    """One card a rank, in turn, where the device has several and none is named."""
    if device.index is not None or device.type not in ("cuda", "xpu", "npu"):
        return device
    return torch.device(device.type, local_rank % card_count(device))


def card_count(device: torch.device) -> int:
    """Devices of this kind on the machine."""
    return 1 if device.type == "cpu" else torch.get_device_module(device).device_count()


def make_current(device: torch.device) -> None:
    """What names no index, such as a communicator, goes to this device from now on."""
    if device.index is not None and device.type != "cpu":
        torch.accelerator.set_device_index(device)


def wait_for(device: torch.device) -> None:
    """Wait for what the current stream was given so far; work on other streams goes on."""
    if has_streams(device):
        torch.accelerator.current_stream(device).synchronize()
    elif device.type != "cpu":
        torch.accelerator.synchronize(device)


def allocated_memory(device: torch.device) -> int:
    """Bytes of live tensors, by PyTorch's allocator; 0 on a CPU, where nothing counts them."""
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    return 0 if device.type == "cpu" else torch.accelerator.memory_allocated(device)


def free_memory(device: torch.device) -> int:
    """Bytes that PyTorch could still allocate on a CUDA card; 0 elsewhere, where there is no telling."""
    if device.type != "cuda":
        return 0
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def free_host_memory() -> int:
    """Bytes that programs could still get without swapping, as Linux estimates them."""
    with open("/proc/meminfo") as file:
        line = next(line for line in file if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def grow_segments(device: torch.device) -> None:
    """Have PyTorch's allocator grow its pieces of a CUDA card's memory from now on, in place of adding more.

    What one part of a model frees in pieces then serves the next as a whole. Nothing changes where the allocator was
    given settings already, as by PYTORCH_ALLOC_CONF or PYTORCH_CUDA_ALLOC_CONF. They can be changed while it works, but
    PyTorch has no public name for that; the variables are read too early for what a resumed run says.
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

    A failed call leaves its error for whoever asks CUDA next, and PyTorch asks after the next kernel: that would be
    blamed for it. So a kernel that nobody needs is launched to that end.
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


def peak_memory(device: torch.device) -> int:
    """Most bytes held at once: of the device by PyTorch's allocator, of the process on a CPU.

    mps counts no peak: there it is what the driver has given, which PyTorch keeps for itself and so rarely falls.
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


class SideStream:
    """A stream beside the current one of a device. Its marks are of the stream that is current, which may be itself."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.Stream(device)

    def mark(self) -> torch.Event:
        return mark(self.device)

    @contextmanager
    def after(self, mark: torch.Event | None, *inputs: Tensor) -> Iterator[None]:
        """What is launched inside runs on the side stream once `mark` is reached, at once without one.

        `inputs` are tensors of the current stream that it reads: their memory is given to nobody else before it has.
        """
        if mark is not None:
            self.stream.wait_event(mark)
        for tensor in inputs:
            tensor.record_stream(self.stream)
        with self.stream:
            yield

    def to_host(self, tensor: Tensor) -> Tensor:
        return to_host(tensor)
