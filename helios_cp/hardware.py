"""What a kind of machine can do, as numbers with their sources: built in, or read from a calibration's JSON.

Rates are what a program reaches, not what a data sheet promises; `peak_*` are the data sheet's. "Seconds" and rates are
of one rank, which is one GPU, or on a CPU one process of one thread.
"""

from __future__ import annotations

import bisect
import json
import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from helios_cp.config import RequestError
from helios_cp.cost import PASSES
from helios_cp.typed import check_types

TERA, GIGA, MICRO = 1e12, 1e9, 1e-6
SHARES = {
    "matmul_shares": "rows",
    "matmul_fp32_shares": "rows",
    "attention_shares": "tokens",
    "vae_shares": "channels",
}
"""Fields of pairs, and what the first of a pair is."""

MOST_SHARE = 1.5
"""Of a full rate, which is that of large sizes; middle ones may be a little faster."""

MEASUREMENTS = "calibration"
"""The key of a profile's file under which a calibration keeps what it measured; no part of the profile."""


@dataclass(frozen=True)
class Hardware:
    """One kind of machine. Rates in FLOP/s and bytes/s, latencies in seconds.

    `matmul_*`: products of many rows, by dtype. `matmul_shares`: (rows, share of that rate) for fewer, interpolated in
    the logarithm of the rows; `matmul_fp32_shares` where they differ in fp32. Small products are bound by memory
    besides. `attention_*`: likewise, attention, with shares by the geometric mean of queries and keys. `vae_flops`: the
    VAE's decoding in fp32 as a whole, its memory passes included, with shares by its channels. `memory_bandwidth`: of
    copies and sums; `pass_shares`: (kind, share of it) of other passes over memory, see `helios_cp.cost.PASSES`.
    `kernel_seconds`: of launching one kernel, beside computing where `launches_overlap`. `node_*`: messages within a
    node, of one rank. `network_*`: between nodes. `overlap`: the share of a message's time that can pass beside
    computing. `memory_bytes`: what a rank may use. `sources`: where each number comes from.
    """

    name: str
    peak_flops: float
    peak_vae_flops: float
    matmul_flops: float
    matmul_fp32_flops: float
    attention_flops: float
    attention_fp32_flops: float
    vae_flops: float
    memory_bandwidth: float
    memory_bytes: float
    kernel_seconds: float
    node_bandwidth: float
    node_latency: float
    network_bandwidth: float
    network_latency: float
    gpus_per_node: int = 8
    launches_overlap: bool = True
    overlap: float = 1.0
    matmul_shares: tuple[tuple[int, float], ...] = ()
    matmul_fp32_shares: tuple[tuple[int, float], ...] = ()
    attention_shares: tuple[tuple[int, float], ...] = ()
    vae_shares: tuple[tuple[int, float], ...] = ()
    pass_shares: tuple[tuple[str, float], ...] = ()
    sources: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "overlap":
                if not 0 <= value <= 1:
                    raise ValueError(f"overlap {value:g}: a share from 0 to 1 is allowed")
            elif field.type in ("float", "int") and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{field.name} {value:g}: a finite number above 0 is allowed")
        for name, what in SHARES.items():
            pairs = getattr(self, name)
            sizes = [size for size, _ in pairs]
            if sizes != sorted(set(sizes)) or any(size < 1 or not 0 < share <= MOST_SHARE for size, share in pairs):
                raise ValueError(
                    f"{name} {pairs}: allowed are pairs of {what}, increasing from 1, and a share of the full rate "
                    f"above 0 and up to {MOST_SHARE:g}"
                )
        for kind, share in self.pass_shares:
            if kind not in PASSES or not (math.isfinite(share) and share > 0):
                raise ValueError(
                    f"pass_shares {kind} {share:g}: allowed are {', '.join(PASSES)}, each with a finite share above 0"
                )

    def matmul_rate(self, rows: int, itemsize: int) -> float:
        """FLOP/s of a product of `rows` rows, memory aside."""
        if itemsize < 4:
            return self.matmul_flops * _interpolate(self.matmul_shares, rows)
        return self.matmul_fp32_flops * _interpolate(self.matmul_fp32_shares or self.matmul_shares, rows)

    def attention_rate(self, queries: int, keys: int, itemsize: int) -> float:
        """FLOP/s of attention, memory aside."""
        full = self.attention_flops if itemsize < 4 else self.attention_fp32_flops
        return full * _interpolate(self.attention_shares, math.sqrt(queries * keys))

    def vae_rate(self, channels: int) -> float:
        """FLOP/s of the part of the VAE's decoder that is so many channels wide."""
        return self.vae_flops * _interpolate(self.vae_shares, channels)

    def pass_bandwidth(self, kind: str) -> float:
        """Bytes/s of the passes over memory of a kind."""
        return self.memory_bandwidth * dict(self.pass_shares).get(kind, 1.0)

    def to_json(self) -> dict[str, Any]:
        """What `read_profile` reads back."""
        return {**asdict(self), "sources": dict(self.sources), "pass_shares": dict(self.pass_shares)}


def _interpolate(points: tuple[tuple[int, float], ...], size: float) -> float:
    if not points or size < 1:
        return 1.0
    place = bisect.bisect_left(points, (size, 0.0))
    if place == 0:
        return points[0][1]
    if place == len(points):
        return points[-1][1]
    (low, before), (high, after) = points[place - 1], points[place]
    part = math.log(size / low) / math.log(high / low)
    return before + part * (after - before)


H100 = Hardware(
    name="h100",
    peak_flops=989.4 * TERA,
    peak_vae_flops=494.7 * TERA,
    matmul_flops=720 * TERA,
    matmul_fp32_flops=49 * TERA,
    attention_flops=600 * TERA,
    attention_fp32_flops=40 * TERA,
    vae_flops=95 * TERA,
    memory_bandwidth=0.88 * 3350 * GIGA,
    memory_bytes=80 * GIGA,
    kernel_seconds=5 * MICRO,
    node_bandwidth=0.8 * 450 * GIGA,
    node_latency=20 * MICRO,
    network_bandwidth=0.85 * 50 * GIGA,
    network_latency=40 * MICRO,
    sources=(
        ("peak_flops", "NVIDIA H100 SXM data sheet: bf16, dense"),
        ("peak_vae_flops", "NVIDIA H100 SXM data sheet: TF32, dense"),
        ("matmul_flops", "assumed: large cuBLAS products, 73 % of the peak"),
        ("matmul_fp32_flops", "assumed: 73 % of the data sheet's 67 TFLOP/s outside tensor cores"),
        ("attention_flops", "assumed: FlashAttention-3, forward, head dim 128"),
        ("attention_fp32_flops", "assumed: 60 % of the data sheet's 67 TFLOP/s"),
        ("vae_flops", "modelled: 69.3 TFLOP of a chunk at 384x640 in 0.73 s"),
        ("memory_bandwidth", "assumed: 88 % of the data sheet's 3.35 TB/s"),
        ("memory_bytes", "NVIDIA H100 SXM data sheet"),
        ("kernel_seconds", "assumed: eager PyTorch"),
        ("node_bandwidth", "assumed: 80 % of NVLink's 450 GB/s each way"),
        ("node_latency", "assumed: one NCCL call"),
        ("network_bandwidth", "assumed: 85 % of InfiniBand's 50 GB/s for each GPU"),
        ("network_latency", "assumed: one NCCL call"),
        ("gpus_per_node", "DGX H100"),
        ("overlap", "assumed: NCCL beside computing"),
    ),
)

H200 = replace(
    H100,
    name="h200",
    matmul_flops=790 * TERA,
    memory_bandwidth=4300 * GIGA,
    memory_bytes=141 * GIGA,
    sources=(
        *(pair for pair in H100.sources if pair[0] not in ("matmul_flops", "memory_bandwidth", "memory_bytes")),
        ("matmul_flops", "measured on one H200: bf16 products of random data"),
        ("memory_bandwidth", "measured on one H200: copies"),
        ("memory_bytes", "NVIDIA H200 data sheet"),
    ),
)

A100 = replace(
    H100,
    name="a100-80",
    peak_flops=312 * TERA,
    peak_vae_flops=156 * TERA,
    matmul_flops=0.73 * 312 * TERA,
    matmul_fp32_flops=0.73 * 19.5 * TERA,
    attention_flops=0.6 * 312 * TERA,
    attention_fp32_flops=0.6 * 19.5 * TERA,
    vae_flops=30 * TERA,
    memory_bandwidth=0.88 * 2039 * GIGA,
    node_bandwidth=0.8 * 300 * GIGA,
    network_bandwidth=0.85 * 25 * GIGA,
    sources=(
        ("peak_flops", "NVIDIA A100 80GB SXM data sheet: bf16, dense"),
        ("peak_vae_flops", "NVIDIA A100 80GB SXM data sheet: TF32, dense"),
        ("matmul_flops", "assumed: 73 % of the peak, as for h100"),
        ("matmul_fp32_flops", "assumed: 73 % of the data sheet's 19.5 TFLOP/s"),
        ("attention_flops", "assumed: FlashAttention-2, forward, 60 % of the peak"),
        ("attention_fp32_flops", "assumed: 60 % of the data sheet's 19.5 TFLOP/s"),
        ("vae_flops", "assumed: 19 % of the TF32 peak, as for h100"),
        ("memory_bandwidth", "assumed: 88 % of the data sheet's 2.039 TB/s"),
        ("memory_bytes", "NVIDIA A100 80GB SXM data sheet"),
        ("kernel_seconds", "assumed: eager PyTorch"),
        ("node_bandwidth", "assumed: 80 % of NVLink's 300 GB/s each way"),
        ("node_latency", "assumed: one NCCL call"),
        ("network_bandwidth", "assumed: 85 % of InfiniBand's 25 GB/s for each GPU"),
        ("network_latency", "assumed: one NCCL call"),
        ("gpus_per_node", "DGX A100"),
        ("overlap", "assumed: NCCL beside computing"),
    ),
)

RTX4090 = replace(
    A100,
    name="rtx4090",
    peak_flops=165.2 * TERA,
    peak_vae_flops=82.6 * TERA,
    matmul_flops=0.9 * 165.2 * TERA,
    matmul_fp32_flops=0.6 * 82.6 * TERA,
    attention_flops=0.8 * 165.2 * TERA,
    attention_fp32_flops=0.4 * 82.6 * TERA,
    vae_flops=0.19 * 82.6 * TERA,
    memory_bandwidth=0.88 * 1008 * GIGA,
    memory_bytes=24 * GIGA,
    node_bandwidth=0.4 * 32 * GIGA,
    node_latency=30 * MICRO,
    network_bandwidth=0.85 * 3.125 * GIGA,
    network_latency=60 * MICRO,
    sources=(
        ("peak_flops", "NVIDIA Ada white paper: bf16 with fp32 sums, dense"),
        ("peak_vae_flops", "NVIDIA Ada white paper: TF32, dense"),
        ("matmul_flops", "assumed: 90 % of the peak"),
        ("matmul_fp32_flops", "assumed: 60 % of the white paper's 82.6 TFLOP/s"),
        ("attention_flops", "assumed: FlashAttention-2, forward, 80 % of the peak"),
        ("attention_fp32_flops", "assumed: 40 % of the white paper's 82.6 TFLOP/s"),
        ("vae_flops", "assumed: 19 % of the TF32 peak, as for h100"),
        ("memory_bandwidth", "assumed: 88 % of the white paper's 1.008 TB/s"),
        ("memory_bytes", "NVIDIA Ada white paper"),
        ("kernel_seconds", "assumed: eager PyTorch"),
        ("node_bandwidth", "assumed: 40 % of PCIe 4.0 x16's 32 GB/s, through host memory, as there is no peer access"),
        ("node_latency", "assumed: one NCCL call"),
        ("network_bandwidth", "assumed: 85 % of 25 Gb/s Ethernet for each GPU"),
        ("network_latency", "assumed: one NCCL call"),
        ("gpus_per_node", "assumed"),
        ("overlap", "assumed: NCCL beside computing"),
    ),
)

CPU = Hardware(
    name="cpu",
    peak_flops=150 * GIGA,
    peak_vae_flops=150 * GIGA,
    matmul_flops=100 * GIGA,
    matmul_fp32_flops=100 * GIGA,
    attention_flops=60 * GIGA,
    attention_fp32_flops=60 * GIGA,
    vae_flops=25 * GIGA,
    memory_bandwidth=8 * GIGA,
    memory_bytes=16 * GIGA,
    kernel_seconds=10 * MICRO,
    node_bandwidth=1.5 * GIGA,
    node_latency=200 * MICRO,
    network_bandwidth=1 * GIGA,
    network_latency=400 * MICRO,
    gpus_per_node=64,
    launches_overlap=False,
    overlap=0.0,
    sources=tuple(
        (name, "assumed: one core with AVX-512 or two AVX2 units, gloo over loopback; calibrate for any other figure")
        for name in (
            *("peak_flops", "peak_vae_flops", "matmul_flops", "matmul_fp32_flops", "attention_flops"),
            *("attention_fp32_flops", "vae_flops", "memory_bandwidth", "memory_bytes", "kernel_seconds"),
            *("node_bandwidth", "node_latency", "network_bandwidth", "network_latency", "gpus_per_node"),
            "overlap",
        )
    ),
)

PROFILES: Mapping[str, Hardware] = {each.name: each for each in (H100, H200, A100, RTX4090, CPU)}


def find_hardware(name: str) -> Hardware:
    """A built-in profile, or that of a JSON file. Raises `RequestError`."""
    if name in PROFILES:
        return PROFILES[name]
    if not name.endswith(".json"):
        raise RequestError(f"--hardware {name}: allowed are {', '.join(PROFILES)}, or a JSON file of a calibration")
    return read_profile(Path(name))


def read_profile(path: Path) -> Hardware:
    """A profile as `Hardware.to_json` writes it; numbers without a default must be there. Raises `RequestError`."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise RequestError(f"--hardware {path}: cannot be read: {reason}") from None
    try:
        return _from_json(values)
    except (TypeError, ValueError) as error:
        raise RequestError(f"--hardware {path}: {error}") from None


def _from_json(values: Any) -> Hardware:
    if not isinstance(values, dict):
        raise TypeError("it does not hold a JSON object")
    values = {name: value for name, value in values.items() if name != MEASUREMENTS}
    for name, of in (("sources", "texts"), ("pass_shares", "shares")):
        pairs = values.get(name, {})
        if not isinstance(pairs, dict):
            raise TypeError(f"{name}: an object of {of} is allowed")
        values[name] = tuple(pairs.items())
    for name in SHARES:
        pairs = values.get(name, [])
        if not isinstance(pairs, list) or not all(isinstance(pair, list) for pair in pairs):
            raise TypeError(f"{name}: a list of pairs is allowed")
        values[name] = tuple(map(tuple, pairs))
    check_types(Hardware, values)
    missing = [name for name in ("name", *_required()) if name not in values]
    if missing:
        raise TypeError(f"{', '.join(missing)}: missing; write the file with a calibration")
    return Hardware(**values)


def _required() -> list[str]:
    return [field.name for field in fields(Hardware) if field.type == "float" and field.default is MISSING]


def detect_hardware(device_type: str, ranks: int = 1) -> Hardware:
    """The profile for this machine's first card, with its own memory; `cpu` where there is none.

    The `ranks` of a CPU share its memory.
    """
    if device_type == "cuda":
        import torch

        properties = torch.cuda.get_device_properties(0)
        return match_card(properties.name, properties.total_memory, torch.cuda.device_count())
    return replace(CPU, memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / ranks)


def match_card(name: str, memory: int, cards: int) -> Hardware:
    """The profile for a card by the name that CUDA gives it; for one unknown, that of the nearest memory."""
    signs = {"H200": H200, "H100": H100, "A100": A100, "4090": RTX4090}
    known = [hardware for sign, hardware in signs.items() if sign in name]
    nearest = min(signs.values(), key=lambda hardware: abs(math.log(hardware.memory_bytes / memory)))
    found = known[0] if known else nearest
    return replace(found, memory_bytes=float(memory), gpus_per_node=max(cards, 1))
