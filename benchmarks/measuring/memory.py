"""Bytes of the tensors that a program makes and holds at one time, counted exactly on any device."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class LiveMemory(TorchDispatchMode):
    """Follows `live_bytes` and `peak_bytes` of what operations inside a `with` block allocate.

    What exists before, such as weights and inputs, does not count, nor does a view or an update in place. Scratch space
    inside a kernel, and an allocator's rounding, are not seen. Raises `RuntimeError` under `torch.inference_mode()`,
    where composite operations come in whole, their intermediate tensors unseen; `torch.no_grad()` is the mode to use.

    The count is exact where one thread runs the program. A thread of gloo's lets go of a buffer now or a moment later,
    so that a collective's peak is better counted on meta tensors, see `benchmarks.ranks.silent`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        # By a number of its own for each: a sum kept by += would be wrong once two threads free at the same time.
        self._live: dict[int, int] = {}
        self._allocations = 0
        self._known = WeakIdKeyDictionary(ref_type=weakref.ref)

    @property
    def live_bytes(self) -> int:
        return sum(list(self._live.values()))

    def __enter__(self) -> LiveMemory:
        if torch.is_inference_mode_enabled():
            raise RuntimeError("LiveMemory sees too little under torch.inference_mode(); use torch.no_grad()")
        return super().__enter__()

    def __torch_dispatch__(self, function: OpOverload, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for storage in _storages((args, kwargs)):
            self._known[storage] = None
        result = function(*args, **kwargs)
        for storage in _storages(result):
            if storage not in self._known:
                self._known[storage] = None
                self._allocate(storage)
        return result

    def _allocate(self, storage: torch.UntypedStorage) -> None:
        self._allocations += 1
        self._live[self._allocations] = storage.nbytes()
        # A storage is one Python object for as long as the memory lives, whichever tensors come and go over it.
        weakref.finalize(storage, self._live.pop, self._allocations).atexit = False
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


def _storages(values) -> list[torch.UntypedStorage]:
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor)]
