"""Operations that make the host wait for a device, seen on PyTorch's meta device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")


class Crossings(TorchDispatchMode):
    """Names of the operations that read a number from a tensor, depend on its values, or join host and device.

    Copies count, as the host waits for one from its own memory, but for those that are only queued.
    """

    VALUES = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_linalg_check_errors", "masked_select")

    def __init__(self, found: list[str] | None = None) -> None:
        super().__init__()
        self.found: list[str] = [] if found is None else found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        tensors = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, Tensor)]
        reads = function.overloadpacket._qualified_op_name.removeprefix("aten::") in self.VALUES
        # A tensor without dims on the host goes into a kernel as a number.
        devices = {tensor.device for tensor in tensors if tensor.device == META or tensor.dim()}
        joins = len(devices) > 1 and not kwargs.get("non_blocking")
        if joins or (reads and META in {tensor.device for tensor in tensors}):
            self.found.append(str(function))
        return result
