"""How much memory a forward takes on a rank, diffusers' and ours: the bytes of the tensors that live at one time.

On one rank, and with ours on any, it is counted on meta tensors, as one rank of a job whose other ranks do not exist:
exact, and the same every time. diffusers' collectives hold buffers until they are waited for, which takes a world that
sends; there it is the least of three runs, as gloo's thread may let go of a buffer late, which only raises a peak.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measuring.memory import LiveMemory
from benchmarks.models.diffusers_parallel import enable_parallelism
from benchmarks.models.models import run_theirs
from benchmarks.ranks.silent import silent_mesh
from benchmarks.scaling.ranks import Case, Program, build, layouts, pick_dtype, sequence_program
from helios_cp.pipeline.parallelize import ShardedSequence
from parallel.mesh import Degrees

META = torch.device("meta")


def peaks(rank: int, case: Case, ranks: int, device: torch.device) -> dict[str, int]:
    """Peak bytes that a forward of each program makes on this rank of a world of `ranks`; of one rank, on rank 0.

    Called on every rank of the world.
    """
    dtype, found = pick_dtype(device), {}
    if rank == 0:
        found["diffusers, 1 rank"] = peak_bytes_of_diffusers(case, dtype)
        found["ours, 1 rank"] = peak_bytes(case, Degrees(), 0, dtype)
    found[f"diffusers, Ulysses {ranks}"] = peak_bytes_of_ulysses(case, ranks, device)
    return found | {f"ours, {name}": peak_bytes(case, each, rank, dtype) for name, each in layouts(ranks).items()}


@torch.no_grad()
def peak_bytes(case: Case, degrees: Degrees, rank: int, dtype: torch.dtype) -> int:
    """Peak bytes that a forward of ours makes on a rank, after one that has filled the tables."""
    _, ours, inputs = build(case, META, dtype)
    with silent_mesh(degrees, rank) as (mesh, _), flash_attention():
        return _peak_of_second(sequence_program(ours, inputs, ShardedSequence(mesh)))


@torch.no_grad()
def peak_bytes_of_diffusers(case: Case, dtype: torch.dtype) -> int:
    """As `peak_bytes` for diffusers' model on one rank."""
    theirs, _, inputs = build(case, META, dtype)
    with flash_attention():
        return _peak_of_second(lambda: run_theirs(theirs, inputs))


@torch.no_grad()
def peak_bytes_of_ulysses(case: Case, ranks: int, device: torch.device) -> int:
    """As `peak_bytes` for diffusers' Ulysses; called on every rank of a world of `ranks`, on a device of its own."""
    theirs, _, inputs = build(case, device, pick_dtype(device))
    enable_parallelism(theirs, ranks, device_type=device.type)
    return min(_peak_of_second(lambda: run_theirs(theirs, inputs)) for _ in range(3))


def _peak_of_second(program: Program) -> int:
    program()
    with LiveMemory() as memory:
        program()
    return memory.peak_bytes


@contextlib.contextmanager
def flash_attention() -> Iterator[None]:
    """Attention that holds no scores, as on a CPU and on cards: what meta tensors get by default holds them all."""

    def flash(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]

    with mock.patch.object(F, "scaled_dot_product_attention", flash):
        yield
