"""Groups of ranks inside a larger world, and programs that all ranks of it run in step, for timing them in turns."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.measuring.device_rates import wait
from parallel.collectives import Group, Meter
from parallel.mesh import Degrees, axis_groups


def rank_device(device_type: str, rank: int) -> torch.device:
    """The device of a rank; with more ranks than cards several share one."""
    if device_type != "cuda":
        return torch.device(device_type)
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def default_ranks(device: torch.device) -> Sequence[int]:
    """How many ranks a benchmark tries when nobody says."""
    if device.type != "cuda":
        return (2, 4)
    return [ranks for ranks in (2, 4, 8) if ranks <= torch.cuda.device_count()]


def make_group(ranks: Sequence[int], device: torch.device, meter: Meter | None = None) -> Group | None:
    """The group of some ranks of the world, `None` on the others; every rank of the world calls it.

    It speaks NCCL where each rank of the world has a card of its own, else gloo.
    """
    own = dist.get_rank() if dist.is_initialized() else 0
    if len(ranks) == 1:
        return Group(None, tuple(ranks), 0, meter) if own in ranks else None
    has_cards = device.type == "cuda" and torch.cuda.device_count() >= dist.get_world_size()
    made = dist.new_group(list(ranks), backend="nccl" if has_cards else "gloo")
    return Group.of(made, meter) if own in ranks else None


def axis_group(degrees: Degrees, axis: str, device: torch.device, meter: Meter | None = None) -> Group | None:
    """This rank's group on an axis of a layout of the world's first ranks; every rank of the world calls it."""
    groups = [make_group(ranks, device, meter) for ranks in axis_groups(degrees, axis)]
    return next((group for group in groups if group is not None), None)


def in_step(program: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    """The program, ended on every rank of the world when all have ended it; a rank without work waits, asleep."""

    def run() -> None:
        program()
        wait(device)
        if dist.is_initialized():
            dist.barrier()

    return run


def nothing() -> None:
    """What a rank does that has no part in a program."""


@contextlib.contextmanager
def pinned(rank: int, ranks: int) -> Iterator[bool]:
    """This thread on a core of its own, if there is one a rank and the system can; tells whether.

    Threads that gloo has started stay where there is room.
    """
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else set()
    if len(cores) < ranks:
        yield False
        return
    os.sched_setaffinity(0, {sorted(cores)[rank]})
    try:
        yield True
    finally:
        os.sched_setaffinity(0, cores)
