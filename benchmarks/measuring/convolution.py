"""A large convolution, as a video VAE has them: what the device computes at most in these, timed in turns with it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from helios_cp.model.codec import convolution_tf32

CHANNELS, FRAMES = 192, 6
PIXELS_ON_CPU, PIXELS_ON_CARD = 64, 256
"""To a side of a frame."""


class Convolution:
    """3 × 3 × 3 on random frames, channels last, `times` in a row; `flops` of one call.

    It is beside `Product` because libraries differ: on an AMD CPU PyTorch's convolutions reach twice the FLOP/s of its
    products.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, times: int = 1, tf32_allowed: bool = False) -> None:
        size = PIXELS_ON_CPU if device.type == "cpu" else PIXELS_ON_CARD
        self.times = times
        self.flops = times * 2 * 27 * CHANNELS**2 * (FRAMES - 2) * (size - 2) ** 2
        self.tf32_allowed = tf32_allowed
        shapes = (1, CHANNELS, FRAMES, size, size), (CHANNELS, CHANNELS, 3, 3, 3)
        self._frames, self._weight = (
            torch.randn(shape, device=device, dtype=dtype).to(memory_format=torch.channels_last_3d) for shape in shapes
        )

    def __call__(self) -> None:
        with convolution_tf32(self.tf32_allowed):
            for _ in range(self.times):
                F.conv3d(self._frames, self._weight)
