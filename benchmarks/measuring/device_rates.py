"""What the device itself reaches: large matrix products, attention, and copies of memory."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

WARMUP, REPEATS = 3, 9


def seconds_of(
    program: Callable[[], Any], device: torch.device, repeats: int = REPEATS, inner: int = 1, warmup: int = WARMUP
) -> float:
    """Median seconds of a call, of `repeats` timed groups of `inner` calls, after `warmup` such groups."""
    times = []
    for turn in range(warmup + repeats):
        wait(device)
        start = time.perf_counter()
        for _ in range(inner):
            program()
        wait(device)
        if turn >= warmup:
            times.append((time.perf_counter() - start) / inner)
    return statistics.median(times)


def wait(device: torch.device) -> None:
    """Until the device has finished what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether matrix products in fp32 may run on TF32 tensor cores, inside."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOP/s of a square product of random matrices, by default one that is large for the kind of device."""
    size = size or default_size(device)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / seconds_of(lambda: torch.mm(a, b, out=out), device, inner=_inner(device))


def fp8_matmul_rate(device: torch.device, size: int | None = None) -> float:
    """As `matmul_rate` in e4m3 with a scale a row, the result in bf16. Raises `RuntimeError` where the card cannot."""
    size = size or default_size(device)
    a, b = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    rows, columns = (torch.ones(shape, device=device) for shape in ((size, 1), (1, size)))

    def product() -> torch.Tensor:
        return torch._scaled_mm(a, b.t(), rows, columns, out_dtype=torch.bfloat16, use_fast_accum=True)

    return 2 * size**3 / seconds_of(product, device, inner=_inner(device))


def attention_rate(device: torch.device, dtype: torch.dtype, tokens: int, heads: int, head_dim: int) -> float:
    """FLOP/s of `F.scaled_dot_product_attention` of all tokens to all tokens."""
    q, k, v = (torch.randn(1, heads, tokens, head_dim, device=device, dtype=dtype) for _ in range(3))
    flops = 4 * tokens * tokens * heads * head_dim
    return flops / seconds_of(lambda: F.scaled_dot_product_attention(q, k, v), device, inner=_inner(device))


def copy_bandwidth(device: torch.device, size: int | None = None) -> float:
    """Bytes/s read and written by a copy of `size` bytes in the device's memory."""
    size = size or (2**31 if device.type == "cuda" else 2**27)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: target.copy_(source), device, inner=_inner(device))


def host_bandwidth(device: torch.device, size: int = 2**28) -> float:
    """Bytes/s from the device's memory to pinned host memory."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    return size / seconds_of(lambda: target.copy_(source, non_blocking=True), device)


def default_size(device: torch.device) -> int:
    """Rows of a product that takes milliseconds, long enough for the clock."""
    return 8192 if device.type == "cuda" else 1024


def _inner(device: torch.device) -> int:
    return 10 if device.type == "cuda" else 1
