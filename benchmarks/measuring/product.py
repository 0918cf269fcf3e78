"""A large matrix product: what the device computes at most, timed in turns with what is compared with it."""

from __future__ import annotations

import torch

from benchmarks.measuring.device_rates import default_size, tf32


class Product:
    """Square products of random matrices, `times` in a row; `flops` of one call. `tf32_allowed` is for fp32 on CUDA.

    Between ranks that wait for each other one alone is too short: a core that slept starts slowly.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, times: int = 1, tf32_allowed: bool = False) -> None:
        size = default_size(device)
        self.times = times
        self.flops = times * 2 * size**3
        self.tf32_allowed = tf32_allowed
        self._factors = [torch.randn(size, size, device=device, dtype=dtype) for _ in range(2)]
        self._out = torch.empty_like(self._factors[0])

    def __call__(self) -> None:
        with tf32(self.tf32_allowed):
            for _ in range(self.times):
                torch.mm(*self._factors, out=self._out)
