"""How a forward scales over ranks: time, efficiency, bytes and memory by layout, against one rank and diffusers' own.

python -m benchmarks.scaling                                 worlds of 2 and 4 ranks, six minutes on two cores
python -m benchmarks.scaling --device cuda --ranks 2 4 8     on the GPUs of one machine
torchrun --nnodes 2 … -m benchmarks.scaling --device cuda    one world, over several machines

Without torchrun it starts one for each world, one after the other. On a CPU the model has a fifth of the width of
Helios-14B, and of its tokens at stage 3 of 384 × 640 (noisy, history and text) about a quarter. Bytes per FLOP grow as
the model shrinks, so that scaling is harder there than at full size.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.measuring.machine import CHECKOUT
from benchmarks.measuring.output import add_output, table_console, write_output
from benchmarks.models.communication_formulas import Tokens
from benchmarks.models.diffusers_parallel import REPAIRS
from benchmarks.ranks.groups import rank_device
from benchmarks.scaling.memory import peaks
from benchmarks.scaling.ranks import Case, count_flops, pick_dtype, time_ranks
from benchmarks.scaling.world import GOALS, WorldTimes, speedups_table, world_table
from helios_cp.config.arguments import OneLineParser, whole_number
from helios_cp.config.checkpoint import TransformerConfig
from helios_cp.config.errors import RequestError
from helios_cp.device.device import card_of_rank, dtype_name, pick_device
from helios_cp.files.whole_files import check_file_target
from helios_cp.pipeline.world import Ranks, World, pick_backend

ON_CPU = Case(
    TransformerConfig(num_attention_heads=8, ffn_dim=2768, text_dim=820, num_layers=3), size=(256, 256), text_tokens=136
)
# Full width; diffusers' weights, its copy for context parallelism, and ours fit on one card beside each other.
ON_GPU = Case(TransformerConfig(num_layers=10), size=(384, 640), text_tokens=512)
WARMUP = 1  # outputs have been compared before
MAX_RANKS = 64
SECONDS_OF_TURN = 300  # a rank that takes longer for all programs once hangs
NOTES = (
    "Seconds of one forward. Ours encodes text once per prompt and history once per chunk, outside of it.",
    "(`python -m benchmarks.forward` times those.) On a CPU a rank has one thread. Ratios are taken turn by turn.",
    "At once: the one-rank forward on every rank at the same time, without messages: the limit of this machine.",
    "Efficiency: times faster than ours (diffusers': than diffusers') on one rank, over the number of ranks.",
    "Of limit: efficiency over what as many forwards at once leave of it.",
    "CPU: seconds that rank 0 computed for, waiting aside; a busy machine disturbs them less.",
    "FLOPs: ours leaves out text, history and the last block's history rows, which weigh more in fewer blocks.",
    "MB sent by a rank, on average; memory: peak MiB of the tensors that a forward makes on rank 0, counted.",
)


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="benchmarks.scaling", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--ranks", type=whole_number, nargs="+", metavar="P", help="sizes of the worlds (default: 2 4; all GPUs: 2 4 8)"
    )
    add("--device", default="cpu", help="cpu, cuda or auto (default: cpu)")
    add("--backend", choices=("gloo", "nccl"), help="of the messages (default: nccl on CUDA, gloo elsewhere)")
    add("--repeats", type=whole_number, default=5, metavar="N", help="timed turns (default: 5)")
    add("--layers", type=whole_number, metavar="N", help="of the model (default: 3; on a GPU 10)")
    add("--heads", type=whole_number, metavar="N", help="likewise (default: 8; on a GPU 40); the FFN grows with them")
    add("--height", type=whole_number, metavar="PIXELS", help="of the video (default: 256; on a GPU 384)")
    add("--width", type=whole_number, metavar="PIXELS", help="likewise (default: 256; on a GPU 640)")
    add_output(parser, "scaling")
    return parser


def main(arguments: list[str] | None = None, environment: Mapping[str, str] = os.environ) -> int:
    """Under torchrun one world, else torchrun for each, written as they come. Exit codes: 0, 1 failed, 2 bad input."""
    parser = build_parser()
    parser.is_quiet = environment.get("RANK", "0") != "0"
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    try:
        ranks = Ranks.of(environment)
        check_file_target("--output", options.output, ".json")
        case, device, worlds = read_case(options)
        backend = pick_backend(options.backend, device, ranks)
        world = World(ranks, SECONDS_OF_TURN * (options.repeats + WARMUP + 2)) if ranks.size > 1 else None
    except RequestError as error:
        parser.error(str(error))
    if world is not None:
        return run_rank(case, options, device, backend, world)
    measured = {}
    for size in worlds:
        found = run_torchrun(size, arguments)
        if found is None:
            print(f"benchmarks.scaling: error: the world of {size} ranks failed, see above", file=sys.stderr)
            return 1
        measured[size] = found
        show_and_write(case, options, device, measured)
    return 0


def read_case(options: argparse.Namespace) -> tuple[Case, torch.device, tuple[int, ...]]:
    """What the flags ask for. Raises `RequestError` where that is out of range."""
    device = pick_device(options.device)
    case = ON_CPU if device.type == "cpu" else ON_GPU
    worlds = options.ranks or [p for p in (2, 4, 8) if p <= (4 if device.type == "cpu" else torch.cuda.device_count())]
    for name, values, least, most in (
        ("repeats", [options.repeats], 2, 1000),
        ("layers", [options.layers], 1, 1000),
        ("heads", [options.heads], 1, 1000),
        ("ranks", worlds, 2, MAX_RANKS),
    ):
        for value in values:
            if value is not None and not least <= value <= most:
                raise RequestError(f"--{name} {value}: allowed is {least} to {most}")
    if not worlds:
        raise RequestError(
            f"--device {options.device}: there is one card only; give --ranks 2 --backend gloo to share it"
        )
    size = options.height or case.size[0], options.width or case.size[1]
    for name, pixels in zip(("height", "width"), size, strict=True):
        if pixels < 64 or pixels % 64:
            raise RequestError(f"--{name} {pixels}: allowed are multiples of 64")
    config, heads = case.config, options.heads or case.config.num_attention_heads
    config = dataclasses.replace(
        config,
        num_layers=options.layers or config.num_layers,
        num_attention_heads=heads,
        ffn_dim=config.ffn_dim * heads // config.num_attention_heads,
    )
    tokens = Tokens.of(size, case.stage)
    for ranks in worlds:
        for what, count in (("heads", heads), ("tokens", tokens.sequence), ("noisy tokens", tokens.noisy)):
            if count % ranks:
                raise RequestError(
                    f"--ranks {ranks}: diffusers' context parallelism must divide the {count} {what}; use other ranks, "
                    "--heads, or another size"
                )
    return dataclasses.replace(case, config=config, size=size), device, tuple(sorted(set(worlds)))


def run_torchrun(size: int, arguments: list[str]) -> WorldTimes | None:
    """One world of this program, with the same flags; `None` where it fails, which it says itself."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "world.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(size)]
        command += ["-m", "benchmarks.scaling", *arguments, "--output", str(output)]
        quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, cwd=CHECKOUT, env={**os.environ, **quiet}, stdout=subprocess.DEVNULL) as process:
            signal.signal(signal.SIGTERM, lambda *_: process.terminate())  # torchrun ends its ranks
            code = process.wait()
        if code:
            return None
        return WorldTimes(**json.loads(output.read_text())["results"]["worlds"][str(size)])


def run_rank(case: Case, options: argparse.Namespace, device: torch.device, backend: str, world: World) -> int:
    """A rank's part; rank 0 writes."""
    ranks = world.ranks
    if device.type == "cpu":
        torch.set_num_threads(1)
    with world.connected(backend, card_of_rank(device, ranks.local_rank)):
        found = measure_world(ranks.rank, case, ranks.size, options.repeats, WARMUP, device.type, ranks.local_rank)
    if found is not None:
        show_and_write(case, options, device, {ranks.size: found})
    return 0


def measure_world(
    rank: int, case: Case, ranks: int, repeats: int, warmup: int, device_type: str = "cpu", local_rank: int = 0
) -> WorldTimes | None:
    """Called on every rank of a running world; what rank 0 returns is of all."""
    memory = peaks(rank, case, ranks, rank_device(device_type, local_rank))
    load = [os.getloadavg()[0]]
    times = time_ranks(rank, case, ranks, repeats, warmup, device_type, local_rank)
    load.append(os.getloadavg()[0])
    sent: list[Any] = [None] * ranks
    dist.all_gather_object(sent, times.traffic)
    if rank > 0:
        return None
    return WorldTimes.of(ranks, times, sent, memory, load, GOALS if case == ON_CPU else {})


def show_and_write(
    case: Case, options: argparse.Namespace, device: torch.device, measured: dict[int, WorldTimes]
) -> None:
    """The latest world for a reader; all so far to the file."""
    console = table_console()
    flops = count_flops(case)
    config, dtype = case.config, dtype_name(pick_dtype(device))
    console.print(
        f"{config.num_layers} blocks × {config.num_attention_heads} heads × {config.attention_head_dim}, "
        f"{case.size[0]} × {case.size[1]}, {dtype} on {device.type}"
    )
    latest = list(measured.values())[-1]
    console.print(world_table(latest), speedups_table(latest))
    console.print(*NOTES, sep="\n", style="dim")
    console.print("GFLOP of a forward: " + ", ".join(f"{name} {value / 1e9:.1f}" for name, value in flops.items()))
    results = {
        "case": dataclasses.asdict(case),
        "device": device.type,
        "dtype": dtype,
        "notes": NOTES,
        "repairs of diffusers": REPAIRS,
        "FLOPs": flops,
        "worlds": {str(ranks): found.to_json() for ranks, found in measured.items()},
    }
    path = write_output(options.output, results)
    console.print(f"written to {path}", style="dim", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
