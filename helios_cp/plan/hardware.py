"""What a kind of machine can do: numbers with their sources, in files like those that a calibration writes.

Rates are what a program reaches. Only `peak_*` are what the data sheet promises. Rates and seconds are those of one
rank: one GPU, or on a CPU one process with one thread. What no data sheet says and nobody measured is assumed, and the
built-in files in `profiles` say so.
"""

from __future__ import annotations

import bisect
import json
import math
import os
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from helios_cp.config.errors import RequestError
from helios_cp.config.json_types import from_json
from helios_cp.config.layout import MACHINES
from helios_cp.plan.forward_cost import PASSES

SHARES = {"matmul_shares": "rows", "matmul_fp32_shares": "rows", "attention_shares": "tokens", "vae_shares": "channels"}
"""Fields of pairs, and what the first of a pair is."""

MOST_SHARE = 1.5
"""A full rate is that of large sizes. Middle sizes may be a little faster, so shares above 1 are allowed."""

MEASUREMENTS = "calibration"
"""The key in a profile's file where a calibration keeps what it measured. The planner does not read it."""

NUMBERS = ("float", "int", "float | None")


@dataclass(frozen=True)
class Hardware:
    """One kind of machine. Rates in FLOP/s and bytes/s, latencies in seconds.

    `matmul_*`: products of many rows, by dtype. `matmul_shares`: (rows, share of that rate) for fewer rows,
    interpolated in the logarithm of the rows; `matmul_fp32_shares` where fp32 differs. `attention_*`: likewise, with
    shares by the geometric mean of queries and keys. `vae_flops`: the VAE's decoding in fp32, its memory passes
    included, with shares by channels. `memory_bandwidth`: of copies and sums; `pass_shares`: (kind, share of it) for
    other passes over memory, see `plan.forward_cost.PASSES`. `kernel_seconds`: to launch one kernel; if
    `launches_overlap`, launches run while the device computes. `node_*`: a rank's messages within a node;
    `node_exchange_latency` where two ranks exchange, as in a ring or a halo, and that differs from a collective.
    `network_*`: between nodes. `overlap`: the share of a message's time that can pass while a rank computes.
    `memory_bytes`: of the device, or a rank's share of it. `sources`: where each number comes from.
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
    node_exchange_latency: float | None = None
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
            elif value is not None and field.type in NUMBERS and not (math.isfinite(value) and value > 0):
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
        values[name] = list(pairs.items())
    return from_json(Hardware, values)


PROFILES = {name: read_profile(Path(__file__).parent / "profiles" / f"{name}.json") for name in MACHINES}
H100, H200, A100, RTX4090, CPU = PROFILES.values()


def find_hardware(name: str) -> Hardware:
    """A built-in profile, or that of a JSON file. Raises `RequestError`."""
    if name in PROFILES:
        return PROFILES[name]
    if not name.endswith(".json"):
        raise RequestError(f"--hardware {name}: allowed are {', '.join(PROFILES)}, or a JSON file of a calibration")
    return read_profile(Path(name))


def detect_hardware(device_type: str, ranks_of_node: int | None = None) -> Hardware:
    """The profile for this machine's first card, with its own memory; `cpu` where there is none.

    `ranks_of_node` of the job are on this machine: as many as it has cards, unless told otherwise, however many of them
    one process sees. On a CPU they share its memory; it is one unless told otherwise.
    """
    if device_type == "cuda":
        import torch

        properties = torch.cuda.get_device_properties(0)
        return match_card(properties.name, properties.total_memory, ranks_of_node or torch.cuda.device_count())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return replace(CPU, memory_bytes=memory / (ranks_of_node or 1))


KNOWN_CARDS = {
    r"\bH200\b": H200,
    r"\bH100\b(?!.*(PCIE|NVL))": H100,
    r"\bA100-SXM": A100,
    r"\bRTX 4090\b(?!.*LAPTOP)": RTX4090,
}
"""Profiles by what the names that CUDA gives their cards have in common."""


def match_card(name: str, memory: int, ranks_of_node: int) -> Hardware:
    """The profile for a card by the name that CUDA gives it, with its own memory.

    A card that is not known, or whose kind is without NVLink, is taken for the one whose name it shares or whose memory
    comes nearest, with messages over PCIe; the profile's name then says so.
    """
    size = {"memory_bytes": float(memory), "gpus_per_node": max(ranks_of_node, 1)}
    for pattern, hardware in KNOWN_CARDS.items():
        if re.search(pattern, name.upper()):
            return replace(hardware, **size)
    by_name = [hardware for sign, hardware in {"H100": H100, "A100": A100}.items() if sign in re.split(r"\W", name)]
    cards = (H100, H200, A100, RTX4090)
    nearest = by_name[0] if by_name else min(cards, key=lambda each: abs(math.log(each.memory_bytes / memory)))
    return replace(
        nearest,
        name=f"{name}, taken for {nearest.name} with PCIe",
        node_bandwidth=RTX4090.node_bandwidth,
        node_latency=RTX4090.node_latency,
        **size,
    )
