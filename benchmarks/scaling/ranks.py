"""One forward on one rank and on several, diffusers' and ours: how long it takes.

The functions here run on every rank of a gloo world at once, in step.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from diffusers import HeliosTransformer3DModel
from torch import Tensor

from benchmarks.measuring.counting import count
from benchmarks.measuring.device_rates import wait
from benchmarks.measuring.timing import Timing, interleave
from benchmarks.models.diffusers_parallel import FunctionalCollectives, enable_parallelism
from benchmarks.models.models import Inputs, build_pair, encode_history, run_ours, run_theirs
from benchmarks.ranks.groups import pinned, rank_device
from helios_cp.config.checkpoint import TransformerConfig
from helios_cp.model.sequence import TokenSequence
from helios_cp.model.transformer import HeliosTransformer
from helios_cp.pipeline.parallelize import ShardedSequence
from parallel.collectives import Meter
from parallel.mesh import Degrees, Mesh

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""Of the output's range. In fp32 only the order of additions differs; bf16 keeps 8 bits of each sum."""


@dataclass(frozen=True)
class Case:
    """A model and a forward of it: video size (height, width) in pixels, tokens of text; the last stage.

    It runs in fp32 on a CPU and in bf16 elsewhere.
    """

    config: TransformerConfig
    size: tuple[int, int]
    text_tokens: int
    stage: int = 3


@dataclass(frozen=True)
class Times:
    """Of one rank, by program.

    `cpu_seconds` are medians of what the rank's process computed for, waiting aside, which a busy machine disturbs
    less; `differences` those of the output from diffusers' on one rank, in units of its range; `traffic` the
    collectives of a forward and the bytes that the rank sends in them.
    """

    timings: dict[str, Timing]
    cpu_seconds: dict[str, float]
    differences: dict[str, float]
    traffic: dict[str, tuple[int, int]]
    is_pinned: bool


Program = Callable[[], Tensor | None]


def pick_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def build(
    case: Case, device: torch.device, dtype: torch.dtype
) -> tuple[HeliosTransformer3DModel, HeliosTransformer, Inputs]:
    """The same models and inputs on every rank."""
    torch.manual_seed(0)
    theirs, ours = build_pair(case.config, device, dtype)
    inputs = Inputs.random(case.config, case.size, case.stage, device, dtype)
    return theirs, ours, replace(inputs, text=inputs.text[:, : case.text_tokens])


def layouts(ranks: int) -> dict[str, Degrees]:
    """Those that are timed on so many ranks: Ulysses, ring, and from 4 on a ring of 2 outside."""
    found = {f"Ulysses {ranks}": Degrees(ulysses=ranks), f"ring {ranks}": Degrees(ring=ranks)}
    if ranks > 2 and ranks % 2 == 0:
        found[f"Ulysses {ranks // 2} × ring 2"] = Degrees(ring=2, ulysses=ranks // 2)
    return found


def peers(ranks: int, device_type: str) -> dict[str, str]:
    """The ways of diffusers that are timed; a CPU has no attention for its ring."""
    found = {f"diffusers, Ulysses {ranks}": "ulysses", f"diffusers, ulysses_anything {ranks}": "ulysses_anything"}
    return found | ({f"diffusers, ring_anything {ranks}": "ring_anything"} if device_type == "cuda" else {})


@torch.inference_mode()
def count_flops(case: Case) -> dict[str, int]:
    """FLOPs of one forward on one rank, by program."""
    theirs, ours, inputs = build(case, torch.device("meta"), torch.float32)
    run = sequence_program(ours, inputs, TokenSequence())
    run()  # fills the tables
    return {"diffusers": count(run_theirs, theirs, inputs).flops, "ours": count(run).flops}


@torch.inference_mode()
def time_ranks(
    rank: int, case: Case, ranks: int, repeats: int, warmup: int, device_type: str = "cpu", local_rank: int = 0
) -> Times:
    """Times of all programs in turns, on a world of `ranks`.

    Raises `RuntimeError` before timing if any output is not that of diffusers on one rank. Every program ends when all
    ranks have ended it, so that all start the next together; a rank without work waits, asleep.
    """
    device = rank_device(device_type, local_rank)
    theirs, ours, inputs = build(case, device, pick_dtype(device))
    alone = sequence_program(ours, inputs, TokenSequence())
    meters: dict[str, Meter] = {}
    programs: dict[str, Program] = {
        "diffusers, 1 rank": lambda: run_theirs(theirs, inputs) if rank == 0 else None,
        "ours, 1 rank": lambda: alone() if rank == 0 else None,
    }
    for name, peer in peers(ranks, device.type).items():
        split = copy.deepcopy(theirs)
        enable_parallelism(split, ranks, peer, device.type)
        meters[name] = Meter()
        programs[name] = functools.partial(run_theirs, split, inputs)
    for name, degrees in layouts(ranks).items():
        meters[f"ours, {name}"] = meter = Meter()
        programs[f"ours, {name}"] = sequence_program(ours, inputs, _sharded(degrees, meter))
    programs[f"ours, {ranks} at once"] = alone
    reference = run_theirs(theirs, inputs)
    differences, traffic = {}, {}
    for name, program in programs.items():
        meter = meters.get(name, Meter())
        is_theirs = name in meters and name.startswith("diffusers")
        with FunctionalCollectives(meter) if is_theirs else contextlib.nullcontext():
            differences[name] = _difference(program(), reference)
        traffic[name] = meter.total_calls, meter.total_bytes
    tolerance = TOLERANCE[pick_dtype(device)]
    wrong = {name: difference for name, difference in differences.items() if not difference <= tolerance}
    if wrong:
        raise RuntimeError(f"rank {rank}: outputs differ from diffusers' on one rank by {wrong} of their range")
    cpu: dict[str, list[float]] = {name: [] for name in programs}
    in_step = {name: _in_step(program, cpu[name], device) for name, program in programs.items()}
    with pinned(rank, ranks) if device.type == "cpu" else contextlib.nullcontext(False) as is_pinned:
        dist.barrier()
        timings = interleave(in_step, repeats, device, warmup)
    cpu_seconds = {name: statistics.median(seconds[warmup:]) for name, seconds in cpu.items()}
    return Times(timings, cpu_seconds, differences, traffic, is_pinned)


def sequence_program(model: HeliosTransformer, inputs: Inputs, sequence: TokenSequence) -> Program:
    """A forward with its tokens spread by `sequence`; text and history are encoded here, once."""
    text = model.encode_text(inputs.text)
    model.sequence = sequence
    history = encode_history(model, inputs)

    def run() -> Tensor:
        model.sequence = sequence
        return run_ours(model, inputs, text, history)

    return run


def _in_step(program: Program, cpu_seconds: list[float], device: torch.device) -> Callable[[], None]:
    def run() -> None:
        start = time.process_time()
        program()
        wait(device)
        cpu_seconds.append(time.process_time() - start)
        dist.barrier()

    return run


def _sharded(degrees: Degrees, meter: Meter | None = None) -> TokenSequence:
    return ShardedSequence(Mesh.build(degrees, meter=meter)) if degrees.world > 1 else TokenSequence()


def _difference(output: Tensor | None, reference: Tensor) -> float:
    """0 where this rank has no part in a program."""
    if output is None:
        return 0.0
    return ((output - reference).abs().max() / (reference.max() - reference.min())).item()
