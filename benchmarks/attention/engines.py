"""How fast the attention engines of one rank are, each beside a large matrix product timed in turns with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring.product import Product
from benchmarks.measuring.timing import Timing, interleave
from helios_cp.device.device import dtype_name
from parallel.attention import ENGINES, attend, attend_with_lse, unavailable

PRODUCT = "product"


@dataclass(frozen=True)
class Shape:
    """Attention of all tokens to all tokens."""

    tokens: int
    heads: int
    head_dim: int = 128

    @property
    def flops(self) -> int:
        """Of the two products, a multiply-add being two."""
        return 4 * self.heads * self.head_dim * self.tokens**2


# Of two cores; the last stage of Helios-14B at 384 × 640 has 11040 tokens and 40 heads, of which Ulysses over 2, 4 and
# 8 ranks leaves a rank 20, 10 and 5.
ON_CPU = tuple(Shape(tokens, heads=4) for tokens in (512, 1024, 2048))
ON_GPU = (*(Shape(tokens, heads=40) for tokens in (2940, 4560, 11040)), *(Shape(11040, heads) for heads in (20, 10, 5)))
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16, torch.float16, torch.float32)}


@dataclass(frozen=True)
class EngineTimes:
    """One engine at one shape and dtype, with or without the log-sum-exp that a ring needs.

    `difference` is the largest from the native engine in fp32, in units of that one's range; `product_rate` the FLOP/s
    of a large matrix product in the same dtype and turns.
    """

    engine: str
    gives_lse: bool
    shape: Shape
    dtype: torch.dtype
    timing: Timing
    difference: float
    product_rate: float

    @property
    def rate(self) -> float:
        """FLOP/s."""
        return self.shape.flops / self.timing.median

    def to_json(self) -> dict[str, Any]:
        return {
            "engine": self.engine,
            "log-sum-exp": self.gives_lse,
            "tokens": self.shape.tokens,
            "heads": self.shape.heads,
            "head dim": self.shape.head_dim,
            "dtype": dtype_name(self.dtype),
            "flops": self.shape.flops,
            "flops_per_second": self.rate,
            "product_flops_per_second": self.product_rate,
            "share_of_product": self.rate / self.product_rate,
            "difference": self.difference,
            **self.timing.to_json(),
        }


def absent_engines(device: torch.device) -> dict[str, str]:
    """Engines that cannot run here at all, and why."""
    reasons = {engine: [unavailable(engine, device, dtype) for dtype in DTYPES[device.type]] for engine in ENGINES}
    return {engine: why[0] for engine, why in reasons.items() if all(why)}


def time_engines(shapes: Sequence[Shape], device: torch.device, repeats: int) -> Iterator[EngineTimes]:
    """Every engine that runs on the device, at each shape and dtype, in turns with a product."""
    inner = 10 if device.type == "cuda" else 1  # calls a turn, where one is too short for the clock
    for shape in shapes:
        generator = torch.Generator(device).manual_seed(0)
        size = (1, shape.tokens, shape.heads, shape.head_dim)
        exact = [torch.randn(size, generator=generator, device=device) for _ in range(3)]
        reference = attend(*exact)
        for dtype in DTYPES[device.type]:
            product = Product(device, dtype)
            programs = engine_programs([tensor.to(dtype) for tensor in exact], device, dtype)
            outputs = {key: _out(program()) for key, program in programs.items()}
            timings = interleave(_repeated({PRODUCT: product, **programs}, inner), repeats, device)
            timings = {key: Timing(tuple(s / inner for s in timing.seconds)) for key, timing in timings.items()}
            rate = product.flops / timings[PRODUCT].median
            for key in programs:
                difference = (outputs[key].float() - reference).abs().max() / (reference.max() - reference.min())
                yield EngineTimes(*key, shape, dtype, timings[key], difference.item(), rate)


def engine_programs(
    tensors: Sequence[Tensor], device: torch.device, dtype: torch.dtype
) -> dict[tuple[str, bool], Callable[[], Any]]:
    """By engine and whether it gives the log-sum-exp."""
    engines = [engine for engine in ENGINES if unavailable(engine, device, dtype) is None]
    return {
        (engine, gives_lse): lambda engine=engine, function=function: function(*tensors, engine=engine)
        for engine in engines
        for gives_lse, function in ((False, attend), (True, attend_with_lse))
    }


def _repeated(programs: dict[Any, Callable[[], Any]], inner: int) -> dict[Any, Callable[[], None]]:
    def repeat(program: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(inner):
                program()

        return run

    return {key: repeat(program) for key, program in programs.items()}


def _out(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]
