"""Tensors as NumPy arrays, which Ray puts into shared memory and reads back without a copy."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from helios_cp.sampling.state import ChunkState


@dataclass(frozen=True)
class Array:
    """A tensor's numbers; bfloat16, which NumPy does not know, as 16-bit integers of the same bits."""

    values: np.ndarray
    dtype: str

    @classmethod
    def of(cls, tensor: Tensor) -> Array:
        tensor = tensor.detach().cpu().contiguous()
        bits = tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor
        return cls(bits.numpy(), str(tensor.dtype).removeprefix("torch."))

    def tensor(self) -> Tensor:
        """The tensor, on the CPU and in the array's own memory: after a journey it is read-only."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            bits = torch.from_numpy(self.values)
        dtype = getattr(torch, self.dtype)
        return bits if bits.dtype == dtype else bits.view(dtype)


@dataclass(frozen=True)
class StateArrays:
    """A `ChunkState` on its way."""

    index: int
    arrays: dict[str, Array]

    @classmethod
    def of(cls, state: ChunkState) -> StateArrays:
        return cls(state.index, {name: Array.of(tensor) for name, tensor in state.to_tensors().items()})

    def state(self, device: torch.device) -> ChunkState:
        tensors = {name: array.tensor() for name, array in self.arrays.items()}
        return ChunkState.from_tensors(self.index, tensors, device)
