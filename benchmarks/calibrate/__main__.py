"""Measure what this machine can do, for the planner: a profile that `helios_cp.plan --hardware` reads.

python -m benchmarks.calibrate --output profile.json      one or two minutes, on an otherwise idle machine

On a CPU a rank is one process of one thread, and every rate is what one rank reaches while as many as there are cores
compute at once. On GPUs rates are of one card. What cannot be measured here keeps the built-in figure and says so.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.calibrate.messages import Message, MessageModel, MessageSettings, exchange_latency, fit
from benchmarks.calibrate.messages import measure_on_rank as measure_messages
from benchmarks.calibrate.rates import Measurement, Settings, measure, measure_on_rank, over_ranks
from benchmarks.measuring.machine import cpu_name, describe
from benchmarks.ranks.pool import MAX_RANKS, RankPool, exit_code
from helios_cp.config.arguments import OneLineParser, whole_number
from helios_cp.config.errors import RequestError
from helios_cp.config.paths import user_path
from helios_cp.files.whole_files import check_file_target, write_json
from helios_cp.plan.hardware import MEASUREMENTS, Hardware, detect_hardware

PATIENCE = 170.0
"""Seconds for all measurements of ranks; one that takes longer hangs."""

KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""Environment of ranks on a CPU, in which glibc gives freed memory to the next tensor and not back to the system, as
PyTorch's allocator does on a GPU. Without it a chunk takes up to a quarter longer, at random, for page faults."""

NOTE = "one rank of one thread, with every rank busy at once; glibc keeps freed memory (MALLOC_ variables)"

MESSAGE_FIELDS = ("node_latency", "node_bandwidth", "overlap")
UNTOLD = "messages measured here took no time that could be told from computing, as on a machine busy otherwise"

Say = Callable[[str], None]


def build_parser() -> OneLineParser:
    parser = OneLineParser(
        prog="benchmarks.calibrate",
        usage="python -m benchmarks.calibrate --output FILE [flag ...]",
        description="Measure this machine for the planner: python -m helios_cp.plan --hardware FILE. It takes one or "
        "two minutes, on an otherwise idle machine.",
    )
    parser.add_argument("--output", type=user_path, required=True, metavar="FILE", help="JSON to write")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a card, else cpu")
    parser.add_argument(
        "--ranks",
        type=whole_number,
        metavar="N",
        help=f"ranks that measure at once: on a CPU one a core, up to {MAX_RANKS} (the default); on GPUs those that "
        "exchange messages, one a card (the default)",
    )
    parser.add_argument("--quick", action="store_true", help="few and small shapes, in seconds: to try it out")
    return parser


def main(argv: list[str] | None = None, pool: RankPool | None = None) -> int:
    """`pool` are ranks that run already; without it they are started, and ended."""
    parser = build_parser()
    options = parser.parse_args(argv)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        check_file_target("--output", options.output, ".json")
        ranks = count_ranks(options.ranks, device)
    except RequestError as error:
        parser.error(str(error))
    if pool is None and device.type == "cpu":
        os.environ.update({name: os.environ.get(name, value) for name, value in KEEP_FREED_MEMORY.items()})
    start = time.perf_counter()
    with contextlib.nullcontext(pool) if pool else contextlib.closing(RankPool()) as running:
        hardware, measured = calibrate(running, device, ranks, options.quick, say)
    write_profile(options.output, hardware, measured)
    say(f"written to {options.output} after {time.perf_counter() - start:.0f} s")
    return 0


def count_ranks(asked: int | None, device: torch.device) -> int:
    """Raises `RequestError` for more ranks than cores or cards, and for a device that is not there."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RequestError("--device cuda: there is no CUDA device here; use --device cpu")
    most, what = (torch.cuda.device_count(), "cards") if device.type == "cuda" else (count_cores(), "cores")
    most = min(most, MAX_RANKS)
    if asked is not None and not 1 <= asked <= most:
        raise RequestError(f"--ranks {asked}: 1 to {most} are allowed, at most {MAX_RANKS} and no more than {what}")
    return most if asked is None else asked


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def calibrate(
    pool: RankPool, device: torch.device, ranks: int, quick: bool, say: Say = lambda _: None
) -> tuple[Hardware, dict[str, Any]]:
    """The profile of this machine, and the measurements that it rests on, as plain JSON values."""
    settings = Settings.of(device, quick)
    if device.type == "cuda":
        say(f"{torch.cuda.get_device_name(0)}: products, attention, passes over memory, decoding")
        rates = measure(settings, device, lambda each: say(_line(each)))
    else:
        say(f"{cpu_name()}: products, attention, passes over memory, decoding; {ranks} rank(s) of one thread at once")
        rates = over_ranks(pool.run(measure_on_rank, settings, ranks=ranks, timeout=PATIENCE))
        for each in rates:
            say(_line(each))
    messages: list[Message] = []
    if ranks > 1:
        say(f"messages between {ranks} ranks")
        message_settings = MessageSettings.of(quick)
        arguments = (message_settings, ranks, device.type == "cuda")
        found = pool.run(measure_messages, *arguments, ranks=ranks, timeout=PATIENCE)
        messages = list(found[0])
        for each in messages:
            say(f"  {each.kind}, {each.sent_bytes} B sent: {1e6 * each.seconds:.0f} us")
    hardware = to_hardware(detect_hardware(device.type, ranks), rates, messages, device, ranks)
    return hardware, about(ranks, quick, rates, messages)


def about(ranks: int, quick: bool, rates: Sequence[Measurement], messages: Sequence[Message]) -> dict[str, Any]:
    """What a profile rests on, as plain JSON values."""
    return {
        **describe(),
        "ranks": ranks,
        "quick": quick,
        "environment": {name: os.environ.get(name) for name in KEEP_FREED_MEMORY},
        "rates": [each.to_json() for each in rates],
        "messages": [each.to_json() for each in messages],
    }


def write_profile(path: Path, hardware: Hardware, measured: dict[str, Any]) -> None:
    """What `read_profile` reads, with the measurements beside it."""
    write_json(path, {**hardware.to_json(), MEASUREMENTS: measured})


def to_hardware(
    built_in: Hardware,
    rates: Sequence[Measurement],
    messages: Sequence[Message],
    device: torch.device,
    ranks: int,
) -> Hardware:
    """The built-in profile with everything that was measured in place of what was assumed."""
    on_cpu = device.type == "cpu"
    how = f"measured here: {NOTE}" if on_cpu else "measured here on one card"
    values: dict[str, Any] = {
        "name": f"calibrated {cpu_name() if on_cpu else torch.cuda.get_device_name(device)}",
        **_matrix_rates(rates),
        **_pass_rates(rates),
        **_vae_rates(rates),
        "kernel_seconds": statistics.median(1 / each.rate for each in rates if each.kind.startswith("launch")),
    }
    if on_cpu:
        computed = [each for each in rates if each.kind in ("product", "attention", "decoding")]
        values["peak_flops"] = max(each.rate for each in computed)
        values["peak_vae_flops"] = max(each.rate for each in computed if each.dtype == "float32")
    sources = {name: how for name in values if name != "name"}
    if on_cpu:
        sources |= {
            name: f"the fastest program of this calibration; {how}" for name in ("peak_flops", "peak_vae_flops")
        }
    model = fit(messages) if messages else None
    if model is not None:
        measured = {**_message_values(model), "node_exchange_latency": exchange_latency(messages, model.bandwidth)}
        values |= measured
        how = f"measured here: messages between {ranks} ranks that compute between any two, over "
        how += "gloo and this machine's memory" if on_cpu else "NCCL"
        sources |= {name: how for name in measured}
    kept = {
        name: source if source.startswith("assumed") else f"built in: {source}"
        for name, source in built_in.sources
        if name not in sources and name != "memory_bytes"
    }
    if messages and model is None:
        kept |= {name: f"{kept[name]}; {UNTOLD}" for name in MESSAGE_FIELDS}
    if on_cpu:
        kept["memory_bytes"] = f"this machine's, shared by {ranks} rank(s)"
    else:
        kept["memory_bytes"] = "this card's, as CUDA tells it"
    return replace(built_in, **values, sources=tuple({**kept, **sources}.items()))


def _message_values(model: MessageModel) -> dict[str, float]:
    return dict(zip(MESSAGE_FIELDS, (model.latency, model.bandwidth, model.overlap), strict=True))


def _matrix_rates(rates: Sequence[Measurement]) -> dict[str, Any]:
    """Full rates, and the shares of them by rows or tokens."""
    products = {"matmul_flops": "bfloat16", "matmul_fp32_flops": "float32"}
    attentions = {"attention_flops": "bfloat16", "attention_fp32_flops": "float32"}
    values: dict[str, Any] = {}
    tables: dict[str, tuple[tuple[int, float], ...]] = {}
    for kind, names in (("product", products), ("attention", attentions)):
        for name, dtype in names.items():
            chosen = [each for each in rates if each.kind == kind and each.dtype == dtype]
            values[name], tables[name] = shares(chosen)
    values["matmul_shares"] = tables["matmul_flops"]
    values["matmul_fp32_shares"] = tables["matmul_fp32_flops"]
    both = zip(tables["attention_flops"], tables["attention_fp32_flops"], strict=True)
    values["attention_shares"] = tuple((size, (one + other) / 2) for (size, one), (_, other) in both)
    return values


def shares(measured: Sequence[Measurement]) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The full rate, and (first dim, share of it) for each first dim: medians over the other dims, the best is full."""
    sizes = sorted({each.shape[0] for each in measured})
    medians = {size: statistics.median(each.rate for each in measured if each.shape[0] == size) for size in sizes}
    full = max(medians.values())
    return full, tuple((size, medians[size] / full) for size in sizes)


def _pass_rates(rates: Sequence[Measurement]) -> dict[str, Any]:
    """Bytes over seconds, of all passes of a kind together."""

    def bandwidth(kind: str) -> float:
        chosen = [each for each in rates if each.kind.split(",")[0] == kind]
        return sum(each.work for each in chosen) / sum(each.seconds for each in chosen)

    plain = bandwidth("copy")
    kinds = ("norm", "rotation", "activation")
    return {"memory_bandwidth": plain, "pass_shares": tuple((kind, bandwidth(kind) / plain) for kind in kinds)}


def _vae_rates(rates: Sequence[Measurement]) -> dict[str, Any]:
    decoded = [each for each in rates if each.kind == "decoding"]
    full, table = shares(decoded)
    return {"vae_flops": full, "vae_shares": table if len(table) > 1 else ()}


def _line(each: Measurement) -> str:
    if each.kind.startswith("launch"):
        return f"  {each.kind}: {1e6 / each.rate:.2f} us"
    unit = "GFLOP/s" if each.kind in ("product", "attention", "decoding") else "GB/s"
    return f"  {each.kind} {' x '.join(map(str, each.shape))} {each.dtype}: {each.rate / 1e9:.4g} {unit}"


if __name__ == "__main__":
    sys.exit(exit_code(main))
