"""What messages between the ranks of one machine cost: latency, bandwidth, and how much of it passes beside computing.

Ranks compute between any two messages, as the engine's do. A message then costs what it adds: beside the transfer also
the wait for the slower rank, and on a CPU what waking gloo's threads takes from those that compute. Sent back to back,
with nothing else to do, the same messages cost a fraction of it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ranks.groups import pinned
from parallel.collectives import Group

KINDS = ("all-to-all", "all-gather", "ring", "ring beside computing")
FP32 = 4


@dataclass(frozen=True)
class MessageSettings:
    """`sizes`: bytes that a rank sends. A group is some messages in a row; `computing`: seconds between two of them."""

    sizes: tuple[int, ...]
    computing: float
    group: int
    groups: int

    @classmethod
    def of(cls, quick: bool) -> MessageSettings:
        if quick:
            return cls((4096, 65536), 0.0005, 3, 3)
        return cls((4096, 65536, 262144, 1048576, 4194304), 0.003, 8, 9)


@dataclass(frozen=True)
class Message:
    """`seconds` that a message adds to the computing on either side of it, as the median over groups of messages."""

    kind: str
    ranks: int
    sent_bytes: int
    seconds: float
    computing: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_on_rank(rank: int, settings: MessageSettings, ranks: int, on_cuda: bool) -> list[Message]:
    """Called on every rank of a gloo world; with CUDA each has a card, and they exchange by NCCL."""
    device = torch.device("cuda", rank) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    group = Group.of(dist.new_group(backend="nccl" if on_cuda else "gloo"))
    with pinned(rank, ranks), torch.inference_mode():
        compute = _computing(settings.computing, device)
        return [
            Message(kind, ranks, size, *_added(kind, group, size, compute, settings, device))
            for size in settings.sizes
            for kind in KINDS
        ]


def _computing(seconds: float, device: torch.device) -> Callable[[], None]:
    """Products that take about so many seconds, as many on every rank."""
    states, weight = torch.randn(256, 512, device=device), torch.randn(512, 512, device=device)
    for _ in range(3):
        F.linear(states, weight)
    _wait(device)
    start = time.perf_counter()
    for _ in range(20):
        F.linear(states, weight)
    _wait(device)
    each = torch.tensor([(time.perf_counter() - start) / 20])
    dist.broadcast(each, 0)
    times = max(1, round(seconds / each.item()))

    def run() -> None:
        for _ in range(times):
            F.linear(states, weight)

    return run


def _added(
    kind: str,
    group: Group,
    size: int,
    compute: Callable[[], None],
    settings: MessageSettings,
    device: torch.device,
) -> tuple[float, float]:
    """Seconds that a message adds, and those of the computing alone; in turns, on all ranks at once."""
    step = message_step(kind, group, size, compute, device)

    def timed(run: Callable[[], Any]) -> float:
        dist.barrier()
        _wait(device)
        start = time.perf_counter()
        for _ in range(settings.group):
            run()
        _wait(device)
        return (time.perf_counter() - start) / settings.group

    step()
    alone, both = [], []
    for _ in range(settings.groups):
        alone.append(timed(compute))
        both.append(timed(step))
    computing = statistics.median(alone)
    return statistics.median(both) - computing, computing


def message_step(
    kind: str, group: Group, size: int, compute: Callable[[], None], device: torch.device
) -> Callable[[], Any]:
    """One round: computing, and a message of `kind` in which this rank sends `size` bytes to others."""
    others = group.size - 1
    part = max(size // FP32 // others, 1)
    whole = torch.randn(part * group.size, device=device)
    own = torch.randn(part * others if kind.startswith("ring") else part, device=device)

    def exchange() -> Tensor | list[Tensor]:
        compute()
        if kind == "all-to-all":
            return group.all_to_all(whole, [part] * group.size, [part] * group.size)
        if kind == "all-gather":
            return group.all_gather(own, [part] * group.size, 0)
        return group.ring_exchange(own, own.shape).wait()

    def beside() -> list[Tensor]:
        pending = group.ring_exchange(own, own.shape)
        compute()
        return pending.wait()

    return beside if kind == "ring beside computing" else exchange


@dataclass(frozen=True)
class MessageModel:
    """A message of so many bytes takes `latency + bytes / bandwidth` seconds, of which a share can be hidden."""

    latency: float
    bandwidth: float
    overlap: float


def fit(messages: Sequence[Message]) -> MessageModel | None:
    """Least squares of the relative errors, over all kinds of messages that are waited for.

    The latency is at least a microsecond and the slope at least that of 10 TB/s, whatever a disturbed machine showed.
    `None` where too few took a time that could be told from computing, as on a machine that is busy otherwise.
    """
    waited = [each for each in messages if each.kind != KINDS[-1] and each.seconds > 0]
    if len({each.sent_bytes for each in waited}) < 2:
        return None
    rows = torch.tensor([[1 / each.seconds, each.sent_bytes / each.seconds] for each in waited], dtype=torch.float64)
    scale = rows.norm(dim=0)
    latency, slope = (
        torch.linalg.lstsq(rows / scale, torch.ones(len(waited), 1, dtype=torch.float64)).solution[:, 0] / scale
    ).tolist()
    return MessageModel(max(latency, 1e-6), 1 / max(slope, 1e-13), _overlap(messages))


def exchange_latency(messages: Sequence[Message], bandwidth: float) -> float:
    """Seconds of a message between two ranks beside its bytes: the median over a ring's, at least a microsecond.

    A collective waits once for all ranks; two ranks that exchange wait for each other and wake a thread each way.
    """
    ring = [each.seconds - each.sent_bytes / bandwidth for each in messages if each.kind == "ring"]
    return max(statistics.median(ring), 1e-6)


def _overlap(messages: Sequence[Message]) -> float:
    """Of a ring's messages, the share of their time that went away when they had computing beside them."""
    waited = {each.sent_bytes: each.seconds for each in messages if each.kind == "ring"}
    beside = {each.sent_bytes: each.seconds for each in messages if each.kind == KINDS[-1]}
    # Where a message takes longer than the computing beside it, no more than that can be hidden.
    shares = [
        1 - beside[each.sent_bytes] / waited[each.sent_bytes]
        for each in messages
        if each.kind == "ring" and 0 < each.seconds < each.computing
    ]
    return min(max(statistics.median(shares), 0.0), 1.0) if shares else 0.0


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
