"""The kinds of machines that are built in, and which of them stands for the machine at hand.

What no data sheet says and nobody measured is assumed, and says so.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from helios_cp.config.errors import RequestError
from helios_cp.plan.hardware import GIGA, MICRO, TERA, Hardware, read_profile

GIBI = 2**30
"""What sellers of cards call a gigabyte of memory."""

Figures = dict[str, tuple[float, str]]
"""Fields of `Hardware`, each with where it comes from."""


def _machine(name: str, figures: Figures, launches_overlap: bool = True) -> Hardware:
    values = {field: value for field, (value, _) in figures.items()}
    sources = tuple((field, source) for field, (_, source) in figures.items())
    return Hardware(name=name, launches_overlap=launches_overlap, sources=sources, **values)


_NCCL = "assumed: one NCCL call"
_H100: Figures = {
    "peak_flops": (989.4 * TERA, "NVIDIA H100 SXM data sheet: bf16, dense"),
    "peak_vae_flops": (494.7 * TERA, "NVIDIA H100 SXM data sheet: TF32, dense"),
    "matmul_flops": (720 * TERA, "assumed: large cuBLAS products, 73 % of the peak"),
    "matmul_fp32_flops": (49 * TERA, "assumed: 73 % of the data sheet's 67 TFLOP/s outside tensor cores"),
    "attention_flops": (600 * TERA, "assumed: FlashAttention-3, forward, head dim 128"),
    "attention_fp32_flops": (40 * TERA, "assumed: 60 % of the data sheet's 67 TFLOP/s"),
    "vae_flops": (
        95 * TERA,
        "modelled of diffusers' decoder: 69.3 TFLOP of a chunk in 0.73 s; ours has met no card yet",
    ),
    "memory_bandwidth": (0.88 * 3350 * GIGA, "assumed: 88 % of the data sheet's 3.35 TB/s"),
    "memory_bytes": (80 * GIBI, "NVIDIA H100 SXM data sheet"),
    "kernel_seconds": (5 * MICRO, "assumed: eager PyTorch"),
    "node_bandwidth": (0.8 * 450 * GIGA, "assumed: 80 % of NVLink's 450 GB/s each way"),
    "node_latency": (20 * MICRO, _NCCL),
    "network_bandwidth": (0.85 * 50 * GIGA, "assumed: 85 % of InfiniBand's 50 GB/s for each GPU"),
    "network_latency": (40 * MICRO, _NCCL),
    "gpus_per_node": (8, "DGX H100"),
    "overlap": (1.0, "assumed: NCCL beside computing"),
}
_H200: Figures = {
    **_H100,
    "matmul_flops": (790 * TERA, "measured on one H200: bf16 products of random data"),
    "memory_bandwidth": (4300 * GIGA, "measured on one H200: copies"),
    "memory_bytes": (141 * GIBI, "NVIDIA H200 data sheet"),
}
_A100: Figures = {
    **_H100,
    "peak_flops": (312 * TERA, "NVIDIA A100 80GB SXM data sheet: bf16, dense"),
    "peak_vae_flops": (156 * TERA, "NVIDIA A100 80GB SXM data sheet: TF32, dense"),
    "matmul_flops": (0.73 * 312 * TERA, "assumed: 73 % of the peak, as for h100"),
    "matmul_fp32_flops": (0.73 * 19.5 * TERA, "assumed: 73 % of the data sheet's 19.5 TFLOP/s"),
    "attention_flops": (0.6 * 312 * TERA, "assumed: FlashAttention-2, forward, 60 % of the peak"),
    "attention_fp32_flops": (0.6 * 19.5 * TERA, "assumed: 60 % of the data sheet's 19.5 TFLOP/s"),
    "vae_flops": (30 * TERA, "assumed: 19 % of the TF32 peak, as for h100"),
    "memory_bandwidth": (0.88 * 2039 * GIGA, "assumed: 88 % of the data sheet's 2.039 TB/s"),
    "memory_bytes": (80 * GIBI, "NVIDIA A100 80GB SXM data sheet"),
    "node_bandwidth": (0.8 * 300 * GIGA, "assumed: 80 % of NVLink's 300 GB/s each way"),
    "network_bandwidth": (0.85 * 25 * GIGA, "assumed: 85 % of InfiniBand's 25 GB/s for each GPU"),
    "gpus_per_node": (8, "DGX A100"),
}
_RTX4090: Figures = {
    **_H100,
    "peak_flops": (165.2 * TERA, "NVIDIA Ada white paper: bf16 with fp32 sums, dense"),
    "peak_vae_flops": (82.6 * TERA, "NVIDIA Ada white paper: TF32, dense"),
    "matmul_flops": (0.9 * 165.2 * TERA, "assumed: 90 % of the peak"),
    "matmul_fp32_flops": (0.6 * 82.6 * TERA, "assumed: 60 % of the white paper's 82.6 TFLOP/s"),
    "attention_flops": (0.8 * 165.2 * TERA, "assumed: FlashAttention-2, forward, 80 % of the peak"),
    "attention_fp32_flops": (0.4 * 82.6 * TERA, "assumed: 40 % of the white paper's 82.6 TFLOP/s"),
    "vae_flops": (0.19 * 82.6 * TERA, "assumed: 19 % of the TF32 peak, as for h100"),
    "memory_bandwidth": (0.88 * 1008 * GIGA, "assumed: 88 % of the white paper's 1.008 TB/s"),
    "memory_bytes": (24 * GIBI, "NVIDIA Ada white paper"),
    "node_bandwidth": (
        0.4 * 32 * GIGA,
        "assumed: 40 % of PCIe 4.0 x16's 32 GB/s, through host memory, as there is no peer access",
    ),
    "node_latency": (30 * MICRO, _NCCL),
    "network_bandwidth": (0.85 * 3.125 * GIGA, "assumed: 85 % of 25 Gb/s Ethernet for each GPU"),
    "network_latency": (60 * MICRO, _NCCL),
    "gpus_per_node": (8, "assumed"),
}
_CPU = {
    "peak_flops": 150 * GIGA,
    "peak_vae_flops": 150 * GIGA,
    "matmul_flops": 100 * GIGA,
    "matmul_fp32_flops": 100 * GIGA,
    "attention_flops": 60 * GIGA,
    "attention_fp32_flops": 60 * GIGA,
    "vae_flops": 25 * GIGA,
    "memory_bandwidth": 8 * GIGA,
    "memory_bytes": 16 * GIBI,
    "kernel_seconds": 10 * MICRO,
    "node_bandwidth": 1.5 * GIGA,
    "node_latency": 200 * MICRO,
    "network_bandwidth": 1 * GIGA,
    "network_latency": 400 * MICRO,
    "gpus_per_node": 64,
    "overlap": 0.0,
}
_CORE = "assumed: one core with AVX-512 or two AVX2 units, gloo over loopback; calibrate for any other figure"

H100, H200, A100 = _machine("h100", _H100), _machine("h200", _H200), _machine("a100-80", _A100)
RTX4090 = _machine("rtx4090", _RTX4090)
CPU = _machine("cpu", {field: (value, _CORE) for field, value in _CPU.items()}, launches_overlap=False)

PROFILES: Mapping[str, Hardware] = {each.name: each for each in (H100, H200, A100, RTX4090, CPU)}


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
