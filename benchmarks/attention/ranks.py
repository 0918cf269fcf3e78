"""Ulysses, ring and unified attention over several ranks, against one rank, and what they lose to messages.

The functions here run on every rank of one world at once, in step.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.attention.engines import Shape
from benchmarks.measuring.product import Product
from benchmarks.measuring.timing import Timing, interleave
from benchmarks.ranks.groups import axis_group, in_step, nothing, rank_device
from parallel.attention import attend
from parallel.collectives import Meter
from parallel.mesh import Degrees
from parallel.segments import split
from parallel.unified import unified_attention

ON_CPU, ON_GPU = Shape(2048, heads=8), Shape(11040, heads=40)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the output's range; bf16 keeps 8 bits
WARMUP = 2
PRODUCTS = 8  # in a row, about as long as an attention
ONE_RANK = "1 rank"


@dataclass(frozen=True)
class Case:
    """One attention, and the numbers of ranks to share it among."""

    shape: Shape
    ranks: tuple[int, ...]
    dtype: torch.dtype
    device_type: str = "cpu"


@dataclass(frozen=True)
class RankTimes:
    """As one rank sees them, by program; `traffic` is (collectives, bytes sent) of the rank in one call."""

    timings: dict[str, Timing]
    traffic: dict[str, tuple[int, int]]
    product_flops: int


def algorithms(ranks: int) -> dict[str, Degrees]:
    """Ulysses, ring, and every grid of both."""
    grids = [Degrees(ring=ranks // ulysses, ulysses=ulysses) for ulysses in range(ranks, 0, -1) if ranks % ulysses == 0]
    return {name_of(degrees): degrees for degrees in grids}


def name_of(degrees: Degrees) -> str:
    if degrees.ring == 1:
        return f"Ulysses {degrees.ulysses}"
    return f"ring {degrees.ring}" if degrees.ulysses == 1 else f"unified {degrees.ulysses} × {degrees.ring}"


def shares_at_once(ranks: int) -> str:
    """The heads of an attention shared out among ranks, without any message: the limit of the machine."""
    return f"{ranks} shares at once"


def product_at_once(ranks: int) -> str:
    return "product" if ranks == 1 else f"product, {ranks} at once"


@torch.inference_mode()
def time_algorithms(rank: int, case: Case, repeats: int) -> RankTimes:
    """Times of all programs in turns, on the largest world of the case.

    Raises `RuntimeError` before timing if any algorithm's output is not that of one rank.
    """
    device = rank_device(case.device_type, rank)
    shape = case.shape
    generator = torch.Generator().manual_seed(0)
    whole = [
        torch.randn(1, shape.tokens, shape.heads, shape.head_dim, generator=generator).to(device, case.dtype)
        for _ in range(3)
    ]
    reference = attend(*whole)
    product = Product(device, case.dtype, PRODUCTS)
    programs: dict[str, Callable[[], Any]] = {ONE_RANK: _on(rank < 1, lambda: attend(*whole))}
    traffic = {}
    for ranks in case.ranks:
        heads = split(shape.heads, ranks)
        begin = sum(heads[:rank]) if rank < ranks else 0
        own = [tensor[:, :, begin : begin + heads[min(rank, ranks - 1)]].contiguous() for tensor in whole]
        programs[shares_at_once(ranks)] = _on(rank < ranks, lambda own=own: attend(*own))
        for name, degrees in algorithms(ranks).items():
            meter = Meter()
            program = _algorithm(degrees, whole, device, meter)
            programs[name] = program or nothing
            if program is not None:
                _check(name, program(), reference, degrees, case.dtype)
            traffic[name] = meter.total_calls, meter.total_bytes
    for ranks in (1, *case.ranks):
        programs[product_at_once(ranks)] = _on(rank < ranks, product)
    dist.barrier()
    timings = interleave({name: in_step(each, device) for name, each in programs.items()}, repeats, device, WARMUP)
    return RankTimes(timings, traffic, product.flops)


def _on(takes_part: bool, program: Callable[[], Any]) -> Callable[[], Any]:
    return program if takes_part else nothing


def _algorithm(
    degrees: Degrees, whole: Sequence[Tensor], device: torch.device, meter: Meter
) -> Callable[[], Tensor] | None:
    """This rank's call of an algorithm on its tokens, `None` if it has none; every rank of the world asks."""
    ulysses, ring = (axis_group(degrees, axis, device, meter) for axis in ("ulysses", "ring"))
    if ulysses is None or ring is None:
        return None
    lengths = split(whole[0].shape[1], degrees.sequence)
    attention = unified_attention(ulysses, ring, lengths, lengths)
    local = [tensor.split(lengths, dim=1)[dist.get_rank()].contiguous() for tensor in whole]
    return lambda: attention(*local)


def _check(name: str, out: Tensor, reference: Tensor, degrees: Degrees, dtype: torch.dtype) -> None:
    expected = reference.split(split(reference.shape[1], degrees.sequence), dim=1)[dist.get_rank()].float()
    difference = ((out.float() - expected).abs().max() / (expected.max() - expected.min())).item()
    if not difference <= TOLERANCE[dtype]:
        raise RuntimeError(f"{name}: the output differs from that of one rank by {difference:.2g} of its range")


@dataclass(frozen=True)
class Row:
    """One program: `rate` FLOP/s of all ranks together, and what it is of its limits.

    `of_product`: of products on as many ranks at once. `of_shares`: of the same work without messages. `speedup`: over
    one rank. `sent_bytes`: of a rank, on average.
    """

    name: str
    ranks: int
    timing: Timing
    rate: float
    of_product: float
    of_shares: float
    speedup: float
    calls: int = 0
    sent_bytes: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "ranks": self.ranks,
            "flops_per_second": self.rate,
            "share_of_products": self.of_product,
            "share_of_limit_without_messages": self.of_shares,
            "speedup_over_1_rank": self.speedup,
            "collectives": self.calls,
            "sent_bytes": self.sent_bytes,
            **self.timing.to_json(),
        }


def rows(case: Case, found: Sequence[RankTimes]) -> list[Row]:
    """From what every rank of the world found; times are those of rank 0."""
    timings, flops = found[0].timings, case.shape.flops

    def row(name: str, ranks: int) -> Row:
        traffic = [each.traffic[name] for each in found[:ranks] if name in each.traffic]
        seconds = timings[name].median
        products = ranks * found[0].product_flops / timings[product_at_once(ranks)].median
        without = timings[shares_at_once(ranks)] if ranks > 1 else timings[ONE_RANK]
        return Row(
            name,
            ranks,
            timings[name],
            flops / seconds,
            flops / seconds / products,
            without.median / seconds,
            timings[ONE_RANK].median / seconds,
            traffic[0][0] if traffic else 0,
            statistics.mean(sent for _, sent in traffic) if traffic else 0.0,
        )

    named = [(ONE_RANK, 1)]
    for ranks in case.ranks:
        named += [(name, ranks) for name in (shares_at_once(ranks), *algorithms(ranks))]
    return [row(name, ranks) for name, ranks in named]
