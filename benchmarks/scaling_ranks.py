"""One forward on one rank and on several, diffusers' and ours: how long it takes, and how much memory it holds.

The functions here run on every rank of a gloo world at once, in step.
"""

from __future__ import annotations

import contextlib
import copy
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from diffusers import HeliosTransformer3DModel
from torch import Tensor

from benchmarks.counting import count
from benchmarks.diffusers_parallel import enable_ulysses
from benchmarks.memory import LiveMemory
from benchmarks.models import Inputs, build_pair, encode_history, run_ours, run_theirs
from benchmarks.timing import Timing, interleave
from helios_cp.config import TransformerConfig
from helios_cp.parallelize import ShardedSequence
from helios_cp.sequence import Sequence, WholeSequence
from helios_cp.transformer import HeliosTransformer
from parallel.mesh import Degrees, Mesh

CPU = torch.device("cpu")
TOLERANCE = 1e-5  # of the output's range, in fp32, where only the order of additions differs


@dataclass(frozen=True)
class Case:
    """A model and a forward of it: video size (height, width) in pixels, tokens of text; the last stage, in fp32."""

    config: TransformerConfig
    size: tuple[int, int]
    text_tokens: int
    stage: int = 3


@dataclass(frozen=True)
class Times:
    """Of one rank, by program.

    `cpu_seconds` are medians of what the rank's process computed for, waiting aside, which a busy machine disturbs
    less; `differences` those of the output from diffusers' on one rank, in units of its range.
    """

    timings: dict[str, Timing]
    cpu_seconds: dict[str, float]
    differences: dict[str, float]
    is_pinned: bool


Program = Callable[[], Tensor | None]


def build(case: Case, device: torch.device = CPU) -> tuple[HeliosTransformer3DModel, HeliosTransformer, Inputs]:
    """The same models and inputs on every rank."""
    torch.manual_seed(0)
    theirs, ours = build_pair(case.config, device, torch.float32)
    inputs = Inputs.random(case.config, case.size, case.stage, device, torch.float32)
    return theirs, ours, replace(inputs, text=inputs.text[:, : case.text_tokens])


@torch.inference_mode()
def count_flops(case: Case) -> dict[str, int]:
    """FLOPs of one forward on one rank, by program."""
    theirs, ours, inputs = build(case, torch.device("meta"))
    run = sequence_program(ours, inputs, WholeSequence())
    run()  # fills the tables
    return {"diffusers": count(run_theirs, theirs, inputs).flops, "ours": count(run).flops}


@torch.inference_mode()
def time_ranks(rank: int, case: Case, ranks: int, repeats: int, warmup: int) -> Times:
    """Times of all programs in turns, on a world of `ranks`.

    Raises `RuntimeError` before timing if any output is not that of diffusers on one rank. Every program ends when all
    ranks have ended it, so that all start the next together; a rank without work waits, asleep.
    """
    theirs, ours, inputs = build(case)
    theirs_split = copy.deepcopy(theirs)
    enable_ulysses(theirs_split, ranks)
    alone = sequence_program(ours, inputs, WholeSequence())
    programs: dict[str, Program] = {
        "diffusers, 1 rank": lambda: run_theirs(theirs, inputs) if rank == 0 else None,
        "ours, 1 rank": lambda: alone() if rank == 0 else None,
        f"diffusers, Ulysses {ranks}": lambda: run_theirs(theirs_split, inputs),
        f"ours, Ulysses {ranks}": sequence_program(ours, inputs, _sharded(Degrees(ulysses=ranks))),
        f"ours, ring {ranks}": sequence_program(ours, inputs, _sharded(Degrees(ring=ranks))),
        f"ours, {ranks} at once": alone,
    }
    reference = run_theirs(theirs, inputs)
    differences = {name: _difference(program(), reference) for name, program in programs.items()}
    wrong = {name: difference for name, difference in differences.items() if not difference <= TOLERANCE}
    if wrong:
        raise RuntimeError(f"rank {rank}: outputs differ from diffusers' on one rank by {wrong} of their range")
    cpu: dict[str, list[float]] = {name: [] for name in programs}
    in_step = {name: _in_step(program, cpu[name]) for name, program in programs.items()}
    with pinned(rank, ranks) as is_pinned:
        dist.barrier()
        timings = interleave(in_step, repeats, CPU, warmup)
    cpu_seconds = {name: statistics.median(seconds[warmup:]) for name, seconds in cpu.items()}
    return Times(timings, cpu_seconds, differences, is_pinned)


@torch.no_grad()
def peak_bytes(rank: int, case: Case, degrees: Degrees) -> int:
    """Peak bytes that a forward of ours makes on this rank, after one that has filled the tables."""
    _, ours, inputs = build(case)
    return _peak_of_second_run(sequence_program(ours, inputs, _sharded(degrees)))


@torch.no_grad()
def peak_bytes_of_diffusers(rank: int, case: Case, ranks: int) -> int:
    """As `peak_bytes` for diffusers' Ulysses, or its plain model on one rank."""
    theirs, _, inputs = build(case)
    if ranks > 1:
        enable_ulysses(theirs, ranks)
    return _peak_of_second_run(lambda: run_theirs(theirs, inputs))


def sequence_program(model: HeliosTransformer, inputs: Inputs, sequence: Sequence) -> Program:
    """A forward with its tokens spread by `sequence`; text and history are encoded here, once."""
    text = model.encode_text(inputs.text)
    model.sequence = sequence
    history = encode_history(model, inputs)

    def run() -> Tensor:
        model.sequence = sequence
        return run_ours(model, inputs, text, history)

    return run


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


def _in_step(program: Program, cpu_seconds: list[float]) -> Callable[[], None]:
    def run() -> None:
        start = time.process_time()
        program()
        cpu_seconds.append(time.process_time() - start)
        dist.barrier()

    return run


def _sharded(degrees: Degrees) -> Sequence:
    return ShardedSequence(Mesh.build(degrees)) if degrees.world > 1 else WholeSequence()


def _peak_of_second_run(program: Program) -> int:
    program()
    with LiveMemory() as memory:
        program()
    return memory.peak_bytes


def _difference(output: Tensor | None, reference: Tensor) -> float:
    """0 where this rank has no part in a program."""
    if output is None:
        return 0.0
    return ((output - reference).abs().max() / (reference.max() - reference.min())).item()
